"""Run an exported policy behind LeRobot's interface: `reset()`, `select_action(batch)`; robots with dicts of joints.

    metarl export runs/reach policy.onnx
    python docs/examples/lerobot_runner.py policy.onnx --episodes 3

LeRobot needs an older torch than metarl, so the policy is an ONNX file: this script runs in LeRobot's own environment,
with onnxruntime and metarl/runtime.py added. The robot is a stand-in with the interface of LeRobot's robots. To use a
real one, pass a connected `lerobot.robots.Robot` to `run_episode`. It must have the joints that the policy was trained
on, in the same units; `KEYS` maps their names. With a memory, keep episodes as long as in training, the default of
`--steps`: the policy gets worse beyond that.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarl.runtime import OnnxPolicy

KEYS = "{}.pos"  # LeRobot's key for an entry of the model's observation_names and action_names


class LeRobotPolicy:
    """A policy with the methods that LeRobot's scripts call, for numpy arrays and for torch tensors.

    LeRobot calls `reset` before each episode. A policy with a memory treats these as episodes of one task and improves
    from one to the next, for about as many as it was trained with. Call `new_task` to make it forget.

    Args:
        policy: the exported policy.

    Raises:
        ValueError: the file does not name observations and actions.
    """

    def __init__(self, policy: OnnxPolicy) -> None:
        self._policy = policy
        if None in (policy.metadata["observation_names"], policy.metadata["action_names"]):
            raise ValueError("the file does not name observations and actions; export it with an environment that does")
        self.observation_keys = [KEYS.format(name) for name in policy.metadata["observation_names"]]
        self.action_keys = [KEYS.format(name) for name in policy.metadata["action_names"]]
        self.new_task()

    def new_task(self) -> None:
        """Clear the memory."""
        self._state: NDArray[np.float32] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin an episode with the next action."""
        self._starts = True

    def select_action(self, batch: dict[str, Any]) -> Any:
        """Choose actions.

        Args:
            batch: `observation.state` `[B, O]` or `[O]`; for a policy with a memory also `next.reward` `[B]`, that of
                the previous frame, or none. Other entries are ignored.

        Returns:
            Actions `[B, A]` or `[A]` within their bounds. Do not normalise them again.
        """
        state = batch["observation.state"]
        observation, reward = as_array(state), as_array(batch.get("next.reward"))
        start = np.full(observation.shape[:-1] or 1, self._starts)
        action, self._state = self._policy.predict(observation, self._state, start, deterministic=True, reward=reward)
        self._starts = False
        return state.new_tensor(action) if hasattr(state, "new_tensor") else action


def as_array(value: Any) -> Any:
    """Convert numbers or a torch tensor on any device to an array, without importing torch. None stays None."""
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return None if value is None else np.asarray(value)


class FakeRobot:
    """A stand-in for a LeRobot robot: joints that follow commands within limits.

    Args:
        measured: names of the measurements; the first A are the joints.
        commanded: names of the commands.
    """

    def __init__(self, measured: list[str], commanded: list[str]) -> None:
        self.observation_features = dict.fromkeys(measured, float)
        self.action_features = dict.fromkeys(commanded, float)
        self._positions = dict.fromkeys(measured, 0.0)

    def get_observation(self) -> dict[str, Any]:
        """Return one number for each entry of `observation_features`."""
        return dict(self._positions)

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Move by a tenth of the action. Return the action after limits."""
        sent = {name: float(np.clip(action[name], -1.0, 1.0)) for name in self.action_features}
        for name, value in zip(self._positions, sent.values(), strict=False):
            self._positions[name] += 0.1 * value
        return sent


def run_episode(robot: Any, policy: LeRobotPolicy, steps: int, period_s: float) -> list[dict[str, Any]]:
    """Run an episode and return the actions that were sent.

    Raises:
        ValueError: the robot lacks joints that the policy observes or commands.
    """
    differing = {*policy.observation_keys} - {*robot.observation_features}
    differing |= {*policy.action_keys} ^ {*robot.action_features}
    if differing:
        raise ValueError(f"only the robot or only the policy has {', '.join(sorted(differing))}; see KEYS")
    policy.reset()
    sent, reward = [], None
    began = time.perf_counter()
    for step in range(steps):
        measured = robot.get_observation()
        state = np.array([[measured[key] for key in policy.observation_keys]], np.float32)
        action = policy.select_action({"observation.state": state, "next.reward": reward})[0]
        sent.append(robot.send_action(dict(zip(policy.action_keys, action.tolist(), strict=True))))
        reward = -float(np.linalg.norm(state - 0.3))  # put your task's reward here; a memory needs it
        time.sleep(max(0.0, began + (step + 1) * period_s - time.perf_counter()))
    return sent


def main() -> None:
    """Run episodes on the stand-in."""
    parser = argparse.ArgumentParser(description="An exported policy behind LeRobot's interface.")
    parser.add_argument("policy", type=Path, help="file of `metarl export`")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, help="steps in an episode (for a memory: its horizon of training, else 50)"
    )
    options = parser.parse_args()
    try:
        exported = OnnxPolicy(options.policy)
        policy = LeRobotPolicy(exported)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"lerobot_runner.py: {error}\n")
    trial = exported.metadata["trial"]  # the trials of training, for a policy with a memory
    steps = options.steps or (trial and trial["horizon"]) or 50
    robot = FakeRobot(policy.observation_keys, policy.action_keys)
    for episode in range(options.episodes):
        sent = run_episode(robot, policy, steps, exported.metadata["control_period_s"] or 1 / 30)
        last = ", ".join(f"{name} {value:.3f}" for name, value in sent[-1].items())
        print(f"episode {episode}: {len(sent)} actions sent; the last: {last}")


if __name__ == "__main__":
    main()
