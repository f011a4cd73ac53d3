"""Adapt a trained agent to recorded episodes of a new task, save the result, and export it for the robot.

    python docs/examples/adapt_on_recordings.py runs/reach --record recordings/      # stands in for a robot's recording
    python docs/examples/adapt_on_recordings.py runs/reach --adapt-on recordings/ --save runs/adapted --export new.onnx

A recording is one .npz file an episode, with the fields of `metarl.Trajectory`: observations `[T, O]`, actions `[T, A]`
as they were sent, rewards `[T]`, terminated `[T]`, truncated `[T]`. It needs no log-probabilities. Record with the
agent's exploring actions, as here, and as many episodes as it adapts to in training: it learns from what was tried.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np

import metarl
from metarl.errors import UserError


def act(policy: metarl.Policy, env: gymnasium.Env, episodes: int, deterministic: bool) -> list[metarl.Trajectory]:
    """Act for some episodes and return them as recordings. With a memory, they are the episodes of one trial."""
    trajectories, state, reward = [], None, None  # a trial begins
    for _ in range(episodes):
        observation, _ = env.reset()
        steps, start, ended = [], True, False
        while not ended:
            action, state = policy.predict(observation, state, np.array([start]), deterministic, reward)
            following, gained, terminated, truncated, _ = env.step(action)
            reward = float(gained)
            steps.append((observation, action, reward, terminated, truncated))
            observation, start, ended = following, False, terminated or truncated
        trajectories.append(metarl.Trajectory(*(np.array(part) for part in zip(*steps, strict=True))))
    return trajectories


def mean_return(policy: metarl.Policy, env: gymnasium.Env, episodes: int = 5) -> float:
    """Return the mean return of single episodes without exploration."""
    return float(np.mean([act(policy, env, 1, deterministic=True)[0].rewards.sum() for _ in range(episodes)]))


def write(folder: Path, trajectories: list[metarl.Trajectory]) -> None:
    """Write one file for each episode."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, trajectory in enumerate(trajectories):
        fields = {name: value for name, value in vars(trajectory).items() if value is not None}
        np.savez(folder / f"episode_{number:03}.npz", **fields)


def read(folder: Path) -> list[metarl.Trajectory]:
    """Read all episodes of a folder, in the order of their names. Executes nothing in them."""
    trajectories = []
    for path in sorted(folder.glob("*.npz")):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not a recorded episode: it is no archive of numpy.savez")
        try:
            with np.load(path) as fields:
                trajectories.append(metarl.Trajectory(**fields))
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a recorded episode: {error}") from error
    if not trajectories:
        raise UserError(f"{folder} has no .npz files; record some with --record {folder}")
    return trajectories


def run(options: argparse.Namespace) -> None:
    """Record episodes, or adapt to recorded ones and compare."""
    agent = metarl.load(options.run_dir)
    tasks = metarl.evaluation.distribution_of(agent.config)
    held_out = tasks.test_tasks
    if not 0 <= options.task < len(held_out):
        raise UserError(f"--task {options.task}: the run has {len(held_out)} held-out tasks, counted from 0")
    task = held_out[options.task]
    env = tasks.make(task)
    if options.record:
        num_episodes = agent.agent.trial_episodes - 1 if agent.has_memory else agent.config.rollouts_per_task
        episodes = act(agent, env, options.episodes or num_episodes, deterministic=False)
        write(options.record, episodes)
        print(f"{len(episodes)} episodes of {task.name} {task.index} in {options.record}")
        return
    adapted = agent.adapt(read(options.adapt_on))
    before, after = mean_return(agent, env), mean_return(adapted, env)
    print(f"return on {task.name} {task.index}: {before:.1f} before, {after:.1f} after adapting")
    if options.save:
        adapted.save(options.save)
        print(f"saved in {options.save}; load it with metarl.load")
    if options.export:
        adapted.export(options.export, env, task=task)
        print(f"exported to {options.export}")


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description="Adapt a trained agent to recorded episodes of a new task.")
    parser.add_argument("run_dir", help="run directory of `metarl train`")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--record", type=Path, metavar="DIR", help="act on a held-out task and record it there")
    which.add_argument("--adapt-on", type=Path, metavar="DIR", help="folder of recorded episodes to adapt to")
    parser.add_argument("--task", type=int, default=0, help="number of the held-out task (0)")
    parser.add_argument("--episodes", type=int, help="episodes to record (as many as the agent adapts to in training)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the adapted agent there")
    parser.add_argument("--export", type=Path, metavar="FILE.onnx", help="export the adapted agent for metarl.runtime")
    try:
        run(parser.parse_args())
    except (UserError, ValueError, OSError) as error:
        print(f"adapt_on_recordings.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
