"""Mistakes at the command line: each is told in one line of cause and cure, at once, and leaves nothing behind.

The numbers are those of the cases in docs/reliability.md. What a process of its own adds nothing to runs in this one.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

import metarl
from metarl.cli import main
from metarl.config import dump_config, embedded_configs, load_config
from metarl.errors import UserError
from metarl.settings_yaml import MOST_BYTES
from tests.faults.harness import mounted
from tests.faults.processes import COMMAND, NAVIGATION, assert_told_in_one_line, environment, run_cli

VERBS = ("train", "evaluate", "export", "play", "inspect", "list", "doctor", "plot", "baseline")


def listing(folder):
    """What lies in a folder and below: paths, and contents of files that are not huge."""
    return {
        path: path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Run a command that must be refused before an environment is made, and leave nothing behind: its line."""

    def made(*args, **kwargs):
        raise AssertionError("an environment was made")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metarl.training.env_spaces", made)

    def run(*arguments, expected=()):
        before = listing(tmp_path)
        told = assert_told_in_one_line(command(*arguments), *expected)
        assert listing(tmp_path) == before
        return told

    return run


@pytest.fixture
def config(tmp_path):
    """Write a config: its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def trained(path, *flags):
    """Train by the command line, in this process: the run's directory."""
    with pytest.raises(SystemExit) as error:
        main([*NAVIGATION, "--run-dir", str(path), *flags])
    assert error.value.code == 0
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two iterations, made by the command line."""
    return trained(tmp_path_factory.mktemp("runs") / "navigation")


@pytest.fixture
def copied(run_dir, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(run_dir, tmp_path / "copy")


# 1: no arguments, words that are no verbs


def test_case_01_no_arguments_show_help(cli):
    done = cli()
    assert (done.status, done.err) == (2, "")
    assert all(f"\n  {verb} " in done.out for verb in VERBS)
    asked = cli("--help")
    assert (asked.status, asked.out) == (0, done.out)


def test_case_01_an_unknown_verb_is_answered_with_the_nearest(mistake):
    mistake("trian", "quickstart", expected=["unknown verb 'trian'", "did you mean 'train'?", *VERBS, "metarl --help"])


@pytest.mark.parametrize(
    "word",
    [
        *(
            "",
            " ",
            "-",
            "--",
            "---",
            "-x",
            "--versoin",
            "help",
            "train ",
            "train\n",
            "\x1b[31mtrain",
            "träin",
            "\uff10",
        ),
        *("x" * 100_000, "../train", "train;ls", "$(train)"),
    ],
)
def test_case_01_whatever_the_verb_is_the_line_is_one(refused, word):
    refused(word, "quickstart", expected=["unknown verb", "there are train, "])


@pytest.mark.parametrize("word", ["TRAIN", "Train", "trian", "train.", "evalute", "lst", "doctro", "insepct", "plt"])
def test_case_01_near_verbs_are_suggested(refused, word):
    assert "did you mean '" in refused(word)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train", "name a config"),
        ("train --seed 1", "name a config"),
        ("train --", "name a config"),
        ("evaluate", "run_dir"),
        ("export run", "FILE.onnx"),
        ("export run policy", "does not end in .onnx"),
        ("play", "run_dir"),
        ("plot", "RUN_DIR"),
        ("inspect", "run_dir"),
        ("list", "what"),
        ("list everything", "'envs', 'agents', 'methods', 'configs'"),
        ("doctor who", "who"),
        ("baseline", "name a config"),
        ("inspect one two", "two"),
        ("evaluate run --nonsense", "--nonsense"),
        ("evaluate run --split both", "'test', 'train'"),
        ("evaluate run --num-tasks", "--num-tasks"),
        ("evaluate run --num-tasks 0", "at least 1"),
        ("evaluate run --num-tasks -1", "at least 1"),
        ("evaluate run --num-tasks 1.5", "'1.5'"),
        ("evaluate run --num-tasks ²", "'²'"),
        ("evaluate run --num-tasks ٣", "'٣'"),
        ("evaluate run --num-workers -1", "at least 0"),
        ("evaluate run --seed 1e3", "'1e3'"),
        ("evaluate run --device tpu", "'auto', 'cpu', 'cuda'"),
        ("evaluate run --checkpoint newest", "latest, best or the number of an iteration"),
        ("evaluate run --json=", "--json"),
        ("evaluate run --json .", "is a folder"),
        ("play run --fps nan", "a number above 0"),
        ("play run --fps inf", "a number above 0"),
        ("play run --speed -1", "a number above 0"),
        ("play run --video .", "is a folder"),
        ("train quickstart --max-iterations 0", "more than 0"),
        ("train quickstart --max-iterations x", "'x'"),
        ("train quickstart --max-minutes nan", "more than 0"),
        ("train quickstart --max-minutes=-inf", "more than 0"),
        ("train quickstart --resume --overwrite", "exclude each other"),
    ],
)
def test_case_01_arguments_that_a_verb_does_not_take(refused, words, expected):
    refused(*words.split(" "), expected=[expected])


def test_case_01_a_number_of_a_thousand_digits_is_not_printed_back(refused):
    for flags in (["--num-tasks", "9" * 5000], ["--seed", "9" * 5000], ["--json", "9" * 5000]):
        assert len(refused("evaluate", "run", *flags)) < 2100


# 2: flags that are none


def test_case_02_a_misspelt_flag_is_answered_with_the_nearest(mistake, tmp_path):
    told = mistake("train", "quickstart", "--agent.inner-lrr", "0.1")
    assert told == "metarl: --agent.inner-lrr: unknown setting; did you mean --agent.inner-lr?\n"
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--agent.inner-lr", "--agent.inner-lr has no value"),
        ("--agent.inner-lr=", "--agent.inner-lr has an empty value"),
        ("--agent.inner-lr  ", "--agent.inner-lr has an empty value"),
        ("--agent.inner-lr --seed 1", "--agent.inner-lr has no value"),
        ("--agent.inner-lr 0.1 0.2", "--agent.inner-lr: expected a valid number"),
        ("--agnet.inner-lr 0.1", "--agnet.inner-lr: unknown setting; did you mean --agent?"),
        ("--agent.outer.lrr 0.1", "--agent.outer.lrr: unknown setting; did you mean --agent.outer.lr?"),
        ("--agent.inner.lr 0.1", "--agent.inner.lr: unknown setting; did you mean --agent.inner-lr?"),
        ("--seed.x 1", "--seed.x"),
        ("--Seed 1", "--Seed: unknown setting; did you mean --seed?"),
        ("--sëed 1", "--sëed: unknown setting; did you mean --seed?"),
        ("---seed 1", "did you mean --seed?"),
        ("-s 1", "unexpected argument '-s'"),
        ("seed 1", "unexpected argument 'seed'"),
        ("-- --seed 1", "-- has no value"),
        ("--=1", "'--=1' names no setting"),
        ("--.=1", "'--.=1' names no setting"),
        ("--agent. 1", "'--agent.' names no setting"),
        ("--agent..inner-lr 1", "'--agent..inner-lr' names no setting"),
        ("--agent maml", "--agent: got 'maml', expected settings"),
        ("--agent null", "--agent: got None, expected settings"),
        ("--agent {inner-lr:1}", "--agent"),
        ("--agent.name maml", "--agent.name: got 'maml', expected one of maml_ppo"),
        ("--agent.name 7", "expected one of maml_ppo"),
        ("--stages.0 1", "--stages.0: name an item of the list first"),
        ("--stages.9.iterations 1", "there is no stages.9"),
        ("--stages.-1.iterations 1", "there is no stages.-1"),
        ("--stages.0.tasks.nmae reach-v3", "did you mean --stages.0.tasks.name?"),
        (
            "--stability ewcc",
            "--stability.0: got 'ewcc', expected one of ewc, replay, l2, mas, mer; did you mean 'ewc'?",
        ),
        ("--stability.ewc.coef 1", "there is no stability.ewc"),
        ("--agent.hidden-sizes [64,0]", "--agent.hidden-sizes.1: got 0"),
        ("--num-tasks [", "--num-tasks: got '[', expected a valid integer"),
        ("--stages.0.name \udcff", "'\\udcff' is not valid UTF-8"),
        ("--seed 2020-13-45", "--seed: got '2020-13-45', expected a valid integer"),
    ],
)
def test_case_02_mistaken_flags(refused, flags, expected):
    refused("train", "quickstart", *flags.split(" "), expected=[expected])


# 3: settings that are none


def test_case_03_an_unknown_key_is_named_with_file_path_and_the_nearest(mistake, config):
    path = config("agent: {outer: {lrr: 0.1}}")
    told = mistake("train", path)
    assert told == f"metarl: {path}: agent.outer.lrr: unknown setting; did you mean 'lr'?\n"


def misspelt(tree, path=()):
    """Give a config with one name misspelt, for each name at any depth, with the path to it and the right name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield {(f"{k}x" if k == key else k): v for k, v in tree.items()}, (*path, f"{key}x"), key
            for changed, *where in misspelt(value, (*path, key)):
                yield {**tree, key: changed}, *where
    if isinstance(tree, list):
        for i, value in enumerate(tree):
            for changed, *where in misspelt(value, (*path, i)):
                yield [*tree[:i], changed, *tree[i + 1 :]], *where


@pytest.mark.parametrize("name", ["continual_cued_wedges_rl2", "half_cheetah_dir_maml_trpo", "quickstart"])
def test_case_03_a_misspelt_key_at_any_depth(config, name):
    tree, seen = yaml.safe_load(dump_config(load_config(name, ["--stability", "[ewc, replay]"]))), 0
    for changed, path, right in misspelt(tree):
        if right in ("name", "family") and path[:1] != ("stages",):
            continue  # it says whose settings these are; without it those of another are unknown, too
        file, seen = config(yaml.safe_dump(changed)), seen + 1
        with pytest.raises(UserError) as error:
            load_config(file)
        where = ".".join(map(str, path))
        if right == "family":
            assert f"{where.removesuffix('.familyx')}: no family; expected one of" in str(error.value)
        else:
            assert f"{file}: {where}: unknown setting; did you mean '{right}'?" in str(error.value)
    assert seen > 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'': 1", "'': unknown setting"),
        ("agent: {'': 1}", "agent.'': unknown setting"),
        ('"a\\nb": 1', "a b: unknown setting"),
        ('"\\e[31mseed": 1', "unknown setting"),
        ("null: 1", "got None for the name of a setting, expected text"),
        ("1: 1", "got 1 for the name of a setting, expected text"),
        ("true: 1", "got True for the name of a setting, expected text"),
        ("? {a: b}\n: 1", "not valid YAML"),
        ("seed: 1\nseed: 2", ":2:1: not valid YAML: 'seed' is set twice, first in line 1; remove one"),
        ("agent:\n  inner_lr: 1\n  'inner_lr': 2", ":3:3: not valid YAML: 'inner_lr' is set twice, first in line 2"),
        ("stages: [{name: a, name: b}]", "'name' is set twice"),
        ("agent: {name: rl2, memory: {name: gru, heads: 2}}", "agent.memory.heads: unknown setting"),
        ("agent: {outer: {name: trpo}}", "agent.outer.name: got 'trpo', expected 'ppo'"),
        ("stability: {ewc: {coef: 1}}", "stability.0: no name; expected one of ewc"),
        ("stages: [{tasks: {}}]", "stages.0.tasks: no family; expected one of custom, metaworld, mujoco, navigation"),
    ],
)
def test_case_03_other_keys_that_are_none(refused, config, text, expected):
    refused("train", config(text), expected=[expected])


def test_case_03_aliases_and_merged_settings_still_work(config):
    path = config("stages:\n- &a {iterations: 3, tasks: &t {family: navigation}}\n- {<<: *a, iterations: 4, tasks: *t}")
    assert [stage.iterations for stage in load_config(path).stages] == [3, 4]


# 4: values out of range


def test_case_04_values_out_of_range_are_told_all_at_once(mistake, tmp_path):
    flags = "--agent.outer.lr -1 --agent.gamma 1.5 --num-tasks 0 --agent.inner-lr nan"
    told = mistake(*NAVIGATION, *flags.split())
    for expected in (
        "--agent.outer.lr: got -1, expected greater than 0",
        "--agent.gamma: got 1.5, expected less than or equal to 1",
        "--num-tasks: got 0, expected greater than or equal to 1",
        "--agent.inner-lr: got 'nan', expected a finite number",
    ):
        assert expected in told
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("agent.outer.lr", "-1", "greater than 0"),
        ("agent.outer.lr", "0", "greater than 0"),
        ("agent.outer.lr", ".inf", "a finite number"),
        ("agent.outer.lr", "-.inf", "expected"),
        ("agent.outer.lr", ".nan", "a finite number"),
        ("agent.outer.lr", "1e999", "a finite number"),
        ("agent.outer.lr", "1.0e+999", "a finite number"),
        ("agent.gamma", "1.5", "less than or equal to 1"),
        ("agent.gamma", "-0.1", "greater than"),
        ("agent.gae_lambda", "2", "less than or equal to 1"),
        ("agent.hidden_sizes", "[64, -1]", "greater than 0"),
        ("agent.adaptation_steps", "0", "greater than or equal to 1"),
        ("num_tasks", "0", "greater than or equal to 1"),
        ("num_tasks", "-5", "greater than or equal to 1"),
        ("num_tasks", "1000000000", "less than or equal to 100000"),
        ("rollouts_per_task", "10000000000000000000", "less than or equal to 100000"),
        ("num_workers", "100000000", "less than or equal to 1024"),
        ("num_workers", "-1", "greater than or equal to 0"),
        ("num_envs", "1", "expected at least num_tasks, 20"),
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", "18446744073709551616", "at most 64"),
        ("seed", "0x" + "f" * 5000, "at most 64"),
        ("seed", "-0x" + "f" * 5000, "at most 64"),
        ("seed", f"'{2**64}'", "less than 18446744073709551616"),
        ("seed", "9" * 5000, "is no int"),
        ("worker_timeout_s", "0", "greater than 0"),
        ("keep_checkpoints", "0", "greater than or equal to 1"),
        ("evaluation.num_tasks", "0", "greater than or equal to 1"),
        ("evaluation.every_iterations", "-1", "greater than or equal to 0"),
    ],
)
def test_case_04_the_range_is_named(refused, config, setting, value, expected):
    *sections, last = setting.split(".")
    text = f"{last}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    told = refused("train", config(text), expected=[expected])
    assert setting in told or "mine.yaml:1:" in told or last in told


# 5: values of another type, files that are no settings


def test_case_05_a_wrong_type_and_malformed_yaml(mistake, config):
    mistake("train", config("num_tasks: many"), expected=["mine.yaml: num_tasks: got 'many', expected a valid integer"])
    mistake("train", config("seed: 0\nagent: [1, 2\n"), expected=["mine.yaml:3:1: not valid YAML"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_tasks: 2.5", "num_tasks: got 2.5, expected a valid integer"),
        ("num_tasks: [2]", "num_tasks: expected a valid integer"),
        ("num_tasks: {a: 1}", "num_tasks: expected a valid integer"),
        ("num_tasks: null", "num_tasks: got None, expected a valid integer"),
        ("num_tasks: true", "num_tasks: got True, expected a number"),
        ("num_tasks: yes", "num_tasks: got True, expected a number"),
        ("agent: {inner_lr: off}", "agent.inner_lr: got False, expected"),
        ("agent: {hidden_sizes: [true, 8]}", "agent.hidden_sizes: got True, expected a number"),
        ("stages: [{iterations: on}]", "stages.0.iterations: got True, expected a number"),
        ("agent: {inner_lr: fast}", "agent.inner_lr: got 'fast', expected a valid number"),
        ("agent: {name: rl2, input_time: perhaps}", "agent.input_time: got 'perhaps', expected a valid boolean"),
        ("agent: 5", "agent: got 5, expected settings of its own"),
        ("agent:", "agent: got None, expected settings of its own"),
        ("agent: [a]", "agent: expected settings of its own"),
        ("agent: {name: [maml_ppo]}", "agent: got ['maml_ppo'], expected one of maml_ppo"),
        ("agent: {outer: 3}", "agent.outer: got 3, expected settings of its own"),
        ("stages: reach", "stages: got 'reach', expected a list"),
        ("stages: {}", "stages: expected a list"),
        ("stages: []", "stages: expected at least 1 item"),
        ("stages: [null]", "stages.0: got None, expected settings of its own"),
        ("stages: [[]]", "stages.0: expected settings of its own"),
        ("stages: [{tasks: 3}]", "stages.0.tasks: got 3, expected settings of its own"),
        ("stages: [{init_from: ''}]", "stages.0.init_from: got '', expected at least 1 character"),
        ('stages: [{init_from: "a\\0b"}]', "stages.0.init_from: got 'a\\x00b', expected the path of a run directory"),
        ("stability: 5", "stability.0: got 5, expected settings of its own"),
        ("seed: 2020-01-01", "seed: got datetime.date(2020, 1, 1), expected a valid integer"),
        ("seed: !!binary aGk=", "seed: got b'hi', expected a valid integer"),
        ('stages: [{name: "\\ud800"}]', ":1:17: not valid YAML: half a character"),
        ("seed: 0b_", ":1:7: not valid YAML: '0b_' is no int"),
        ("seed: 010", "010 would be read as 8"),
        ("seed: 1:30", "1:30 would be read as 90"),
        ("agent: {name: " + "x" * 5000 + "}", "x…, expected one of maml_ppo"),
    ],
)
def test_case_05_expected_and_found_are_named(refused, config, text, expected):
    assert len(refused("train", config(text), expected=["mine.yaml", expected])) < 500


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"# nothing\n\n# but comments\n", "found nothing"),
        (b"---\n...\n", "found nothing"),
        (b"   \n", "found nothing"),
        (b"seed", "found 'seed'"),
        (b"[1, 2]", "found [1, 2]"),
        (b"42", "found 42"),
        (b"x" * 100_000, "found 'xxx"),
        (
            b"seed: 0\nagent:\n\tinner_lr: 1",
            ":3:1: not valid YAML: found character '\\t' that cannot start any token: indent by spaces",
        ),
        (b"seed: 'abc", ":1:11: not valid YAML"),
        (b"seed: [1", "not valid YAML"),
        (b"seed: 1\n  agent: 2", ":2:8: not valid YAML: mapping values are not allowed here"),
        (b"a: 1\n---\nb: 2", "not valid YAML"),
        (b"seed: *unknown", ":1:7: not valid YAML: found undefined alias"),
        (b"seed: 2020-13-45", "not valid YAML"),
        (b"%YAML 9.9\n---\nseed: 1", "not valid YAML"),
        (b"seed: \x00", "not valid YAML"),
        (b"seed: 1 # caf\xe9", "byte 14 is not UTF-8; save the file as UTF-8 text"),
        ("seed: 1".encode("utf-16"), "byte 1 is not UTF-8"),
        (bytes(range(256)) * 40, "not valid YAML"),
        (b"PK\x03\x04" + bytes(1000), "not valid YAML"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"{a: " * 100_000, "it is nested too deeply"),
        (b"- " * 100_000, "it is nested too deeply"),
        (b"&a [*a]", "a value refers to itself"),
        (b"agent: &a {outer: *a}", "a value refers to itself"),
        (b"stages: [&a {tasks: {x: [*a]}}]", "a value refers to itself"),
    ],
)
def test_case_05_what_is_no_settings_is_told_with_its_place(refused, config, data, expected):
    refused("train", config(data), expected=["mine.yaml", expected])


def test_case_05_aliases_that_stand_for_billions_of_values(refused, config):
    layers = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = config("\n".join(["l0: &l0 [x, x]", *layers]))
    refused("train", path, expected=["written out it has more than 100,000 values"])
    refused("train", config("\n".join(["l0: &l0 {a: 1}", *layers, "agent: {outer: *l11}"])), expected=["100,000"])


def test_case_05_a_file_that_cannot_hold_settings(refused, config, tmp_path):
    sparse = config("seed: 0\n", "huge.yaml")
    os.truncate(sparse, 100 << 20)
    refused("train", sparse, expected=[f"huge.yaml has more than {MOST_BYTES:,} bytes"])
    dashes = config(b"seed: 0 # " + b"x" * MOST_BYTES)
    refused("train", dashes, expected=["is it another file?"])
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in (
        "folder.yaml",
        "pipe.yaml",
        "dangling.yaml",
        "loop.yaml",
        "missing.yaml",
        "/dev/null",
        "/dev/zero",
    ):
        refused("train", name, expected=["neither a file nor embedded", "metarl list configs"])
    for name in ("", " ", "x/" * 3000, "x" * 300, "a\nb.yaml", "\x1b]0;x\x07", "~", "*"):
        refused("train", name, expected=["metarl: "])
    refused("train", "quickstrat", expected=["did you mean 'quickstart'?"])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and may read everything itself")
def test_case_05_what_one_may_not_read():
    """As nobody, in a folder that nobody may look into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        (folder / "secret.yaml").write_text("seed: 0")
        (folder / "secret.yaml").chmod(0)
        (folder / "closed").mkdir(mode=0)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        as_nobody = [COMMAND[0], "-c", f"import os, metarl.config, metarl.policy\nos.setuid(65534)\n{COMMAND[2]}"]
        for arguments, place in (
            (["train", folder / "secret.yaml", "--run-dir", folder / "open" / "run"], "secret.yaml"),
            (["train", folder / "closed" / "x.yaml", "--run-dir", folder / "open" / "run"], "x.yaml"),
            (["train", "quickstart", "--run-dir", folder / "closed" / "run"], "run"),
            (["inspect", folder / "closed"], "closed"),
            (["plot", folder / "closed" / "run"], "closed"),
        ):
            done = run_cli(*arguments, cwd=folder, command=as_nobody)
            assert_told_in_one_line(done, "cannot ", place, "Permission denied")
        assert list((folder / "open").iterdir()) == []


# 6: YAML that names code


@pytest.mark.parametrize(
    "form",
    [
        "!!python/object/apply:os.mkdir ['{marker}']",
        "seed: !!python/object/apply:os.mkdir ['{marker}']",
        "seed: !!python/object/new:os.mkdir ['{marker}']",
        "seed: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{marker}']",
        "seed: !!python/name:os.mkdir",
        "seed: !!python/module:os",
        "agent: !!python/object:metarl.agents.maml.MamlPpoConfig {{}}",
        "%TAG ! tag:yaml.org,2002:python/\n---\nseed: !object/apply:os.mkdir ['{marker}']",
        "stages: [{{name: !!python/tuple [a]}}]",
        "seed: !other 1",
    ],
)
def test_case_06_yaml_that_names_code_is_refused(refused, config, tmp_path, form):
    marker = tmp_path / "executed"
    refused("train", config(form.format(marker=marker)), expected=["asks for an object; settings are text, numbers"])
    with pytest.raises(UserError):  # nor in a flag
        load_config("quickstart", ["--seed", form.format(marker=marker).removeprefix("seed: ")])
    assert not marker.exists()


def test_case_06_nothing_is_executed_by_the_command_line(mistake, refused, config, tmp_path):
    marker = tmp_path / "executed"
    text = f"seed: !!python/object/apply:os.mkdir ['{marker}']"
    mistake("train", config(text), expected=["mine.yaml:1:7: not valid YAML", "python/object/apply:os.mkdir"])
    refused("train", "quickstart", "--seed", text.removeprefix("seed: "), expected=['--seed: got "!!python/'])
    refused("train", "quickstart", "--seed", f"__import__('os').mkdir('{marker}')", expected=["--seed: got "])
    assert not marker.exists()
    yaml.unsafe_load(text)
    assert marker.exists()  # it would have been


def test_case_06_a_config_in_a_run_directory_is_read_in_the_same_way(refused, copied, tmp_path):
    marker = tmp_path / "executed"
    (copied / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']")
    for arguments in (["evaluate", copied], ["inspect", copied], ["plot", copied], ["export", copied, "x.onnx"]):
        refused(*arguments, expected=["config.yaml:1:7: not valid YAML"])
    assert not marker.exists()


def test_case_06_resuming_reads_it_in_the_same_way_too(command, copied, tmp_path):
    (copied / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']")
    done = command(*NAVIGATION, "--run-dir", copied, "--resume")
    assert_told_in_one_line(done, "config.yaml:1:7: not valid YAML")
    assert not (tmp_path / "executed").exists()


# 7: names of tasks


def test_case_07_an_unknown_task_is_answered_with_the_nearest(mistake):
    told = mistake("train", "quickstart", "--stages.0.tasks.name", "reach-v9")
    assert "--stages.0.tasks.name: unknown Meta-World task 'reach-v9': did you mean 'reach-v3'?" in told
    assert "`metarl list envs` shows all" in told


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("family: metaworld, benchmark: ML1, name: reach", "did you mean 'reach-v3'?"),
        ("family: metaworld, benchmark: ML1, name: ''", "unknown Meta-World task"),
        ("family: metaworld, benchmark: ML11", "benchmark: got 'ML11', expected 'ML1', 'ML10'"),
        ("family: metaworld, benchmark: ML1", "ML1 needs one class"),
        ("family: metaworld, benchmark: ML10, name: reach-v3", "ML1 needs one class, others take none"),
        ("family: mujoco, name: AntDirr", "did you mean 'AntDir'?"),
        ("family: navigation, name: goal", "did you mean 'goals'?"),
        ("family: metawrld", "did you mean 'metaworld'?"),
        ("family: custom", "the tasks are custom ones: train from Python"),
    ],
)
def test_case_07_other_names_of_tasks(refused, config, tasks, expected):
    refused("train", config(f"stages: [{{tasks: {{{tasks}}}}}]"), expected=[expected])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaols", "did you mean 'goals'?"),
        ("reach-v9", "did you mean 'reach-v3'?"),
        ("ml10", "did you mean 'ML10'?"),
        ("", "unknown task or benchmark"),
    ],
)
def test_case_07_of_a_trained_agent(refused, run_dir, name, expected):
    refused("evaluate", run_dir, "--tasks", name, expected=[expected, "`metarl list envs` shows all"])
    refused("play", run_dir, "--task", name, expected=[expected])


@pytest.mark.parametrize("index", ["x", "-1", "1.5", "²", "٣", "99999", "9" * 5000, "1:2", " 1"])
def test_case_07_an_index_that_is_none(refused, run_dir, index):
    told = refused("play", run_dir, "--task", f"goals:{index}")
    assert "expected a number behind the colon" in told or "counted from 0" in told


# 8: a meta-batch that the classes do not divide


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [3, 5])
def test_case_08_a_meta_batch_that_the_classes_do_not_divide_works(cli, tmp_path, num_tasks):
    """Two classes, drawn as evenly as can be."""
    tasks = "{family: metaworld, benchmark: custom, horizon: 5, names: [reach-v3, push-v3]}"
    flags = ["--stages.0.tasks", tasks, "--num-tasks", num_tasks, "--stages.0.iterations", "1"]
    done = cli(*NAVIGATION, *flags, "--run-dir", tmp_path / "run")
    assert done.status == 0, done.err
    first, *_ = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["env_steps"] == num_tasks * 2 * 5


# 9: a GPU that is not there


@pytest.mark.slow
def test_case_09_a_gpu_that_is_not_there_is_refused(mistake, cli, run_dir, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    told = mistake(*NAVIGATION, "--device", "cuda", "--run-dir", tmp_path / "run", **hidden)
    assert "PyTorch finds no GPU here; use --device cpu or auto" in told and listing(tmp_path) == {}
    mistake("evaluate", run_dir, "--device", "cuda", expected=["--device cpu or auto"], **hidden)
    done = cli(*NAVIGATION, "--device", "auto", "--run-dir", tmp_path / "run", **hidden)
    assert done.status == 0, done.err


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:0", "mps", "0"])
def test_case_09_other_devices(refused, device):
    refused(*NAVIGATION, "--device", device, expected=["--device: got ", "expected 'auto', 'cpu' or 'cuda'"])


# 10: a run directory that holds a run


@pytest.mark.slow
def test_case_10_a_run_is_not_written_over(mistake, cli, copied):
    before = listing(copied)
    told = mistake(*NAVIGATION, "--run-dir", copied)
    assert "already holds a run" in told and "--resume" in told and "--overwrite" in told
    assert listing(copied) == before
    done = cli(*NAVIGATION, "--overwrite", "--run-dir", copied)
    assert done.status == 0 and "finished" in done.out


def test_case_10_no_run_to_go_on_with(refused, copied):
    refused(*NAVIGATION, "--run-dir", copied.parent / "new", "--resume", expected=["holds no run to resume; leave out"])
    refused(*NAVIGATION, "--run-dir", copied, "--seed", "5", expected=["already holds a run"])
    refused(*NAVIGATION, "--run-dir", copied, "--resume", "--overwrite", expected=["exclude each other"])


def test_case_10_a_mistake_with_overwrite_costs_no_run(refused, copied):
    for flags in (["--agent.gamma", "7"], ["--stages.0.tasks.name", "gaols"], ["--device", "cuda:1"], ["--sede", "1"]):
        refused(*NAVIGATION, "--overwrite", "--run-dir", copied, *flags)
    refused("train", "quickstrat", "--overwrite", "--run-dir", copied)


# 11: a run directory that cannot be written

BEFORE_TORCH = """
import sys
from metarl.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""


@pytest.mark.parametrize(
    "place", ["file", "file/run", "/dev/null", "/dev/null/run", "/proc/run", "x" * 300, "dangling"]
)
def test_case_11_a_place_that_cannot_be_written_is_told_before_torch_is_imported(mistake, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("/proc/nowhere/at/all")
    before = listing(tmp_path)
    told = mistake(*NAVIGATION, "--run-dir", place, command=[COMMAND[0], "-c", BEFORE_TORCH])
    assert place[:40] in told and ("cannot" in told or "too long" in told)
    assert listing(tmp_path) == before


def test_case_11_a_disk_that_is_read_only(mistake, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        told = mistake(*NAVIGATION, "--run-dir", disk / "run", command=[COMMAND[0], "-c", BEFORE_TORCH])
        assert f"cannot write to {disk / 'run'}: Read-only file system; choose another with --run-dir" in told


def test_case_11_no_name_of_a_directory(refused):
    for name in ("", " "):
        refused(*NAVIGATION, "--run-dir", name, expected=["--run-dir"])


# 18: other tasks than the agent was made for


@pytest.mark.slow
def test_case_18_tasks_of_other_sizes_name_both_shapes(mistake, run_dir):
    told = mistake("evaluate", run_dir, "--tasks", "HalfCheetahVel", "--num-tasks", "1", "--num-workers", "0")
    assert "(17, 6)" in told and "(2, 2)" in told
    told = mistake("export", run_dir, "x.onnx", "--adapt-on", "HalfCheetahVel")
    assert "(17, 6)" in told and "(2, 2)" in told


def test_case_18_a_checkpoint_of_other_sizes_than_the_config_says(command, copied):
    text = (copied / "config.yaml").read_text()
    assert "\n  - 8\n" in text
    (copied / "config.yaml").write_text(text.replace("\n  - 8\n", "\n  - 9\n"))
    status, _, err = command("evaluate", copied, "--num-tasks", "1", "--num-workers", "0")
    told = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert "does not fit the run's config" in told and "(9, 2)" in told and "(8, 2)" in told


@pytest.mark.slow
def test_case_18_a_run_on_tasks_of_other_sizes_is_not_resumed(mistake, copied):
    flags = ["--stages.0.tasks", "{family: mujoco, name: HalfCheetahVel, horizon: 5}", "--allow-config-change"]
    told = mistake(*NAVIGATION, *flags, "--run-dir", copied, "--resume")
    assert "observation" in told and "17" in told and "2" in told


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ([0.0] * 3, [r"\(3,\)", r"\(2,\)"]),
        ([[0.0]], [r"\(1, 1\)", "2"]),
        (0.0, [r"\(\)", "2"]),
        ([], [r"\(0,\)", "2"]),
        ([[[0.0, 0.0]]], [r"\(1, 1, 2\)", "2"]),
        ([0.0, float("nan")], ["NaN", "nan|finite|NaN"]),
        ([float("inf"), 0.0], ["infinit|finite"]),
    ],
)
def test_predict_refuses_other_shapes_and_what_is_not_finite(run_dir, observation, expected):
    policy = metarl.load(run_dir)
    for pattern in expected:
        with pytest.raises(ValueError, match=pattern):
            policy.predict(observation)


# 25: what is missing on this machine


@pytest.fixture
def without(tmp_path):
    """Make packages that cannot be imported: the environment variables of a process that lacks them."""

    def hide(*packages):
        folder = tmp_path / "hidden"
        for package in packages:
            (folder / package).mkdir(parents=True)
            (folder / package / "__init__.py").write_text(f"raise ImportError('no {package} here')")
        return {"PYTHONPATH": folder, "DISPLAY": None, "WAYLAND_DISPLAY": None, "MUJOCO_GL": None}

    return hide


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    """A run whose tasks MuJoCo draws."""
    tasks = ["--stages.0.tasks", "{family: mujoco, name: HalfCheetahVel, horizon: 5}", "--stages.0.iterations", "1"]
    return trained(tmp_path_factory.mktemp("runs") / "cheetah", *tasks)


@pytest.mark.slow
def test_case_25_no_opengl_says_what_to_install_and_leaves_no_video(mistake, cheetah, without, tmp_path):
    told = mistake("play", cheetah, "--gif", tmp_path / "play.gif", **without("OpenGL"))
    assert "no OpenGL here can draw: `apt install libosmesa6`" in told and "only pictures need it" in told
    assert not (tmp_path / "play.gif").exists()
    told = mistake("play", cheetah, "--gif", tmp_path / "play.gif", MUJOCO_GL="disable")
    assert "MUJOCO_GL=disable switches drawing off; unset it" in told


@pytest.mark.slow
def test_case_25_evaluating_needs_no_opengl(cli, cheetah, without):
    done = cli("evaluate", cheetah, "--num-tasks", "1", "--num-workers", "0", **without("OpenGL"))
    assert done.status == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("onnx", ["export", "{run}", "x.onnx"], "onnx"),
        ("onnxruntime", ["export", "{run}", "x.onnx"], "onnx"),
        ("onnxscript", ["export", "{run}", "x.onnx"], "onnx"),
        ("imageio_ffmpeg", ["play", "{run}", "--video", "x.mp4"], "video"),
    ],
)
def test_case_25_a_missing_extra_names_the_line_that_installs_it(
    mistake, run_dir, without, tmp_path, package, arguments, extra
):
    told = mistake(*(word.format(run=run_dir) for word in arguments), **without(package))
    assert f'pip install "metarl[{extra}]"' in told
    assert not (tmp_path / "x.onnx").exists() and not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize("arguments", [NAVIGATION, ["list", "envs"], ["evaluate", "run"], ["train", "--help"]])
def test_case_25_a_nonsense_choice_of_opengl_is_told_by_every_verb(mistake, arguments):
    mistake(
        *arguments, MUJOCO_GL="nonsense", expected=["MUJOCO_GL=nonsense is nothing that MuJoCo draws with here; unset"]
    )


def test_case_25_help_and_doctor_under_a_nonsense_choice(cli):
    for arguments in (["--help"], ["--version"], ["evaluate", "--help"]):
        done = cli(*arguments, MUJOCO_GL="nonsense")
        assert (done.status, done.err) == (0, "")
    done = cli("doctor", MUJOCO_GL="nonsense")
    assert done.status == 2 and "ok  torch" in done.out and done.err.count("\n") == 1 and "unset it" in done.err


# Directories that hold no run, or a damaged one

READING = {
    "evaluate": ["--num-tasks", "1", "--num-workers", "0"],
    "play": ["--gif", "x.gif"],
    "export": ["x.onnx"],
    "inspect": [],
    "plot": [],
}


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_what_holds_no_run_is_refused(refused, tmp_path, verb, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    told = refused(verb, place, *READING[verb])
    assert told == f"metarl: {place} holds no run: there is no config.yaml; train one with `metarl train CONFIG`\n"


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize("place", ["", " ", "x" * 300, "a/" * 3000, "file/below", "a\nb", "\x1b[2J", "*", "/dev/null"])
def test_names_that_can_hold_no_run(refused, tmp_path, verb, place):
    (tmp_path / "file").write_text("text")
    refused(verb, place, *READING[verb])


@pytest.mark.parametrize("verb", ["evaluate", "play", "export", "inspect"])
def test_a_run_without_a_checkpoint_is_refused(refused, copied, verb):
    shutil.rmtree(copied / "checkpoints")
    for make in (lambda: None, (copied / "checkpoints").mkdir):
        make()
        refused(verb, copied, *READING[verb], expected=["no checkpoint"])


@pytest.mark.parametrize("verb", READING)
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[: len(data) // 2], "config.yaml"),
        (lambda data: b"", "found nothing"),
        (lambda data: bytes(len(data)), "not valid YAML"),
        (lambda data: data.replace(b"seed: 0", b"seed: -7"), "seed: got -7"),
        (lambda data: data.replace(b"num_tasks", b"num_taks", 1), "unknown setting; did you mean 'num_tasks'?"),
        (lambda data: data + b"seed: 1\n", "'seed' is set twice"),
        (lambda data: b"\x80" + data, "not UTF-8"),
    ],
)
def test_a_damaged_config_is_named(refused, copied, verb, damage, expected):
    path = copied / "config.yaml"
    path.write_bytes(damage(path.read_bytes()))
    refused(verb, copied, *READING[verb], expected=[f"{copied}", expected])


GOOD = {"iteration": 1, "stage": 0, "env_steps": 20, "meta_train/return_post": 1.0}


@pytest.mark.parametrize("verb", ["inspect", "plot"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"\xff\xfe\n", "no JSON object"),
        (b"[1, 2]\n", "no JSON object"),
        (b"null\n", "no JSON object"),
        (b"\n", "no JSON object"),
        (b"[" * 100_000 + b"\n", "no JSON object"),
        (b'{"iteration": 1\n', "no JSON object"),
        (b"9" * 5000 + b"\n", "no JSON object"),
        (b"{}\n", "iteration is not a whole number"),
        (json.dumps(GOOD | {"iteration": "1"}).encode() + b"\n", "iteration is not a whole number"),
        (json.dumps(GOOD | {"iteration": True}).encode() + b"\n", "iteration is not a whole number"),
        (json.dumps(GOOD | {"env_steps": -1}).encode() + b"\n", "env_steps is not a whole number"),
        (json.dumps(GOOD | {"stage": 1}).encode() + b"\n", "stage is 1, the run has 1"),
        (
            json.dumps(GOOD | {"meta_train/return_post": "high"}).encode() + b"\n",
            "meta_train/return_post is not a finite",
        ),
        (json.dumps(GOOD | {"meta_train/return_post": {}}).encode() + b"\n", "meta_train/return_post is not a finite"),
        (json.dumps(GOOD | {"meta_test/return_post": None}).encode() + b"\n", "meta_test/return_post is not a finite"),
        (json.dumps(GOOD | {"x": float("nan")}).encode() + b"\n", "x is not a finite number"),
        (json.dumps(GOOD | {"x": 10**400}).encode() + b"\n", "x is not a finite number"),
    ],
)
def test_damaged_metrics_are_named_with_the_line(refused, copied, verb, line, expected):
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line, *lines[1:]]))
    refused(verb, copied, expected=[f"{path}:2: damaged, ", expected, "remove the line, or move the file away"])


def test_metrics_that_are_no_file(refused, copied, tmp_path):
    path = copied / "metrics.jsonl"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(tmp_path / "elsewhere")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        for verb in ("inspect", "plot"):
            refused(verb, copied, expected=["cannot read ", "metrics.jsonl"])


def test_a_last_line_that_was_cut_off_is_passed_over(command, copied):
    path = copied / "metrics.jsonl"
    expected = command("inspect", copied)
    assert expected[0] == 0
    path.write_bytes(path.read_bytes() + b'{"iteration": 3, "sta')
    assert command("inspect", copied) == expected
    assert command("plot", copied)[0] == 0


def test_names_from_a_run_of_others_do_not_steer_the_terminal(command, copied):
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("name: meta-training", 'name: "\\e]0;x\\a\\nfake   line"'))
    status, out, _ = command("inspect", copied)
    assert status == 0 and "\x1b" not in out and "\\x1b]0;x\\x07\\nfake" in out


def test_names_in_brackets_are_names(command, copied, monkeypatch):
    """Not colours, of which `[/red]` would end one that has not begun."""
    monkeypatch.chdir(copied.parent)
    folder = "[red] [/blue]"
    shutil.copytree(copied, folder)
    for arguments in (
        ["evaluate", folder, "--num-tasks", "1", "--num-workers", "0"],
        ["export", folder, f"{folder}/policy.onnx"],
        ["inspect", folder],
        ["plot", folder],
    ):
        status, out, err = command(*arguments)
        assert status == 0, err
        assert f"{folder}/" in out


def test_the_report_of_a_stage_lies_in_the_runs_folder(command, copied):
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("name: meta-training", 'name: "../../evil"'))
    arguments = ["evaluate", copied, "--stage", "../../evil", "--num-tasks", "1", "--num-workers", "0"]
    assert command(*arguments)[0] == 0
    assert [path.name for path in (copied / "evaluation").iterdir() if "evil" in path.name] == ["..-..-evil_test.json"]
    assert not (copied.parent / "evil_test.json").exists()


# What is not the user's mistake


def test_a_run_that_needs_more_memory_than_there_is_says_so(command, monkeypatch, tmp_path):
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] you can't allocate memory: 8 GB")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("metarl.training.train", fail)
        done = command(*NAVIGATION, "--run-dir", tmp_path / "run")
        assert_told_in_one_line(done, "out of memory; lower num_tasks", status=1)


def test_output_that_cannot_be_written_is_no_traceback():
    for unbuffered, told in ((None, "metarl: cannot print: No space left on device\n"), ("1", "metarl: OSError: ")):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, "--help"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(PYTHONUNBUFFERED=unbuffered),
                check=False,
            )
        assert done.returncode == 1 and done.stderr.startswith(told) and done.stderr.count("\n") == 1


def test_a_terminal_without_our_letters_shows_the_others(cli):
    done = cli("list", "configs", PYTHONIOENCODING="ascii")
    assert (done.status, done.err) == (0, "") and len(done.out.splitlines()) == len(embedded_configs())
    assert "RL?" in done.out
