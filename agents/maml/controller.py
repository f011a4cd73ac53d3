"""One control step of an agent without a memory, as a function of tensors alone."""

from __future__ import annotations

from torch import Tensor, nn

from metarl.nn.action_units import ActionUnits
from metarl.nn.mlp import MlpPolicy, Params
from metarl.nn.normalizer import Normalizer
from metarl.spaces import Spaces


class MlpController(nn.Module):
    """The controller of an agent without a memory; a snapshot on the CPU.

    Args:
        policy: what the parameters mean.
        params: of one task, plain.
        normalizer: of observations.
        spaces: of the environment.

    Attributes:
        state_size: S, of what is remembered: 0.
        reward_scale: of rewards that it reads: none.
        observation_scale: mean and standard deviation of observations, `[O]`, by which it normalises them.
    """

    state_size = 0
    reward_scale: dict[str, float] | None = None

    def __init__(self, policy: MlpPolicy, params: Params, normalizer: Normalizer, spaces: Spaces) -> None:
        super().__init__()
        self._policy, self._normalizer = policy, normalizer.to("cpu")
        self._params = {name: value.detach().cpu().clone() for name, value in params.items()}
        self._units = ActionUnits(spaces)
        deviation = self._normalizer.variance.sqrt().clamp_min(self._normalizer.floor)
        self.observation_scale = self._normalizer.mean.numpy(), deviation.numpy()

    def forward(self, observations: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return actions `[B, A]`, in the units of the action space.

        Args:
            observations: `[B, O]`, raw.
            noise: `[B, noise_size]` or `[1, noise_size]`, standard normal; None or zeros: the mode.
        """
        distribution = self._policy.distribution(self._params, self._normalizer(observations))
        actions: Tensor = self._units(distribution.mode if noise is None else distribution.sample(noise))
        return actions
