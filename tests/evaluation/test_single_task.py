"""Single-task references: what a report holds, what the cache keeps, and that nothing leaks into the process."""

import copy
import json
import pickle
import random

import gymnasium
import numpy as np
import pytest
import torch

import metarl.envs
from metarl.cli import main
from metarl.errors import UserError
from metarl.evaluation import single_task as baseline
from metarl.evaluation.single_task import HYPERPARAMETERS, reference
from metarl.types import Task

TASKS = metarl.envs.distribution("navigation", name="goals", horizon=5).test_tasks


@pytest.fixture
def small(monkeypatch):
    """Algorithms that take less than a second a task."""
    for algorithm, changes in (
        ("ppo", {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}),
        ("sac", {"batch_size": 8, "policy_kwargs": {"net_arch": [8]}}),
    ):
        monkeypatch.setitem(HYPERPARAMETERS, algorithm, {**HYPERPARAMETERS[algorithm], **changes})


@pytest.fixture
def trained(monkeypatch):
    """The tasks that are trained on, in order; training itself is replaced by a made-up curve."""
    calls = []

    def train(task, setting, make):
        calls.append(task)
        env_steps = [0, setting["env_steps"]]
        return baseline._Curve(env_steps=env_steps, returns=[-2.0, float(task.index)], success=[0.0, None])

    monkeypatch.setattr(baseline, "_train", train)
    return calls


BOX = gymnasium.spaces.Box(-1.0, 1.0, (1,))


class Constant(gymnasium.Env):
    """Reward 1 a step for ever, solved at the second step only; some episodes diverge at the third."""

    observation_space = BOX

    def __init__(self, diverging=0.0, success=True, actions=BOX):
        self.diverging, self.success, self.action_space = diverging, success, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed, self.breaks = 0, self.np_random.random() < self.diverging
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        if self.breaks and self.elapsed == 3:
            raise FloatingPointError
        info = {"success": float(self.elapsed == 2)} if self.success else {}
        return np.zeros(1, np.float32), 1.0, False, False, info


OWN = Task("mine", "mine", "test", "mine", 0, 0, {"horizon": 5})


# The report


@pytest.mark.parametrize(
    ("algorithm", "env_steps", "curve_env_steps"),
    [
        ("ppo", 100, [0, 32, 64, 96, 128]),  # whole rollouts of 32
        ("ppo", 640, [0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640]),
        ("sac", 110, [0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 110]),
    ],
)
def test_a_report_holds_each_task_and_all_together(small, algorithm, env_steps, curve_env_steps):
    reported = []
    report = reference(
        TASKS[:2], algorithm, env_steps, eval_episodes=2, seed=3, progress=lambda *said: reported.append(said)
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["algorithm"], report["env_steps"], report["eval_episodes"], report["seed"]) == (
        *(algorithm, curve_env_steps[-1]),
        *(2, 3),
    )
    assert report["hyperparameters"] == HYPERPARAMETERS[algorithm]
    assert set(report["versions"]) >= {"stable-baselines3", "torch", "gymnasium", "mujoco", "metaworld"}
    assert [Task.from_json(json.dumps(row["task"])) for row in report["tasks"]] == TASKS[:2]
    assert reported == list(enumerate(report["tasks"], 1))
    for row, task in zip(report["tasks"], TASKS, strict=False):
        curve = row["curve"]
        assert (row["name"], row["index"]) == ("goals", task.index)
        assert curve["env_steps"] == curve_env_steps
        assert len(curve["returns"]) == len(curve["success"]) == len(curve_env_steps)
        assert (row["return_untrained"], row["return_final"]) == (curve["returns"][0], curve["returns"][-1])
        assert (row["success_untrained"], row["success_final"]) == (curve["success"][0], curve["success"][-1])
        assert len(set(curve["returns"])) > 1  # training changes the agent
    for measure in ("return_untrained", "return_final", "success_untrained", "success_final"):
        aggregate = report["aggregate"][measure]
        first, second = (row[measure] for row in report["tasks"])
        assert aggregate["mean"] == pytest.approx((first + second) / 2, rel=1e-12)
        assert aggregate["ci95"] == pytest.approx(sorted((first, second)))
        assert "iqm" in aggregate


def test_returns_and_success_are_those_of_whole_episodes(small):
    """Five steps of reward 1, solved at the second: return 5 and success 1, though it does not last."""
    report = reference([OWN], env_steps=64, eval_episodes=3, make=lambda task: Constant())
    assert report["tasks"][0]["curve"] == {"env_steps": [0, 32, 64], "returns": [5.0] * 3, "success": [1.0] * 3}


def test_undefined_success_is_null_and_no_part_of_the_aggregate(small):
    report = reference([OWN], env_steps=32, eval_episodes=2, make=lambda task: Constant(success=False))
    assert report["tasks"][0]["curve"]["success"] == [None, None]
    assert report["tasks"][0]["success_final"] is None
    assert report["aggregate"].keys() == {"return_untrained", "return_final"}


def test_episodes_that_diverge_are_left_out(small):
    """A fifth of the episodes would have return 2; training has some of them, too, and goes on."""
    broken = []

    class Noted(Constant):
        def step(self, action):
            if self.breaks and self.elapsed == 2:
                broken.append(self)
            return super().step(action)

    report = reference([OWN], env_steps=320, eval_episodes=20, make=lambda task: Noted(diverging=0.2))
    assert report["tasks"][0]["curve"]["returns"] == [5.0] * 11
    assert len(set(broken)) == 2  # in the environment of training and in that of evaluation
    with pytest.raises(RuntimeError, match="20 of 20 episodes of an evaluation diverged"):
        reference([OWN], env_steps=32, eval_episodes=20, make=lambda task: Constant(diverging=1.0))


def test_ppo_learns_to_go_to_the_goal(monkeypatch):
    """Ten steps that begin 0.43 from the goal: −4.3 for standing still, about −2.5 for what PPO learns."""
    monkeypatch.setitem(HYPERPARAMETERS["ppo"], "n_steps", 256)
    task = metarl.envs.distribution("navigation", name="goals", horizon=10).test_tasks[0]
    np.testing.assert_allclose(np.linalg.norm(metarl.envs.navigation.goal(task)), 0.4315, atol=1e-4)
    row = reference([task], env_steps=1280)["tasks"][0]
    assert row["return_untrained"] < -4.0
    assert row["return_final"] > -3.2


# Randomness


def states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads()


def test_global_random_streams_and_threads_are_left_as_they_were(small):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = states()
        reference(TASKS[:1], env_steps=64, eval_episodes=1)
        assert states() == before
        with pytest.raises(RuntimeError, match="diverged"):
            reference([OWN], env_steps=32, eval_episodes=1, make=lambda task: Constant(diverging=1.0))
        assert states() == before
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("in_use", [True, False])
def test_only_gpus_in_use_are_asked_for_their_streams(monkeypatch, in_use):
    """Another one would give several hundred MB to each process that trains on the CPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    with baseline._seeded(0):
        pass
    assert asked == ([0, 1] if in_use else [])


@pytest.mark.parametrize(("algorithm", "env_steps"), [("ppo", 96), ("sac", 120)])
def test_equal_seeds_give_equal_results(small, algorithm, env_steps):
    first = reference(TASKS[:2], algorithm, env_steps, eval_episodes=2, seed=1)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert reference(TASKS[:2], algorithm, env_steps, eval_episodes=2, seed=1) == first
    alone = reference(TASKS[1:2], algorithm, env_steps, eval_episodes=2, seed=1)
    assert alone["tasks"] == first["tasks"][1:]  # neither the place in the list nor the other tasks matter
    other = reference(TASKS[:2], algorithm, env_steps, eval_episodes=2, seed=2)
    for row, theirs in zip(first["tasks"], other["tasks"], strict=True):
        assert row["return_untrained"] != theirs["return_untrained"]
        assert row["return_final"] != theirs["return_final"]


def test_each_seed_and_task_has_a_network_of_its_own(small, monkeypatch):
    """Evaluations draw random numbers, too; here they are left out, and the weights are what is compared."""

    def weights(agent, env, seeds):
        return float(sum(value.abs().sum() for value in agent.policy.state_dict().values())), None

    monkeypatch.setattr(baseline, "_evaluate", weights)
    curves = [
        row["curve"]["returns"] for seed in (1, 2) for row in reference(TASKS[:2], env_steps=32, seed=seed)["tasks"]
    ]
    assert len({first for first, _ in curves}) == len({last for _, last in curves}) == 4
    assert curves[:2] == [row["curve"]["returns"] for row in reference(TASKS[:2], env_steps=32, seed=1)["tasks"]]


@pytest.mark.parametrize(("algorithm", "env_steps"), [("ppo", 320), ("sac", 200)])
def test_evaluating_more_often_does_not_change_training(small, monkeypatch, algorithm, env_steps):
    often = reference(TASKS[:1], algorithm, env_steps, eval_episodes=2)["tasks"][0]
    monkeypatch.setattr(baseline, "CURVE_POINTS", 1)
    once = reference(TASKS[:1], algorithm, env_steps, eval_episodes=2)["tasks"][0]
    assert len(once["curve"]["returns"]) == 2 and len(often["curve"]["returns"]) == 11
    assert once["return_final"] == often["return_final"] != once["return_untrained"]


def test_nothing_is_left_in_the_folder_for_temporary_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reference(TASKS[:1], env_steps=32, eval_episodes=1)
    assert list(tmp_path.iterdir()) == []


# The cache


def test_a_second_call_does_not_train(small, tmp_path, monkeypatch):
    first = reference(TASKS[:2], env_steps=32, eval_episodes=1, cache=tmp_path / "below" / "cache")
    files = list((tmp_path / "below" / "cache").iterdir())
    assert len(files) == 2 and all(json.loads(path.read_text()) for path in files)
    monkeypatch.setattr(baseline, "_train", None)
    assert reference(TASKS[:2], env_steps=32, eval_episodes=1, cache=tmp_path / "below" / "cache") == first
    with pytest.raises(TypeError):  # without a cache
        reference(TASKS[:2], env_steps=32, eval_episodes=1)


@pytest.mark.parametrize(("algorithm", "env_steps"), [("ppo", 32), ("sac", 101)])
def test_training_does_not_change_what_names_a_finished_task(small, tmp_path, caplog, algorithm, env_steps):
    """SAC adds `use_sde` to the settings of its networks; the next process begins without it."""
    before = copy.deepcopy(HYPERPARAMETERS)
    settings = {"algorithm": algorithm, "env_steps": env_steps, "eval_episodes": 1, "cache": tmp_path}
    first = reference(TASKS[:2], **settings)
    assert before == HYPERPARAMETERS
    assert reference(TASKS[:2], **settings) == first
    assert len(list(tmp_path.iterdir())) == 2 and not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        {"env_steps": 4097},  # one rollout more
        {"eval_episodes": 2},
        {"seed": 1},
        {"algorithm": "sac"},
        {"tasks": TASKS[1:2]},
        {"tasks": metarl.envs.distribution("navigation", name="goals", horizon=6).test_tasks[:1]},
        {"learning_rate": 1e-3},
        {"version": "0.0.0"},
        {"curve_points": 5},
    ],
    ids=str,
)
def test_whatever_changes_the_scores_has_a_file_of_its_own(trained, tmp_path, monkeypatch, change):
    settings = {"tasks": TASKS[:1], "env_steps": 4096, "cache": tmp_path}
    reference(**settings)
    reference(**settings)
    assert len(trained) == len(list(tmp_path.iterdir())) == 1
    if "learning_rate" in change:
        monkeypatch.setitem(HYPERPARAMETERS["ppo"], "learning_rate", change.pop("learning_rate"))
    elif "version" in change:
        changed = change.pop("version")
        real = baseline.version
        monkeypatch.setattr(baseline, "version", lambda name: changed if name == "torch" else real(name))
    elif "curve_points" in change:
        monkeypatch.setattr(baseline, "CURVE_POINTS", change.pop("curve_points"))
    reference(**{**settings, **change})
    assert len(trained) == len(list(tmp_path.iterdir())) == 2


def damaged(text):
    entry = json.loads(text)
    curve = entry["curve"]
    return {
        "empty": "",
        "cut": text[:-20],
        "list": "[]",
        "number": "3",
        "nested": "[" * 100_000,
        "no key": json.dumps({"curve": curve}),
        "of another seed": json.dumps({**entry, "key": {**entry["key"], "seed": 7}}),
        "NaN": json.dumps({**entry, "curve": {**curve, "returns": [0.0, float("nan")]}}),
        "text for a number": json.dumps({**entry, "curve": {**curve, "returns": ["0", "1"]}}),
        "a point missing": json.dumps({**entry, "curve": {**curve, "returns": [0.0]}}),
        "no points": json.dumps({**entry, "curve": {key: [] for key in curve}}),
        "ended early": json.dumps({**entry, "curve": {**curve, "env_steps": [0, 2048]}}),
        "a pickle": pickle.dumps(entry),
    }


@pytest.mark.parametrize("kind", damaged('{"key": {}, "curve": {}}').keys())
def test_a_damaged_file_is_computed_again(trained, tmp_path, caplog, kind):
    first = reference(TASKS[:1], env_steps=4096, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    content = damaged(text)[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert caplog.text == ""
    assert reference(TASKS[:1], env_steps=4096, cache=tmp_path) == first
    assert len(trained) == 2 and path.read_text() == text
    assert str(path) in caplog.text and len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


def test_an_interrupted_run_keeps_what_is_finished(small, tmp_path, monkeypatch):
    built = []

    def make(task):
        if built.count(task) == 0 and len(built) >= 2:
            raise KeyboardInterrupt
        built.append(task)
        return metarl.envs.make(task)

    settings = {"tasks": TASKS[:2], "env_steps": 32, "eval_episodes": 1, "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        reference(**settings, make=make)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["key"]["task"]["index"] == TASKS[0].index
    second = []
    report = reference(**settings, make=lambda task: second.append(task) or metarl.envs.make(task))
    assert set(second) == {TASKS[1]}
    assert report == reference(TASKS[:2], env_steps=32, eval_episodes=1)


def test_a_file_that_is_not_written_to_its_end_is_not_there(trained, tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("pathlib.Path.replace", interrupted)
        reference(TASKS[:1], env_steps=4096, cache=tmp_path)
    assert not list(tmp_path.glob("*.json"))
    reference(TASKS[:1], env_steps=4096, cache=tmp_path)
    assert len(trained) == 2 and len(list(tmp_path.glob("*.json"))) == 1


# Mistakes


def test_mistakes_are_told_before_anything_is_trained(trained, tmp_path):
    with pytest.raises(UserError, match=r"unknown algorithm 'pppo': did you mean 'ppo'\?"):
        reference(TASKS[:1], "pppo")
    with pytest.raises(UserError, match="env_steps is 2047; expected at least 2048"):
        reference(TASKS[:1], "ppo", 2047)
    with pytest.raises(UserError, match="env_steps is 100; expected at least 101"):
        reference(TASKS[:1], "sac", 100)
    for arguments in ({"tasks": []}, {"tasks": TASKS[:1], "eval_episodes": 0}):
        with pytest.raises(ValueError, match="at least one of each"):
            reference(**arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: .*--cache"):
        reference(TASKS[:1], cache=tmp_path / "file")
    assert trained == []


@pytest.mark.parametrize(
    ("algorithm", "actions"),
    [("sac", gymnasium.spaces.Discrete(3)), ("ppo", gymnasium.spaces.Box(-np.inf, np.inf, (1,)))],
)
def test_actions_that_an_algorithm_cannot_choose_are_refused(algorithm, actions):
    with pytest.raises(UserError, match=rf"^{algorithm} cannot be trained on mine: [^\n]+$"):
        reference([OWN], algorithm, 2048, make=lambda task: Constant(actions=actions))


# The command


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run `metarl baseline` in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as error:
            main(["baseline", *map(str, arguments)])
        return error.value.code, *capsys.readouterr()

    return run


CONFIG = "navigation_maml_ppo"
SMALL = ["--env-steps", 64, "--num-tasks", 2, "--eval-episodes", 2, "--stages.0.tasks.horizon", 5]


def test_the_command_trains_shows_and_keeps(small, command, tmp_path, monkeypatch):
    status, out, err = command(CONFIG, *SMALL, "--json", "below/report.json")
    assert status == 0, err
    report = json.loads((tmp_path / "below" / "report.json").read_text())
    assert (report["env_steps"], report["seed"], report["eval_episodes"]) == (64, 0, 2)
    assert [row["task"]["options"]["horizon"] for row in report["tasks"]] == [5, 5]
    assert {row["task"]["split"] for row in report["tasks"]} == {"test"}
    assert len(list((tmp_path / "runs" / "baselines").glob("*.json"))) == 2
    first = report["tasks"][0]
    assert f"1/2  goals {first['index']}: return {first['return_untrained']:.1f} → {first['return_final']:.1f}" in out
    assert "PPO from scratch on each of 2 tasks" in out and "after 64 env steps" in out and "below/report.json" in out
    assert f"{report['aggregate']['return_final']['mean']:.1f} [" in out
    monkeypatch.setattr(baseline, "_train", None)
    assert command(CONFIG, *SMALL, "--json", "below/report.json") == (0, out, "")
    assert json.loads((tmp_path / "below" / "report.json").read_text()) == report


def test_the_command_passes_its_options_on(trained, command, tmp_path):
    names = ["--algorithm", "sac", "--split", "train", "--stage", 0, "--cache", "kept"]
    numbers = ["--num-tasks", 1, "--env-steps", 3000, "--seed", 4]
    status, _, err = command(CONFIG, *names, *numbers, "--json", "report.json")
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["algorithm"], report["env_steps"], report["seed"]) == ("sac", 3000, 4)
    assert len(trained) == len(list((tmp_path / "kept").iterdir())) == 1 and trained[0].split == "train"
    assert not (tmp_path / "runs").exists()


def test_the_command_takes_the_tasks_that_evaluate_would_take(trained, command):
    assert command(CONFIG, "--num-tasks", 4, "--stages.0.tasks.name", "cued_wedges")[0] == 0
    assert [task.name for task in trained] == [f"wedge-{k}" for k in range(4)]
    command(CONFIG, "--num-tasks", 3, "--seed", 9)
    command(CONFIG, "--num-tasks", 3, "--seed", 8)
    assert trained[4:7] == trained[7:] and len(set(trained[7:])) == 3  # whatever the seed of training


def test_the_command_takes_the_last_stage_or_the_one_named(trained, command, tmp_path):
    stages = [f"  - tasks: {{family: navigation, name: {name}}}" for name in ("goals", "semicircle")]
    (tmp_path / "two.yaml").write_text("\n".join(["stages:", *stages]))
    for flags in ([], ["--stage", 0], ["--stage", 1]):
        assert command("two.yaml", "--num-tasks", 1, *flags)[0] == 0
    assert [task.name for task in trained] == ["semicircle", "goals"]  # the third is kept from the first


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--algorithm td3", "--algorithm"),
        ("--env-steps 0", "--env-steps"),
        ("--env-steps 2047", "env_steps is 2047; expected at least 2048"),
        ("--num-tasks 0", "--num-tasks"),
        ("--eval-episodes -1", "--eval-episodes"),
        ("--stage 1", "--stage is 1; navigation_maml_ppo has 1 stage(s)"),
        ("--seed -1", "--seed: got -1"),
        ("--stages.0.tasks.horizn 5", "did you mean --stages.0.tasks.horizon?"),
        ("--stages.0.tasks.family custom --stages.0.tasks.name mine", "metarl.baseline.reference"),
        ("--cache file", "cannot write to file"),
        ("--json file/report.json", "cannot write the report to file/report.json"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_mistakes_of_the_command_take_one_line(trained, command, tmp_path, flags, expected):
    (tmp_path / "file").write_text("")
    status, out, err = command(CONFIG, *flags.split())
    assert (status, out) == (2, "") and trained == []
    assert err.startswith("metarl: ") and len(err.splitlines()) == 1 and expected in err


@pytest.mark.parametrize("before", [None, "a report"])
def test_a_command_that_fails_leaves_the_report_of_before_or_none(trained, command, tmp_path, before):
    path = tmp_path / "report.json"
    if before is not None:
        path.write_text(before)
    assert command(CONFIG, "--env-steps", 10, "--json", path)[0] == 2
    assert (path.read_text() if path.exists() else None) == before


def test_the_command_needs_a_config(command):
    for arguments in ([], ["--num-tasks", 3]):
        status, out, err = command(*arguments)
        assert (status, out) == (2, "") and "name a config" in err and len(err.splitlines()) == 1


def test_an_interrupted_command_says_where_it_goes_on(trained, command, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline, "reference", interrupted)
    status, out, err = command(CONFIG, *SMALL)
    assert (status, out) == (130, "") and "runs/baselines" in err and "repeat the command to resume" in err


def test_help_names_the_options(command):
    status, out, _ = command("--help")
    assert status == 0 and "usage: metarl baseline CONFIG" in out
    for flag in ("--algorithm", "--env-steps", "--num-tasks", "--split", "--eval-episodes", "--stage", "--cache"):
        assert flag in out
