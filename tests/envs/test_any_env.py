"""Environments with every kind of space: trained, resumed, evaluated, adapted, exported."""

import numpy as np
import pytest

import metarl
from metarl.envs.vector.serial import make_envs
from metarl.runtime import OnnxPolicy
from metarl.spaces import CheckedEnv
from tests.envs.any_env import ACTIONS, OBSERVATIONS, SIZES, tasks_of

AGENTS = {
    "maml_ppo": {"hidden_sizes": [8], "critic": "learned", "encoder": {"size": 8}},
    "rl2": {"memory": {"size": 8}, "encoder_sizes": [8], "encoder": {"size": 8}},
}
PAIRS = [(observations, "box") for observations in OBSERVATIONS] + [("vector", actions) for actions in ACTIONS]
PAIRS += [("image", "discrete"), ("dict", "multi_discrete")]


def settings(agent):
    stage = {"tasks": {"family": "custom"}, "iterations": 2}
    sizes = {"num_tasks": 4, "rollouts_per_task": 3, "num_workers": 0}
    return {"agent": {"name": agent, **AGENTS[agent]}, "stages": [stage], **sizes}


@pytest.mark.parametrize(("observations", "actions"), PAIRS)
@pytest.mark.parametrize("agent", AGENTS)
def test_every_space_is_trained_on_and_exported(agent, observations, actions, tmp_path):
    tasks = tasks_of(observations, actions)
    run = metarl.train(settings(agent), tasks, run_dir=tmp_path / "run")
    assert run.finished
    policy = metarl.load(tmp_path / "run")
    assert policy.spaces.observation_size == SIZES[observations]
    env = tasks.make(tasks.test_tasks[0])
    recorded = policy.record(env, 2)  # asserts that its actions lie in the space
    adapted = policy.adapt(recorded)
    path = tmp_path / "policy.onnx"
    adapted.export(path, env=env)
    exported = OnnxPolicy(path, seed=0)
    checked, state, theirs = CheckedEnv(env), None, None
    observation = checked.reset(seed=3)
    for step in range(4):
        start = np.array([step == 0])
        action, state = adapted.predict(observation, state, start, deterministic=True, reward=0.5)
        other, theirs = exported.predict(observation, theirs, start, deterministic=True, reward=0.5)
        np.testing.assert_allclose(action, other, atol=1e-5)
        assert action.shape == env.action_space.shape and action.dtype == other.dtype
        drawn, _ = exported.predict(observation, theirs, start, reward=0.5)
        assert env.action_space.contains(drawn.astype(env.action_space.dtype)) or actions == "shifted"
        observation = checked.step_raw(checked.env_action(policy.spaces.to_policy(action).reshape(-1))).observation


@pytest.mark.parametrize(("observations", "actions"), [("dict", "multi_discrete"), ("image", "discrete")])
def test_workers_equal_one_process_to_the_bit(observations, actions):
    tasks = tasks_of(observations, actions)
    rows, active = slice(0, 3), np.ones(3, bool)
    found = []
    for workers in (0, 2):
        envs = make_envs(tasks, 3, workers)
        parts = [envs.reset(tasks.train_tasks[:3], np.arange(3, dtype=np.uint32)).copy()]
        envs.step_async(rows, np.ones((3, envs.spaces.action_size), np.float32), active)
        parts += [part.copy() for part in envs.step_wait(rows)]
        envs.close()
        found.append(parts)
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[0][0].dtype == (np.uint8 if observations == "image" else np.float64)


def test_an_observation_is_flattened_in_the_order_of_its_space():
    env = CheckedEnv(tasks_of("dict").make(tasks_of("dict").train_tasks[0]))
    assert env.spaces.observation_parts == (("goal", 2), ("arm.joint", 2), ("mode", 3))
    parts = {"mode": 1, "goal": np.float32([0.1, 0.2]), "arm": {"joint": np.array([[0.3], [0.4]])}}
    env.env.unwrapped._observation = lambda: parts
    np.testing.assert_allclose(env.reset(0), [0.1, 0.2, 0.3, 0.4, 0, 1, 0], rtol=1e-6)


def test_a_dictionary_is_predicted_on_as_it_is(tmp_path):
    policy = metarl.train(settings("maml_ppo"), tasks_of("dict"), run_dir=tmp_path / "run").policy
    flat = np.arange(7) / 10
    parts = {"arm.joint": flat[None, 2:4], "goal": flat[None, :2], "mode": flat[None, 4:]}
    action, _ = policy.predict(parts, deterministic=True)
    np.testing.assert_array_equal(action, policy.predict(flat[None], deterministic=True)[0])
    with pytest.raises(ValueError, match="observation has the parts"):
        policy.predict({"goal": flat[:2]})
