"""State values for advantages: the linear feature baseline, fitted to every batch, or a learned value function."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metarl.nn.mlp import Params, apply_mlp, init_mlp
from metarl.nn.optimizer_state import load_optimizer_state, optimizer_state
from metarl.rl.returns import discounted_returns, linear_baseline
from metarl.types import Rollout


def linear_values(
    observations: Tensor, rewards: Tensor, last: Tensor, valid: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Values by the linear feature baseline, fitted to each task and each phase by itself.

    It is a function of time, for a finite horizon: after the last step of an episode, or of a trial, the value is 0.

    Args:
        observations: `[M, N, T, O]`, normalised.
        rewards: `[M, N, T]`.
        last: `[M, N, T]`, bool: nothing follows this step.
        valid: `[M, N, T]`, bool.
        gamma: discount of the returns that it is fitted to.

    Returns:
        V before and after each step, both `[M, N, T]`.
    """
    returns = discounted_returns(rewards, last, gamma)
    time = torch.arange(returns.shape[-1], device=returns.device).expand_as(returns)
    inputs, targets, steps, counted = (part.flatten(1, 2) for part in (observations, returns, time, valid))
    values = linear_baseline(inputs, targets, steps, counted).view_as(returns)
    following = torch.nn.functional.pad(values[..., 1:], (0, 1))
    return values, following.masked_fill(last, 0.0)


class LearnedValue:
    """A value network for all tasks, trained by regression on normalised targets; it bootstraps at truncation.

    Targets are normalised by their running mean and standard deviation, so that one learning rate fits all reward
    scales.

    Args:
        observation_size: O.
        hidden_sizes: widths of the hidden layers.
        lr: Adam's learning rate.
        epochs: passes over the data an iteration.
        generator: draws the initial parameters.
        device: where it lives.
    """

    minibatch = 4096

    def __init__(
        self,
        observation_size: int,
        hidden_sizes: tuple[int, ...],
        lr: float,
        epochs: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        params = init_mlp((observation_size, *hidden_sizes, 1), 1.0, generator)
        self._params: Params = {name: value.to(device).requires_grad_() for name, value in params.items()}
        self._optimizer = torch.optim.Adam(self._params.values(), lr=lr)
        self._epochs = epochs
        self._scale = torch.tensor([0.0, 1.0, 0.0], device=device)  # mean, standard deviation, iterations seen

    def _normalized(self, observations: Tensor) -> Tensor:
        shape = observations.shape[:-1]
        return apply_mlp(self._params, observations.reshape(-1, observations.shape[-1]), "tanh").view(shape)

    @torch.no_grad()
    def values(self, rollout: Rollout, observations: Tensor, next_observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return V before and after each step, both `[M, N, T]`; 0 after a termination only.

        Args:
            rollout: complete episodes.
            observations: `[M, N, T, O]`, normalised.
            next_observations: `[M, N, T, O]`, normalised.
        """
        mean, std, _ = self._scale
        values = self._normalized(observations) * std + mean
        following = self._normalized(next_observations) * std + mean
        return values, following.masked_fill(rollout.terminated, 0.0)

    def fit(self, observations: Tensor, targets: Tensor, valid: Tensor, seed: int) -> dict[str, float]:
        """Regress on the returns of an iteration.

        Args:
            observations: `[B, O]`, normalised.
            targets: `[B]`.
            valid: `[B]`, bool.
            seed: of the order in which the data is gone through.
        """
        observations, targets = observations[valid], targets[valid]
        weight = 1.0 / min(float(self._scale[2]) + 1.0, 20.0)
        mean = (1 - weight) * self._scale[0] + weight * targets.mean()
        std = (1 - weight) * self._scale[1] + weight * targets.std().clamp_min(1e-6)
        self._scale = torch.stack([mean, std, self._scale[2] + 1.0])
        generator = torch.Generator().manual_seed(seed)
        normalized = (targets - mean) / std
        losses = []
        for _ in range(self._epochs):
            order = torch.randperm(len(targets), generator=generator).to(targets.device)
            for rows in torch.split(order, self.minibatch):
                loss = 0.5 * (self._normalized(observations[rows]) - normalized[rows]).square().mean()
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                losses.append(loss.detach())
        return {"value_loss": float(torch.stack(losses).mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, optimiser and scale of the targets."""
        return {**self._params, "scale": self._scale, **optimizer_state(self._optimizer, self._params)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            for name, value in self._params.items():
                value.copy_(state[name])
        self._scale = state["scale"].to(self._scale.device)
        load_optimizer_state(self._optimizer, self._params, state)
