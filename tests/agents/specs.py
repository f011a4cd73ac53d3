"""What agents in tests are built for: actions within ±1, on the CPU."""

import torch

from metarl.spaces import Spaces
from metarl.types import AgentSpec


def spec(observations, actions, device="cpu", seed=0, stages=0, heads=False):
    """An `AgentSpec` by its sizes."""
    return AgentSpec(Spaces.within_one(observations, actions), torch.device(device), seed, stages, heads)
