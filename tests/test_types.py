"""Tasks as JSON, recorded trajectories, what a rollout says of its episodes, and what an import loads."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from metarl.types import Rollout, Task, Trajectory

TASK = Task("metaworld", "ML10", "test", "reach-v3", 7, 3, (("horizon", 500), ("hidden", True), ("scale", 0.1)))


def test_json_round_trip():
    assert Task.from_json(TASK.to_json()) == TASK
    assert json.loads(TASK.to_json()) == {
        "family": "metaworld",
        "benchmark": "ML10",
        "split": "test",
        "name": "reach-v3",
        "index": 7,
        "seed": 3,
        "options": {"hidden": True, "horizon": 500, "scale": 0.1},
    }
    plain = Task("toy", "Toy", "train", "toy", 0, 0)
    assert Task.from_json(plain.to_json()) == plain


def test_the_order_of_options_does_not_matter():
    again = Task("metaworld", "ML10", "test", "reach-v3", 7, 3, {"scale": 0.1, "hidden": True, "horizon": 500})
    assert again == TASK
    assert hash(again) == hash(TASK)
    assert again.to_json() == TASK.to_json()
    assert again.options == (("hidden", True), ("horizon", 500), ("scale", 0.1))
    assert again.option("horizon") == 500
    with pytest.raises(KeyError, match="gravity"):
        again.option("gravity")


@pytest.mark.parametrize(
    "change",
    [
        {"family": "mujoco"},
        {"benchmark": "ML45"},
        {"split": "train"},
        {"name": "push-v3"},
        {"index": 8},
        {"seed": 4},
        {"options": {"horizon": 501, "hidden": True, "scale": 0.1}},
    ],
)
def test_every_field_tells_tasks_apart(change):
    other = Task.from_json(json.dumps({**json.loads(TASK.to_json()), **change}))
    assert other != TASK
    assert len({TASK, other}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"family": "toy"}',
        TASK.to_json().replace('"seed"', '"sed"'),
        TASK.to_json().replace('"index": 7', '"index": 7, "goal": 1'),
        TASK.to_json().split(', "options"')[0] + ', "options": 5}',
    ],
)
def test_bad_json_is_named(text):
    with pytest.raises(ValueError, match=r"not a task: .*Task\.to_json"):
        Task.from_json(text)


def trajectory(**changes):
    """Three steps, O = 2, A = 1."""
    fields = {
        "observations": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
        "actions": [[0.0], [1.0], [2.0]],
        "rewards": [1, 2, 3],
        "terminated": [False, False, True],
        "truncated": [0, 0, 0],
        "log_probs": [-1.0, -2.0, -3.0],
    }
    return Trajectory(**{**fields, **changes})


def test_a_trajectory_becomes_arrays():
    recorded = trajectory()
    assert recorded.observations.shape == (3, 2)
    assert recorded.actions.shape == (3, 1)
    assert (recorded.rewards.dtype, recorded.log_probs.dtype) == (np.float64, np.float64)
    assert (recorded.terminated.dtype, recorded.truncated.dtype) == (np.bool_, np.bool_)
    assert recorded.terminated.tolist() == [False, False, True]
    assert trajectory(log_probs=None).log_probs is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("observations", [0.0, 1.0, 2.0]),
        ("observations", np.zeros((3, 2, 2))),
        ("actions", [0.0, 1.0, 2.0]),
        ("rewards", [[1.0], [2.0], [3.0]]),
        ("rewards", 1.0),
        ("log_probs", np.zeros((3, 1))),
        ("terminated", [[False], [False], [True]]),
        ("truncated", False),
    ],
)
def test_a_wrong_shape_is_named(field, value):
    with pytest.raises(ValueError, match=rf"trajectory\.{field} has shape .*expected [12] dimension"):
        trajectory(**{field: value})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "log_probs"])
def test_numbers_that_are_not_finite_are_named(field, bad):
    value = np.array(getattr(trajectory(), field))
    value[-1] = bad
    with pytest.raises(ValueError, match=rf"trajectory\.{field} holds NaN or infinity"):
        trajectory(**{field: value})


@pytest.mark.parametrize("field", ["observations", "actions", "terminated", "truncated", "log_probs"])
def test_a_wrong_length_is_named(field):
    with pytest.raises(ValueError, match=rf"trajectory\.{field} has 2 steps, rewards has 3"):
        trajectory(**{field: getattr(trajectory(), field)[:2]})


def test_an_empty_trajectory_is_refused():
    with pytest.raises(ValueError, match="trajectory is empty"):
        Trajectory(np.zeros((0, 2)), np.zeros((0, 1)), [], [], [])


def rollout(valid, rewards, success):
    """One task, the episodes given row by row."""
    valid, rewards, success = torch.tensor([valid]).bool(), torch.tensor([rewards]), torch.tensor([success])
    nothing = torch.zeros_like(valid)
    vector = torch.zeros(*valid.shape, 1)
    return Rollout(vector, vector, vector, rewards, rewards, nothing, nothing, nothing, valid, success)


def test_returns_and_steps_by_hand():
    # 1 + 2 + 4 = 7; 3 with its padding left out, whatever it holds; dropped.
    recorded = rollout(
        [[1, 1, 1], [1, 0, 0], [0, 0, 0]], [[1.0, 2.0, 4.0], [3.0, 9.0, 9.0], [9.0] * 3], [[0.0] * 3] * 3
    )
    torch.testing.assert_close(
        recorded.episode_returns(), torch.tensor([[[7.0], [3.0], [float("nan")]]]), equal_nan=True
    )
    assert recorded.env_steps == 4


def test_success_counts_at_any_step():
    nan = float("nan")
    recorded = rollout(
        [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]],
        [[0.0] * 3] * 6,
        # in the middle; never; at the end; only in the padding; undefined; dropped
        [[0.0, 1.0, 0.0], [0.0] * 3, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [nan] * 3, [0.0] * 3],
    )
    expected = torch.tensor([[1.0, 0.0, 1.0, 0.0, nan, nan]])
    torch.testing.assert_close(recorded.episode_success(), expected[..., None], equal_nan=True)


def test_map_and_to_reach_every_tensor():
    recorded = rollout([[1, 1]], [[1.0, 2.0]], [[0.0, 0.0]])
    doubled = recorded.map(lambda tensor: torch.cat([tensor, tensor]))
    for name, tensor in vars(doubled).items():
        assert len(tensor) == 2, name
    assert all(tensor.device.type == "meta" for tensor in vars(recorded.to("meta")).values())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("metarl", {"torch", "gymnasium", "mujoco", "metaworld"}),
        ("metarl.types", {"torch", "gymnasium", "mujoco", "metaworld"}),
        ("metarl.envs", {"torch"}),
        ("metarl.envs.vector.serial", {"torch"}),
    ],
)
def test_an_import_does_not_load_what_it_does_not_need(module, absent, tmp_path):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & absent
