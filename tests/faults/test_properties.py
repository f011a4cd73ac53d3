"""Whatever comes in from outside is what it claims to be, or is refused by the one error that says so."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from metarl.agents import agent_configs
from metarl.build import distribution_of, task_of
from metarl.cli.arguments import one_line
from metarl.config.schema import RunConfig, dump_config, find_config, load_config
from metarl.config.yaml_io import parse_yaml, write_yaml
from metarl.errors import UserError
from metarl.runs.tracking import read_metrics
from metarl.types import Task, Trajectory


def checked(examples):
    """The same examples in every run, however long each takes."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, database=None, suppress_health_check=quiet)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "mine.yaml"


def is_one_line(error):
    return len(str(error).splitlines()) == 1 and "Traceback" not in str(error) and "pydantic" not in str(error)


# Settings

SOURCES = {
    name: load_config(name, flags.split())
    for name, flags in {
        "navigation_maml_ppo": "--stages.0.curriculum.iterations 3",
        "half_cheetah_dir_maml_trpo": "--stages.0.init-from runs/a --num-workers 2",
        "continual_cued_wedges_rl2": "--stability [ewc,replay,mas] --agent.memory.name transformer",
        "ml10_rl2": "--agent.critic.name separate --stage-id input",
    }.items()
}
"""Configs that between them have every kind of section."""

TREES = [yaml.safe_load(dump_config(config)) for config in SOURCES.values()]
TEXTS = [find_config(name).read_text() for name in SOURCES] + [dump_config(SOURCES["navigation_maml_ppo"])]

ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 7, 2.5, -0.0, 1e308, math.nan, math.inf, -math.inf, 2**63, 2**64, 10**30),
        *("", " ", "nan", "1e999", "ewc", "rl2", "ppo", "metaworld", "custom", "reach-v9", "goals", "CW10", "é"),
        *("\0", "\x85", "[", "{a: 1}", [], [[]], [None], [1, 2], ["a"]),
        *({}, {"name": "rl2"}, {"name": None}, {"family": "mujoco"}, {"": ""}, {"a": {}}),
    ]
)


def places(tree, path=()):
    """The paths of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree, path, change):
    """A copy of a tree with what lies at a path changed."""
    key, *rest = path
    copy = tree.copy()
    if rest:
        copy[key] = changed(copy[key], rest, change)
    else:
        change(copy, key)
    return copy


@st.composite
def damaged_trees(draw):
    """A valid config in which something is replaced, removed, renamed or added; the names on the way to it."""
    tree = draw(st.sampled_from(TREES))
    path = draw(st.sampled_from(sorted(places(tree), key=str)))
    value, word = draw(ODD), draw(st.text(max_size=4))

    def replace(parent, key):
        parent[key] = value

    def remove(parent, key):
        del parent[key]

    def rename(parent, key):
        kept = parent.pop(key)
        parent.append(kept) if isinstance(parent, list) else parent.update({f"{key}{word}": kept})

    def add(parent, key):
        parent.append(value) if isinstance(parent, list) else parent.update({word: value})

    change = draw(st.sampled_from([replace, replace, replace, remove, rename, add]))
    return changed(tree, path, change), {str(key) for key in path} | {word or "''"}


@checked(200)
@given(damaged=damaged_trees())
def test_a_setting_that_is_wrong_is_refused_by_name(file, damaged):
    tree, names = damaged
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        config = load_config(file)
    except UserError as error:
        where = str(error).removeprefix(str(file))
        assert is_one_line(error) and where != str(error)
        assert re.match(r":\d+:\d+: ", where) or any(name in where for name in names), (names, where)
    else:
        check_config(file, config)


def check_config(file, config):
    """A config that was accepted holds finite numbers alone, and comes back from its YAML."""
    assert isinstance(config, RunConfig)
    assert all(math.isfinite(value) for value in numbers(config.model_dump()))
    text = dump_config(config)
    file.write_bytes(text.encode())
    assert load_config(file) == config and dump_config(load_config(file)) == text


def numbers(tree):
    if isinstance(tree, dict | list | tuple):
        return [number for each in (tree.values() if isinstance(tree, dict) else tree) for number in numbers(each)]
    return [tree] if isinstance(tree, int | float) else []


LINES_OF_YAML = ["", "  ", "\t", "- ", "seed: 1", "agent:", "---", "...", "<<: *a", "? a"]
SIGNS = "ab01:-[]{},&*!|>%@`'\"#?\n\t .~\0\x85\ufeffé"


@st.composite
def damaged_texts(draw):
    """The text of a config with some characters or lines removed, doubled, replaced or put elsewhere."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        if draw(st.booleans()):
            parts, new = lines, draw(st.sampled_from(LINES_OF_YAML))
        else:
            parts, new = list(text), draw(st.sampled_from(SIGNS) | st.characters())
        i, j = (draw(st.integers(0, max(0, len(parts) - 1))) for _ in range(2))
        change = draw(st.sampled_from(["remove", "double", "replace", "move", "cut"]))
        if not parts:
            break
        if change == "remove":
            del parts[i]
        elif change == "double":
            parts.insert(i, parts[i])
        elif change == "replace":
            parts[i] = new
        elif change == "move":
            parts.insert(j, parts.pop(i))
        else:
            del parts[i:]
        text = ("\n" if parts is lines else "").join(parts)
    return text


@checked(250)
@given(text=damaged_texts())
@example(text="")
@example(text="seed: !!int [1]")
@example(text="seed: !!float {a: 1}")
@example(text="seed: !!timestamp x")
@example(text="seed: !!binary '='")
@example(text="? !!python/tuple [1]\n: 1")
@example(text="<<: [1]")
@example(text="agent: {<<: [{name: rl2}, {name: rl2}], <<: {name: maml_ppo}}")
@example(text='stages: [{name: "\\ud800"}]')
def test_damaged_text_is_a_config_or_one_line(file, text):
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(file)
    except UserError as error:
        assert is_one_line(error) and str(error).startswith(str(file))
    else:
        check_config(file, config)


FLAGS = sorted({"--" + ".".join(map(str, path)).replace("_", "-") for tree in TREES for path in places(tree)})
WORDS = (
    st.sampled_from(FLAGS)
    | st.sampled_from(FLAGS).map(lambda flag: flag[: len(flag) // 2])
    | ODD.map(str)
    | ODD.map(lambda value: json.dumps(value, ensure_ascii=False))
    | st.text(max_size=6)
    | st.builds("{}={}".format, st.sampled_from(FLAGS), ODD)
    | st.sampled_from(
        ["--", "---", "-", "=", "--=", "--a.", "--stages.0", "--stages.-1.x", "--stability.0.x", "\udcff"]
    )
)


@checked(400)
@given(name=st.sampled_from(sorted(SOURCES)), words=st.lists(WORDS, max_size=5))
@example(name="ml10_rl2", words=["--agent", "null", "--agent.name", "rl2"])
@example(name="ml10_rl2", words=["--agent", "[1]", "--agent.0.name", "rl2"])
@example(name="ml10_rl2", words=["--stages", "[]", "--stages.0.iterations", "1"])
@example(name="ml10_rl2", words=["--stability", "{}", "--stability.0.coef", "1"])
@example(name="ml10_rl2", words=["--agent.memory", "3", "--agent.memory.name", "gru"])
@example(name="ml10_rl2", words=["--agent.memory.name", "[gru]"])
@example(name="ml10_rl2", words=["--agent.name", "{a: 1}"])
def test_flags_make_a_config_or_one_line(name, words):
    try:
        config = load_config(name, words)
    except UserError as error:
        assert is_one_line(error)
    else:
        assert isinstance(config, RunConfig)


# Configs that are valid

SIZES = st.lists(st.integers(1, 64), max_size=3)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TASKS = st.one_of(
    st.fixed_dictionaries({"family": st.just("navigation"), "name": st.just("goals"), "horizon": st.integers(1, 100)}),
    st.fixed_dictionaries({"family": st.just("mujoco"), "name": st.just("AntDir"), "seed": st.integers(0, 2**31)}),
    st.fixed_dictionaries({"family": st.just("metaworld"), "benchmark": st.sampled_from(["ML10", "ML25", "ML45"])}),
    st.fixed_dictionaries({"family": st.just("custom"), "name": NAMES}),
)
CONFIGS = st.fixed_dictionaries(
    {"agent": st.fixed_dictionaries({"name": st.sampled_from(sorted(agent_configs()))})},
    optional={
        "seed": st.integers(0, 2**64 - 1),
        "num_workers": st.none() | st.integers(0, 64),
        "keep_checkpoints": st.integers(1, 10**9),
        "evaluation": st.fixed_dictionaries({}, optional={"rollouts_per_task": st.none() | st.integers(1, 99)}),
        "stability": st.lists(st.sampled_from(["ewc", "replay", "l2", "mas", "mer"]), unique=True),
        "stages": st.lists(
            st.fixed_dictionaries(
                {"tasks": TASKS},
                optional={
                    "name": NAMES,
                    "iterations": st.integers(1, 2**62),
                    "init_from": st.none() | NAMES.filter(lambda name: name and "\0" not in name),
                    "score_range": st.none() | st.tuples(st.floats(-1e9, 0), st.floats(1, 1e9)),
                },
            ),
            min_size=1,
            max_size=4,
        ),
    },
)


@checked(100)
@given(tree=CONFIGS)
def test_every_valid_config_comes_back_from_its_yaml(file, tree):
    check_config(file, RunConfig.model_validate(tree))


TRAPS = ["010", "1:30", "0x1f", "1_000", "no", "null", "~", "2020-01-01", "<<", "=", "1e3", ".inf", "- a", "!a", "&a"]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(TRAPS),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("ab:\x85 #\n", max_size=5), below, max_size=3),
    max_leaves=8,
)


@checked(300)
@given(value=PLAIN)
def test_plain_values_come_back_from_yaml(value):
    assert parse_yaml(write_yaml(value)) == value


# Recordings

JUNK = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.just({"a": 1}),
    st.just({1.0, 2.0}),
    st.just(object()),
    st.just(iter([1.0])),
    st.just(np.datetime64("2020-01-01")),
    st.lists(st.lists(st.floats() | st.none(), max_size=3), max_size=3),
    st.lists(st.none() | st.text(max_size=2) | st.integers() | st.just(10**400) | st.just([]), max_size=3),
    arrays.arrays(
        st.sampled_from(["f2", "f8", "i1", "u8", "?", "c8", "O", "U3", "S3", "M8[s]"]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
)
FIELDS = {"observations": 2, "actions": 2, "rewards": 1, "terminated": 1, "truncated": 1, "log_probs": 1}


@st.composite
def recordings(draw):
    """The fields of a trajectory of which some are not what they should be."""
    length, fields = draw(st.integers(0, 3)), {}
    broken = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=2))
    for name, ndim in FIELDS.items():
        shape = (length, draw(st.integers(0, 3)))[:ndim]
        kind = draw(st.sampled_from(["f8", "f4", "i4"])) if name not in ("terminated", "truncated") else "?"
        finite = {"allow_nan": False, "allow_infinity": False} if kind[0] == "f" else None
        good = arrays.arrays(kind, shape, elements=finite)
        fields[name] = draw(JUNK if name in broken else good)
        if name not in broken and draw(st.booleans()):
            fields[name] = fields[name].tolist()
    return fields


def fields_of(length=2, **changes):
    good = {name: np.zeros((length, 1)[:ndim]) for name, ndim in FIELDS.items()}
    return good | {name: np.zeros(length, np.bool_) for name in ("terminated", "truncated")} | changes


@checked(600)
@given(fields=recordings())
@example(fields=fields_of(observations=None))
@example(fields=fields_of(actions=None))
@example(fields=fields_of(rewards=None))
@example(fields=fields_of(terminated=None))
@example(fields=fields_of(rewards=[10**400, 1]))
@example(fields=fields_of(rewards=["1.5", "2"]))
@example(fields=fields_of(rewards=[[1], [1, 2]]))
@example(fields=fields_of(observations=[[1.0, 2.0], [1.0]]))
@example(fields=fields_of(observations=np.zeros((2, 1), complex)))
@example(fields=fields_of(terminated=["False", "False"]))
@example(fields=fields_of(terminated=[math.nan, 0.0]))
@example(fields=fields_of(terminated=[0.5, 0.0]))
@example(fields=fields_of(terminated=[None, False]))
@example(fields=fields_of(truncated=[2, 0]))
def test_a_recording_is_consistent_or_the_field_is_named(fields):
    try:
        found = Trajectory(**fields)
    except (ValueError, TypeError) as error:
        assert "trajectory" in str(error) and len(str(error)) < 500, error
        assert "is empty" in str(error) or any(f"trajectory.{name}" in str(error) for name in FIELDS), error
        return
    length = len(found.rewards)
    assert length > 0
    for name, ndim in FIELDS.items():
        value = getattr(found, name)
        if name == "log_probs" and fields[name] is None:
            assert value is None
            continue
        assert value.dtype == (np.bool_ if name in ("terminated", "truncated") else np.float64)
        assert value.ndim == ndim and value.shape[0] == length and np.isfinite(value).all()
        assert np.array_equal(value, np.asarray(fields[name])), "a value was changed on the way"


# Tasks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
SCALARS = st.text(max_size=5) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
TASK = {"family": "toy", "benchmark": "Toy", "split": "train", "name": "toy", "index": 0, "seed": 0, "options": {}}


@checked(200)
@given(
    words=st.lists(st.text(), min_size=4, max_size=4),
    index=st.integers(0),
    seed=st.integers(0),
    options=st.dictionaries(st.text(), SCALARS),
)
def test_every_task_comes_back_from_json(words, index, seed, options):
    task = Task(*words, index, seed, options)
    assert Task.from_json(task.to_json()) == task and hash(Task.from_json(task.to_json())) == hash(task)


@checked(400)
@given(
    text=JSON.map(json.dumps)
    | st.text()
    | st.builds(lambda key, value: json.dumps(TASK | {key: value}), st.sampled_from(sorted(TASK)), JSON)
)
@example(text="[" * 100_000)
@example(text="9" * 5000)
@example(text=json.dumps(TASK | {"index": "7"}))
@example(text=json.dumps(TASK | {"index": True}))
@example(text=json.dumps(TASK | {"index": -1}))
@example(text=json.dumps(TASK | {"family": None}))
@example(text=json.dumps(TASK | {"options": {"a": [1]}}))
@example(text=json.dumps(TASK | {"options": {"a": math.nan}}))
@example(text=json.dumps(TASK | {"options": [["a", 1], ["a", 2]]}))
@example(text=json.dumps(TASK | {"options": "ab"}))
def test_any_other_json_is_no_task(text):
    try:
        task = Task.from_json(text)
    except ValueError as error:
        assert "not a task: " in str(error) and "Task.to_json" in str(error) and len(str(error)) < 500
        return
    assert all(isinstance(getattr(task, name), str) for name in ("family", "benchmark", "split", "name"))
    assert all(type(getattr(task, name)) is int and getattr(task, name) >= 0 for name in ("index", "seed"))
    assert Task.from_json(task.to_json()) == task and isinstance(hash(task), int)


NAMES_OF_TASKS = st.sampled_from(["goals", "reach-v3", "ML10", "AntDir", "reach-v9", ""]) | st.text(max_size=6)
ODD_INDICES = ["²", "٣", "\uff19", "1_0", "+1", "9" * 5000, "0x1"]
INDICES = st.integers(-2, 120).map(str) | st.text(max_size=4) | st.sampled_from(ODD_INDICES)


@checked(300)
@given(
    name=NAMES_OF_TASKS | st.builds("{}:{}".format, NAMES_OF_TASKS, INDICES),
    source=st.sampled_from(["navigation_maml_ppo", "ml10_rl2"]),
    split=st.sampled_from(["train", "test"]),
    stage=st.none() | st.sampled_from(["meta-training", "x", ""]),
)
def test_any_name_is_a_task_or_one_line(name, source, split, stage):
    config = SOURCES[source]
    for find in (task_of, lambda *arguments: distribution_of(config, name, stage).test_tasks[0]):
        try:
            task = find(config, name, split, stage)
        except UserError as error:
            assert is_one_line(one_line(str(error)))
        else:
            assert isinstance(task, Task)


# What a run has tracked

LINE = json.dumps({"iteration": 1, "stage": 0, "env_steps": 20, "meta_train/return_post": 1.5}).encode()
OTHERS = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20)
LINES = st.lists(st.just(LINE) | OTHERS, min_size=1, max_size=6)


@checked(400)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]))
@example(lines=[LINE, b"[" * 100_000, LINE], end=b"\n")
@example(lines=[LINE, b"9" * 5000], end=b"\n")
@example(lines=[LINE, LINE.replace(b"1.5", b"NaN")], end=b"\n")
@example(lines=[LINE, LINE.replace(b"1.5", b"1e999")], end=b"\n")
@example(lines=[LINE, b"\xff\xfe"], end=b"")
@example(lines=[LINE + b"\r", b"null"], end=b"")
def test_any_metrics_are_lines_of_scalars_or_the_line_is_named(tmp_path_factory, lines, end):
    run_dir = tmp_path_factory.getbasetemp()
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join(lines) + end)
    whole = next((i for i, line in enumerate(lines) if line.strip() != LINE), len(lines))
    try:
        found = read_metrics(run_dir, 1)
    except UserError as error:
        assert is_one_line(error) and "metrics.jsonl:" in str(error) and whole < len(lines)
    else:
        assert found[:whole] == [json.loads(LINE)] * whole
        assert all(math.isfinite(value) for line in found for value in line.values())


@checked(200)
@given(text=st.text())
@example(text="\x1b[2J\r\n\u202e\ud800")
def test_a_line_for_the_terminal_is_one(text):
    assert one_line(text).isprintable()
    assert one_line(text) == text or not text.isprintable() or len(text) > 2000
