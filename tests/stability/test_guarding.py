"""What guards earlier stages is part of every step that an agent makes."""

import itertools

import pytest
import torch

from tests.stability.agents import copy_of, iteration, make, policy_of

STEPS = {"maml": {"epochs": 4}, "gru": {"epochs": 2, "minibatches": 2, "max_kl": 1e9}}
"""Four steps of the optimiser, on all data or half of it."""


@pytest.mark.parametrize("kind", STEPS)
def test_the_guard_counts_in_every_step_of_the_optimiser(kind):
    """One that speaks in a single step changes what is learned, whichever it is. A penalty would fade unnoticed."""
    rollouts, learned = iteration(make(kind)), []
    for speaks in (None, 0, 1, 2, 3):
        agent, asked = make(kind, **STEPS[kind]), []

        def auxiliary_loss(fraction, again=False, agent=agent, asked=asked, speaks=speaks):
            asked.append(fraction)
            return sum(v.square().sum() for v in policy_of(agent).values()) if len(asked) - 1 == speaks else None

        agent.update((), rollouts, auxiliary_loss)
        assert asked == [1.0 if kind == "maml" else 0.5] * 4
        learned.append(torch.cat([value.flatten() for value in copy_of(policy_of(agent)).values()]))
    for one, other in itertools.combinations(learned, 2):
        assert (one - other).abs().max() > 1e-5


def test_fewer_trials_than_minibatches_are_guarded_as_much():
    """What an epoch replays is as much as it learns from, in however many steps."""
    agent, asked = make("gru", epochs=1, minibatches=50, max_kl=1e9), []
    agent.update((), iteration(agent), lambda fraction, again=False: asked.append(fraction))
    assert 1 < len(asked) < 50 and sum(asked) == pytest.approx(1.0)
