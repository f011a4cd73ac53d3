"""One ONNX file does what the policy does, and is kept only then; damaged and foreign files are recognised."""

import json
import sys

import gymnasium
import numpy as np
import onnx
import pytest
import torch

import metarl
from metarl.deploy.onnx_export import config_hash
from metarl.errors import UserError
from metarl.evaluation.held_out import adapt_to
from metarl.runtime import OnnxPolicy, seal
from tests.agents.deployed import AGENTS, SPACES, make_episodes, make_policy, make_trials, walk


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Policies by name and whether they are adapted, each with its file; exported when first asked for."""
    made = {}

    def get(name, adapted=False):
        if (name, adapted) not in made:
            policy = make_policy(name)
            policy = policy.adapt(make_episodes()) if adapted else policy
            path = tmp_path_factory.mktemp(name) / "policy.onnx"
            policy.export(path)
            made[name, adapted] = policy, path
        return made[name, adapted]

    return get


def closed_loop(policy, other, steps):
    """Actions `[2, T, A]` of a policy whose observations and rewards follow from what it did, and of another one.

    Each remembers for itself, so that differences may add up in what they remember.
    """
    observation, states, reward = np.full(SPACES.observation_size, 0.3), [policy.reset(), other.reset()], None
    actions = []
    for step in range(steps):
        rest = np.array([step % 20 == 0]), True, reward
        both = [each.predict(observation, state, *rest) for each, state in zip((policy, other), states, strict=True)]
        taken, states = zip(*both, strict=True)
        observation = 2.0 + 3.0 * np.sin(np.arange(3) + 0.7 * observation + taken[0].sum())
        reward = float(np.cos(3.0 * taken[0].sum())) if step % 7 else None
        actions.append(taken)
    return np.array(actions).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("mlp", False),
        ("gru", True),
        pytest.param("meta_sgd", True, marks=pytest.mark.slow),
        pytest.param("lstm", False, marks=pytest.mark.slow),
        pytest.param("transformer", True, marks=pytest.mark.slow),
        pytest.param("episodic", True, marks=pytest.mark.slow),
    ],
)
def test_the_file_does_what_the_policy_does(exported, name, adapted):
    policy, path = exported(name, adapted)
    loaded = OnnxPolicy(path)
    trials = make_trials(batch=5)
    expected, theirs = walk(policy, trials)
    actions, ours = walk(loaded, trials)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    if policy.has_memory:  # the states are the same, so that one can go on where the other stopped
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        np.testing.assert_allclose(walk(loaded, trials, theirs)[0], walk(policy, trials, theirs)[0], atol=1e-5)
    ours, theirs = closed_loop(loaded, policy, 500)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.ptp(theirs, 0).max() > 0.1


def test_the_file_is_one_plain_onnx_model(exported):
    _, path = exported("gru", True)
    assert [each.name for each in path.parent.iterdir()] == ["policy.onnx"]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if each.domain == ""] == [18]
    assert not any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer)
    assert [each.name for each in model.graph.output] == ["actions", "next_state"]
    names = ["observations", "rewards", "episode_start", "state", "noise"]
    assert [each.name for each in model.graph.input] == names
    assert not [each for each in model.opset_import if each.domain not in ("", "ai.onnx")]  # any runtime knows them


def test_the_horizon_is_that_of_the_task_that_it_was_adapted_to():
    """Stages of 5 and of 7 steps: the last one's where no task is named, or one that does not say."""
    stages = [{"tasks": {"family": "navigation", "horizon": horizon}} for horizon in (5, 7)]
    spaces = metarl.types.Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    policy = make_policy("gru", spaces, agent={**AGENTS["gru"], "observation_entries": [0, 1]}, stages=stages)
    first = metarl.envs.distribution("navigation", name="goals", horizon=5).test_tasks[0]
    unsaid = metarl.Task("custom", "mine", "test", "mine", 0, 0)
    horizons = [policy._metadata(None, task, None)["trial"]["horizon"] for task in (first, None, unsaid)]
    assert horizons == [5, 7, 7]


def test_the_file_tells_what_it_is(tmp_path):
    tasks = metarl.envs.distribution("navigation", name="goals", horizon=5, num_train=2, num_test=2)
    spaces = metarl.types.Spaces(2, (-1.0, -1.0), (1.0, 1.0))
    stage = {"tasks": {"family": "navigation", "name": "goals", "horizon": 5}}
    policy = make_policy("gru", spaces, agent={**AGENTS["gru"], "observation_entries": [0, 1]}, stages=[stage])
    policy = adapt_to(policy, tasks.test_tasks[1])

    class Named(gymnasium.Wrapper):
        observation_names, action_names, dt = ("x", "y"), ("right", "up"), 0.05

        @property
        def unwrapped(self):
            return self

    env = Named(metarl.envs.make(tasks.test_tasks[1]))
    policy.export(tmp_path / "named.onnx", env, task=tasks.test_tasks[1])
    metadata = OnnxPolicy(tmp_path / "named.onnx").metadata
    assert metadata["observation_names"] == ["x", "y"] and metadata["action_names"] == ["right", "up"]
    assert metadata["control_period_s"] == 0.05 and metadata["adapted"] and metadata["agent"] == "rl2"
    assert metarl.Task.from_json(json.dumps(metadata["task"])) == tasks.test_tasks[1]
    assert (metadata["action_low"], metadata["action_high"]) == ([-1.0, -1.0], [1.0, 1.0])
    assert (
        metadata["config_sha256"] == config_hash(policy.config) and metadata["versions"]["torch"] == torch.__version__
    )
    assert metadata["reward"] == policy.controller.reward_scale and metadata["env_steps"] == 1000
    assert metadata["trial"] == {"episodes": 2, "horizon": 5}
    policy.export(tmp_path / "own.onnx")  # its run's own environment names them, too
    metadata = OnnxPolicy(tmp_path / "own.onnx").metadata
    assert (metadata["observation_names"], metadata["control_period_s"]) == (["position_x", "position_y"], None)
    Named.action_names = ("right",)
    with pytest.raises(ValueError, match="names 1 entries of its actions; the policy has 2"):
        policy.export(tmp_path / "wrong.onnx", env)
    for wrong, message in (
        (gymnasium.make("HalfCheetah-v5"), "the environment's observations have shape"),
        (
            gymnasium.wrappers.RescaleAction(env, np.float32(-0.5), np.float32(0.5)),
            "the environment's actions have",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            policy.export(tmp_path / "wrong.onnx", wrong)
    with pytest.raises(ValueError, match=r"control_period_s is -1\.0; expected more than 0"):
        policy.export(tmp_path / "wrong.onnx", control_period_s=-1.0)


def test_noise_is_left_out_or_given(exported):
    policy, path = exported("mlp", False)
    loaded = OnnxPolicy(path, seed=3)
    observations = make_trials()[0][0]
    mean, _ = loaded.predict(observations, deterministic=True)
    noise = np.random.default_rng(3).standard_normal((4, 2), np.float32)
    drawn, _ = loaded.predict(observations)
    with torch.inference_mode():
        expected = policy.controller(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    assert np.abs(drawn - mean).max() > 0.1
    one_row, _ = loaded.run(observations, noise=np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(one_row, mean)


@pytest.mark.parametrize("noisy", [True, False])
def test_a_model_that_differs_is_not_kept(tmp_path, monkeypatch, noisy):
    policy, path = make_policy("mlp"), tmp_path / "policy.onnx"
    path.write_bytes(b"the one before")
    run = OnnxPolicy.run

    def off(self, observations, state=None, episode_start=None, noise=None, rewards=None):
        actions, state = run(self, observations, state, episode_start, noise, rewards)
        return actions + np.float32(1e-4) * ((noise is not None) == noisy), state

    monkeypatch.setattr(OnnxPolicy, "run", off)
    with pytest.raises(RuntimeError, match=r"differs from torch by .*No file was written"):
        policy.export(path)
    assert path.read_bytes() == b"the one before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["onnxscript", "onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r'exporting needs \w+: pip install "metarl\[onnx\]"'):
        make_policy("mlp").export(tmp_path / "policy.onnx")


def test_the_comparison_looks_where_observations_lie():
    """The normaliser of these policies has moved: a weight that is wrong shows there, and elsewhere saturates."""
    mean, deviation = make_policy("mlp").controller.observation_scale
    np.testing.assert_allclose(mean, 2.0, rtol=1e-5)
    np.testing.assert_allclose(deviation, 3.0, rtol=1e-5)
    mean, deviation = make_policy("gru").controller.observation_scale
    assert (mean[1], deviation[1]) == (0.0, 1.0) and (mean[[0, 2]] != 0.0).all()  # entry 1 is not seen


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*policy\.onnx"):
        make_policy("mlp").export(tmp_path / "file" / "policy.onnx")


def test_any_damage_is_seen(exported):
    _, path = exported("mlp", False)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, 1, len(data) - 1, len(data) - 64, len(data) - 70, *rng.integers(0, len(data), 40)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="metarl export"):
            OnnxPolicy(bytes(damaged))
    for size in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="its hash is missing"):
            OnnxPolicy(data[:size])


def relabelled(path, change):
    """The file with other metadata, and a hash that fits."""
    model = onnx.load(path)
    metadata = json.loads(next(each.value for each in model.metadata_props if each.key == "metarl"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"metarl": json.dumps(change(metadata))})
    return seal(model.SerializeToString())


def test_foreign_and_newer_files_are_refused(exported, tmp_path):
    _, path = exported("mlp", False)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    foreign = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [output]), ir_version=8)
    (tmp_path / "foreign.onnx").write_bytes(foreign.SerializeToString())
    (tmp_path / "text.onnx").write_text("not a model " * 20)
    for name in ("foreign.onnx", "text.onnx"):
        with pytest.raises(ValueError, match=rf"{name} is not a complete file of `metarl export`"):
            OnnxPolicy(tmp_path / name)
    with pytest.raises(ValueError, match=r"elsewhere\.onnx refers to other files"):
        elsewhere = onnx.load(path)
        onnx.external_data_helper.convert_model_to_external_data(elsewhere, location="x.bin", size_threshold=0)
        (tmp_path / "elsewhere.onnx").write_bytes(seal(elsewhere.SerializeToString()))
        OnnxPolicy(tmp_path / "elsewhere.onnx")
    with pytest.raises(ValueError, match="is not a model of `metarl export`: KeyError"):
        OnnxPolicy(seal(foreign.SerializeToString()))
    with pytest.raises(ValueError, match="is not a model of `metarl export`"):
        OnnxPolicy(seal(b"no protobuf at all"))
    with pytest.raises(ValueError, match=r"has format 2; this metarl.runtime reads format 1"):
        OnnxPolicy(relabelled(path, lambda metadata: {**metadata, "format": 2}))
    with pytest.raises(ValueError, match="according to its metadata"):
        OnnxPolicy(relabelled(path, lambda metadata: {**metadata, "observation_size": 4}))
    with pytest.raises(ValueError, match="according to its metadata"):
        OnnxPolicy(relabelled(path, lambda metadata: {**metadata, "state_size": 5}))
    with pytest.raises(ValueError, match="has format 2"):  # whose metadata may have other keys
        OnnxPolicy(relabelled(path, lambda metadata: {"format": 2}))
    OnnxPolicy(relabelled(path, lambda metadata: metadata))  # an unchanged file can be read


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"observation": {"x": 1.0}}, "observation has dtype object; expected numbers"),
        ({"observation": ["0", "1", "2"]}, "observation has dtype <U1; expected numbers"),
        ({"observation": np.zeros(4)}, r"observation has shape \(4,\); expected \(3,\) or \(batch, 3\)"),
        ({"observation": [0.0, float("nan"), 0.0]}, "observation contains NaN or infinity"),
        ({"reward": np.inf}, "reward is infinite"),
        ({"reward": np.zeros(2)}, r"reward has shape \(2,\); expected one value for each of 1 observation"),
        ({"episode_start": np.zeros(2, bool)}, r"episode_start has shape \(2,\)"),
        ({"state": np.zeros((1, 3), np.float32)}, r"state has shape \(1, 3\); expected \(1, "),
        ({"state": np.full((1, 16), np.nan, np.float32)}, "state does not come from predict"),
    ],
)
def test_bad_input_is_told_in_a_line(exported, inputs, message):
    _, path = exported("gru", True)
    with pytest.raises(ValueError, match=message):
        OnnxPolicy(path).predict(**{"observation": np.zeros(3), **inputs})
