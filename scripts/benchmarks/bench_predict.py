"""Time one action: exported policy, torch policy and stable-baselines3, with networks of the same size.

Batch 1, one thread, deterministic, observations in float64 as environments return them. The calls of all policies
alternate in one process. The ratios are those of the medians to stable-baselines3's PPO.

    python scripts/benchmarks/bench_predict.py --calls 20000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO

from metarl.build import build_agent
from metarl.config.schema import RunConfig
from metarl.deploy.policy import Policy
from metarl.runtime import OnnxPolicy
from metarl.spaces import Spaces

OBSERVATIONS, ACTIONS = 39, 4  # those of Meta-World


class Nothing(gymnasium.Env):  # type: ignore[type-arg]
    """An environment with spaces and nothing else."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)


def make_policy(agent: dict[str, object]) -> Policy:
    """Return an untrained policy; its speed does not depend on its weights."""
    stages = [{"tasks": {"family": "metaworld", "name": "reach-v3"}}]
    config = RunConfig.model_validate({"agent": agent, "stages": stages})
    spaces = Spaces(OBSERVATIONS, (-1.0,) * ACTIONS, (1.0,) * ACTIONS)
    built = build_agent(config, spaces, torch.device("cpu"))
    return Policy(config, built, spaces, 0, built.initial_state(1))


def exported(policy: Policy, folder: Path) -> OnnxPolicy:
    """Return the policy as it runs on a robot."""
    path = folder / "policy.onnx"
    policy.export(path)
    return OnnxPolicy(path)


def stepping(policy: Policy | OnnxPolicy, observation: np.ndarray) -> Callable[[], None]:
    """Return a function that makes the next step of a trial."""
    state = None

    def step() -> None:
        nonlocal state
        _, state = policy.predict(observation, state, None, True, 0.5)

    return step


def main() -> None:
    """Print one line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="calls of each policy")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128], help="widths of the MLPs")
    parser.add_argument("--memory", type=int, default=256, help="units of the GRU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    observation = np.random.default_rng(0).standard_normal(OBSERVATIONS)
    mlp = make_policy({"name": "maml_ppo", "hidden_sizes": options.hidden})
    gru = make_policy({"name": "rl2", "memory": {"name": "gru", "size": options.memory}})
    ppo = PPO("MlpPolicy", Nothing(), policy_kwargs={"net_arch": options.hidden}, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            f"MLP {options.hidden}: OnnxPolicy": stepping(exported(mlp, Path(folder)), observation),
            f"MLP {options.hidden}: metarl.Policy": stepping(mlp, observation),
            f"MLP {options.hidden}: stable-baselines3 PPO": lambda: ppo.predict(observation, deterministic=True),
            f"GRU {options.memory}: OnnxPolicy": stepping(exported(gru, Path(folder)), observation),
            f"GRU {options.memory}: metarl.Policy": stepping(gru, observation),
        }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(options.calls + 200):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if call >= 200:
                times[name].append(1e6 * (time.perf_counter() - began))
    quantiles = {name: np.percentile(values, [50, 99, 99.9]) for name, values in times.items()}
    reference = next(values for name, values in quantiles.items() if "PPO" in name)
    print(f"{'µs a call':<40}{'p50':>8}{'p99':>8}{'p99.9':>9}{'p50 / PPO':>12}")
    for name, (p50, p99, p999) in quantiles.items():
        print(f"{name:<40}{p50:>8.1f}{p99:>8.1f}{p999:>9.1f}{p50 / reference[0]:>12.2f}")


if __name__ == "__main__":
    main()
