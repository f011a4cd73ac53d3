#!/usr/bin/env python
"""Time steps and resets of Meta-World: the official environment, ours, and the physics alone, on one core.

For each task the three alternate in blocks of 50 steps with the same random actions, so that a slowdown of the machine
affects all three. "Physics alone" is the part that a reimplementation with the same bits cannot leave out: five
substeps of the official model and the forward pass after them, without observation and reward. Every step and reset of
ours is compared with the official one, bit for bit. Reset times are those of a task's second and later resets.

    .venv/bin/python scripts/benchmarks/bench_envs.py [--tasks reach-v3 push-v3] [--steps 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from metarl import envs

BLOCK = 50


def official_env(task: Any, like: Any) -> Any:
    """Return the official environment of a task, with its goal set and hidden as in ours."""
    env = ALL_V3_ENVIRONMENTS[task.name]()
    env._last_rand_vec, env._freeze_rand_vec, env._set_task_called = like._official._last_rand_vec.copy(), True, True
    env.reset()
    return env


def physics_step(env: Any, action: np.ndarray[Any, Any]) -> None:
    """Do only the MuJoCo part of a step."""
    data = env.data
    data.mocap_pos[0] = np.clip(data.mocap_pos[0] + action[:3] * env.action_scale, env.mocap_low, env.mocap_high)
    data.ctrl[:] = action[3], -action[3]
    mujoco.mj_step(env.model, data, 5)
    mujoco.mj_forward(env.model, data)


def measure(name: str, steps: int) -> dict[str, float]:
    """Return microseconds a step (`official`, `ours`, `physics`) and a reset (`official_reset`, `our_reset`)."""
    task = envs.distribution("metaworld", benchmark="ML1", name=name).train_tasks[0]
    ours = envs.make(task)
    official, physics = official_env(task, ours), official_env(task, ours)
    ours.reset()
    rng = np.random.default_rng(0)
    gc.collect()
    spent = dict.fromkeys(("official", "ours", "physics", "official_reset", "our_reset"), 0.0)

    def timed(key: str, call: Any) -> Any:
        start = time.perf_counter()
        result = call()
        spent[key] += time.perf_counter() - start
        return result

    resets = 0
    for done in range(0, steps, BLOCK):
        if done % 500 == 0:
            resets += 1
            first = timed("official_reset", official.reset)[0]
            second = timed("our_reset", ours.reset)[0]
            physics.reset()
            assert first.tobytes() == second.tobytes(), f"{name}: a reset differs"
        actions = rng.uniform(-1, 1, (BLOCK, 4)).astype(np.float32)
        expected = timed("official", lambda a=actions: [official.step(action) for action in a])
        found = timed("ours", lambda a=actions: [ours.step(action) for action in a])
        timed("physics", lambda a=actions: [physics_step(physics, action) for action in a])
        for before, after in zip(expected, found, strict=True):
            assert before[0].tobytes() == after[0].tobytes() and before[1] == after[1], f"{name}: a step differs"
    return {key: total / (resets if "reset" in key else steps) * 1e6 for key, total in spent.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(ALL_V3_ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=500, help="steps of each task, a multiple of 50")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.steps < BLOCK or arguments.steps % BLOCK:
        parser.error(f"--steps {arguments.steps}: expected a multiple of {BLOCK}")
    if unknown := sorted(set(arguments.tasks) - set(ALL_V3_ENVIRONMENTS)):
        parser.error(f"--tasks {' '.join(unknown)}: no such task; see `metarl list envs`")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    figures = {}
    print(f"{'':30}{'steps a second':^33}{'ratio of ours to':^20}{'reset, ms':^18}")
    print(
        f"{'task':30}{'official':>11}{'ours':>11}{'physics':>11}{'official':>11}{'physics':>9}{'official':>11}{'ours':>7}"
    )
    for name in arguments.tasks:
        figures[name] = us = measure(name, arguments.steps)
        print(
            f"{name:30}{1e6 / us['official']:11,.0f}{1e6 / us['ours']:11,.0f}{1e6 / us['physics']:11,.0f}"
            f"{us['official'] / us['ours']:11.2f}{us['physics'] / us['ours']:9.2f}"
            f"{us['official_reset'] / 1e3:11.2f}{us['our_reset'] / 1e3:7.3f}",
            flush=True,
        )
    to_official = [us["official"] / us["ours"] for us in figures.values()]
    to_physics = [us["physics"] / us["ours"] for us in figures.values()]
    resets = [us["official_reset"] / us["our_reset"] for us in figures.values()]
    print(
        f"\nours / official: mean {np.mean(to_official):.2f}, lowest {min(to_official):.2f}\n"
        f"ours / physics alone: mean {np.mean(to_physics):.2f}, lowest {min(to_physics):.2f}\n"
        f"resets, official / ours: mean {np.mean(resets):.0f}, lowest {min(resets):.0f}"
    )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
