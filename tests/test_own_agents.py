"""The doors from outside: the agent of docs/own_agents.md, others that store data or do not adapt, a collector."""

import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metarl
from metarl.build import local_collectors
from metarl.collect import collect
from metarl.errors import UserError
from metarl.runtime import OnnxPolicy

PAGE = Path(__file__).parents[1] / "docs" / "own_agents.md"
GOALS = {"tasks": {"family": "navigation", "name": "goals", "horizon": 6, "num_test": 4}, "iterations": 4}
SMALL = {"num_tasks": 3, "rollouts_per_task": 2, "num_workers": 0, "evaluation": {"num_tasks": 2}, "stages": [GOALS]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The module that the page shows."""
    path = tmp_path_factory.mktemp("page") / "context_agent.py"
    path.write_text(PAGE.read_text().split('```python title="context_agent.py"\n')[1].split("```")[0])
    spec = importlib.util.spec_from_file_location("context_agent", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["context_agent"] = module  # so that its agents pickle
    spec.loader.exec_module(module)
    yield module
    del sys.modules["context_agent"]


def lines(run_dir):
    """What a run has tracked, but for the clock."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in found]


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.slow
def test_the_agent_of_the_page_learns_to_infer_goals(page, tmp_path):
    stage = {"tasks": {"family": "navigation", "name": "goals", "horizon": 20}, "iterations": 60}
    settings = {"num_tasks": 20, "rollouts_per_task": 10, "num_workers": 0, "stages": [stage]}
    run = metarl.train(settings, agent=page.ContextAgent, run_dir=tmp_path / "run")
    aggregate = metarl.evaluate(run.policy, metarl.envs.distribution("navigation", horizon=20).test_tasks[:20])[
        "aggregate"
    ]
    # Staying at the origin, without knowing the goal, returns −7.7 on average; an agent that ignores its context, too.
    assert aggregate["return_post"]["mean"] > -5.0 > aggregate["return_pre"]["mean"] + 1.0
    assert aggregate["untrained_return_post"]["mean"] < -7.0


def test_it_resumes_bit_for_bit(page, tmp_path):
    whole = metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "whole")
    metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "cut", max_iterations=2)
    resumed = metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "cut", resume=True)
    assert_equal_states(resumed.policy.agent.state_dict(), whole.policy.agent.state_dict())
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_it_is_evaluated_adapted_saved_exported_and_played(page, tmp_path):
    metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "run")
    agent = metarl.load(tmp_path / "run", agent=page.ContextAgent)
    tasks = metarl.envs.distribution(
        "navigation", **{k: v for k, v in GOALS["tasks"].items() if k != "family"}
    ).test_tasks
    report = metarl.evaluate(agent, tasks, seed=1)
    assert report["adapts_by"] == "inference" and len(report["phases"]) == 2
    assert "untrained_return_post" in report["aggregate"]
    env = metarl.envs.make(tasks[0])
    policy = agent.adapt(agent.record(env, episodes=2))
    assert policy.adapted and not torch.equal(policy.state, agent.state)
    with pytest.raises(UserError, match="to_sb3 does not support custom"):
        metarl.to_sb3(policy, env)
    policy.save(tmp_path / "policy")
    loaded = metarl.load(tmp_path / "policy", agent=page.ContextAgent)
    policy.export(tmp_path / "policy.onnx")
    observation, _ = env.reset(seed=0)
    actions = [each.predict(observation, deterministic=True)[0] for each in (policy, loaded)]
    actions.append(OnnxPolicy(tmp_path / "policy.onnx").predict(observation, deterministic=True)[0])
    np.testing.assert_array_equal(actions[0], actions[1])
    np.testing.assert_allclose(actions[0], actions[2], atol=1e-5)
    shown = metarl.play.play(agent, metarl.envs.make(tasks[0], render_mode="rgb_array"))
    assert shown.adapted_by == "inferred from 2 episodes" and len(shown.after.frames) > 1


def test_what_needs_the_builder_asks_for_it(page, tmp_path):
    metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "run", max_iterations=1)
    for call in (
        lambda: metarl.load(tmp_path / "run"),
        lambda: metarl.train({**SMALL, "agent": {"name": "custom"}}, run_dir=tmp_path / "other"),
        lambda: metarl.train(tmp_path / "run" / "config.yaml", run_dir=tmp_path / "run", resume=True),
    ):
        with pytest.raises(UserError, match="the run has a custom agent: give the function that builds it"):
            call()
    metarl.train(SMALL, run_dir=tmp_path / "built_in", max_iterations=1)
    with pytest.raises(UserError, match="the run has the built-in agent maml_ppo; leave out agent="):
        metarl.load(tmp_path / "built_in", agent=page.ContextAgent)


def test_stability_methods_name_what_an_agent_lacks(page, tmp_path):
    with pytest.raises(UserError, match="the agent has no log_prob and no policy_jacobians and no replay_policy"):
        metarl.train({**SMALL, "stability": ["ewc"]}, agent=page.ContextAgent, run_dir=tmp_path / "run")


def test_a_sequence_of_stages_needs_no_stability_members(page, tmp_path):
    stages = [{**GOALS, "name": name, "iterations": 1} for name in ("first", "second")]
    run = metarl.train({**SMALL, "stages": stages}, agent=page.ContextAgent, run_dir=tmp_path / "run")
    assert run.finished and len(run.report["continual"]["scores_post"]) == 3


def test_one_run_starts_from_another_with_a_custom_agent(page, tmp_path):
    first = metarl.train(SMALL, agent=page.ContextAgent, run_dir=tmp_path / "first")
    settings = {**SMALL, "seed": 1, "stages": [{**GOALS, "init_from": str(tmp_path / "first")}]}
    begun = metarl.train(settings, agent=page.ContextAgent, run_dir=tmp_path / "second", should_stop=lambda: True)
    parts = [
        {k: v for k, v in run.policy.agent.state_dict().items() if k.startswith("policy.")} for run in (first, begun)
    ]
    assert_equal_states(*parts)


# Agents that do not adapt


def test_an_agent_that_does_not_adapt_is_evaluated_in_one_phase(page, tmp_path):
    class Fixed(page.ContextAgent):
        adapts_by, adaptation_steps, training_adaptation_steps = "nothing", 0, 0

        def update(self, tasks, rollouts, auxiliary_loss=None):
            return super().update(tasks, [rollouts[0], rollouts[0]])

    run = metarl.train(SMALL, agent=Fixed, run_dir=tmp_path / "run")
    aggregate = run.report["aggregate"]
    assert len(run.report["phases"]) == 1 and aggregate["return_pre"] == aggregate["return_post"]
    env = metarl.envs.make(metarl.envs.distribution("navigation", horizon=6).test_tasks[0], render_mode="rgb_array")
    with pytest.raises(ValueError, match="custom does not adapt; use the policy as it is"):
        run.policy.adapt(run.policy.record(env, episodes=1))
    with pytest.raises(UserError, match="does not adapt"):
        metarl.play.play(run.policy, env)


# Which tasks, and what is stored


class Remembering:
    """Wraps an agent's update: stores the rewards of each iteration in a file of its own, by task."""

    def __init__(self, agent):
        self.agent, self.kept, self.written, self.tasks = agent, [], 0, []

    def __getattr__(self, name):
        return getattr(self.agent, name)

    def update(self, tasks, rollouts, auxiliary_loss=None):
        self.tasks.append([task.index for task in tasks])
        self.kept.append(rollouts[-1].rewards.clone())
        return self.agent.update(tasks, rollouts, auxiliary_loss)

    def state_dict(self):
        return {**self.agent.state_dict(), "kept": torch.tensor(len(self.kept))}

    def load_state_dict(self, state):
        self.agent.load_state_dict(state)
        del self.kept[int(state["kept"]) :]

    def save_data(self, store):
        for number in range(self.written, len(self.kept)):
            store.write(f"rewards_{number}", {"rewards": self.kept[number]})
        self.written = len(self.kept)
        return [f"rewards_{number}" for number in range(len(self.kept))]

    def load_data(self, store, names):
        self.kept, self.written = [store.read(name)["rewards"] for name in names], len(names)


@pytest.fixture
def remembering(page):
    made = []

    def build(spec):
        made.append(Remembering(page.ContextAgent(spec)))
        return made[-1]

    return build, made


def test_update_gets_the_tasks_of_its_rollouts(remembering, tmp_path):
    build, made = remembering
    spied = []

    def collectors(config, distributions):
        (collector,) = local_collectors(config, distributions)
        inner = collector.collect
        collector.collect = lambda agent, state, tasks, *rest: (
            spied.append([task.index for task in tasks]) or inner(agent, state, tasks, *rest)
        )
        return [collector]

    settings = {**SMALL, "evaluation": {"num_tasks": 2, "every_iterations": 0}}
    metarl.train(settings, agent=build, collectors=collectors, run_dir=tmp_path / "run")
    # Two calls of collect an iteration, K + 1, then those of the last evaluation.
    assert made[0].tasks == spied[0:8:2] == spied[1:8:2] and len(made[0].tasks) == 4


def test_stored_data_is_written_once_and_resumed(remembering, tmp_path):
    build, made = remembering
    settings = {**SMALL, "checkpoint_every_iterations": 1, "keep_checkpoints": 1, "keep_best_checkpoints": 0}
    metarl.train(settings, agent=build, run_dir=tmp_path / "whole")
    metarl.train(settings, agent=build, run_dir=tmp_path / "cut", max_iterations=2)
    data = tmp_path / "cut" / "data"
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.iterdir()}
    assert sorted(before) == ["rewards_0.safetensors", "rewards_1.safetensors"]
    (data / "rewards_7.safetensors").write_bytes(b"left by a killed process")
    metarl.train(settings, agent=build, run_dir=tmp_path / "cut", resume=True)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.iterdir()}
    assert len(after) == 4 and before.items() <= after.items()
    kept, whole = made[-1].kept, made[0].kept
    assert len(kept) == 4 and all(torch.equal(*pair) for pair in zip(kept, whole, strict=True))


def test_an_iteration_that_is_undone_forgets_what_it_stored(remembering, tmp_path):
    build, made = remembering

    class Breaking(Remembering):
        def update(self, tasks, rollouts, auxiliary_loss=None):
            metrics = super().update(tasks, rollouts, auxiliary_loss)
            if len(self.tasks) == 2:
                raise FloatingPointError("broken on purpose")
            return metrics

    def broken(spec):
        made.append(Breaking(build(spec).agent))
        return made[-1]

    run = metarl.train(SMALL, agent=broken, run_dir=tmp_path / "run")
    assert run.finished and len(made[-1].kept) == 3 and len(made[-1].tasks) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_data_is_named(remembering, tmp_path, damage):
    build, _ = remembering
    metarl.train(SMALL, agent=build, run_dir=tmp_path / "run", max_iterations=2)
    path = tmp_path / "run" / "data" / "rewards_1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(UserError, match=r"000002: its data cannot be loaded: .*rewards_1.safetensors"):
        metarl.train(SMALL, agent=build, run_dir=tmp_path / "run", resume=True)
    metarl.load(tmp_path / "run", agent=build)  # acting needs no stored data


# A collector elsewhere


def collect_from_bytes(config, tasks, message):
    """What another machine does: builds its own environments, acts with the snapshot that it was sent."""
    actor, *rest = pickle.loads(message)
    (collector,) = local_collectors(config, [tasks])
    try:
        return collect(collector.envs, actor, *rest)
    finally:
        collector.close()


class Elsewhere:
    """A `Collector` that acts in another process, with an actor that went through pickle."""

    restarts, max_tasks = 0, 100

    def __init__(self, config, tasks):
        self.config, self.tasks, self.sent = config, tasks, []
        self.pool = multiprocessing.get_context("spawn").Pool(1)

    def collect(self, agent, state, tasks, rollouts_per_task, seeds):
        message = pickle.dumps((agent.actor(), state, tasks, rollouts_per_task, seeds))
        self.sent.append(len(message))
        return self.pool.apply(collect_from_bytes, (self.config, self.tasks, message)).to(agent.device)

    def close(self):
        self.pool.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("agent", [{"hidden_sizes": [8]}, {"name": "rl2"}], ids=["maml_ppo", "rl2"])
def test_another_process_collects_the_same_numbers(agent, tmp_path):
    settings, made = {**SMALL, "agent": agent}, []
    here = metarl.train(settings, run_dir=tmp_path / "here")

    def collectors(config, distributions):
        made.append(Elsewhere(config, distributions[0]))
        return made

    there = metarl.train(settings, collectors=collectors, run_dir=tmp_path / "there")
    assert_equal_states(there.policy.agent.state_dict(), here.policy.agent.state_dict())
    assert lines(tmp_path / "there") == lines(tmp_path / "here") and made[0].sent


@pytest.mark.parametrize("agent", [{"hidden_sizes": [8]}, {"name": "rl2", "memory": {"name": "transformer"}}])
def test_an_actor_is_a_snapshot(agent, tmp_path):
    run = metarl.train({**SMALL, "agent": agent}, run_dir=tmp_path / "run", max_iterations=1)
    agent, tasks = run.policy.agent, metarl.envs.distribution("navigation", horizon=6).train_tasks[:3]
    (collector,) = local_collectors(run.policy.config, [metarl.envs.distribution("navigation", horizon=6)])
    state, seeds = copy.deepcopy(agent.initial_state(3)), [np.random.SeedSequence(i) for i in range(3)]
    actor = pickle.loads(pickle.dumps(agent.actor()))
    before = collect(collector.envs, actor, state, tasks, 2, seeds)
    direct = collect(collector.envs, agent, state, tasks, 2, seeds)
    with torch.no_grad():
        for value in agent.parameters().values():
            value.add_(0.3)
    after = collect(collector.envs, actor, state, tasks, 2, seeds)
    for field in dataclasses.fields(before):
        parts = [getattr(rollout, field.name) for rollout in (before, direct, after)]
        assert torch.equal(parts[0].nan_to_num(), parts[1].nan_to_num()), field.name
        assert torch.equal(parts[0].nan_to_num(), parts[2].nan_to_num()), field.name
