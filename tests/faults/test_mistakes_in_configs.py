"""Mistakes in a config are reported like those in arguments, with file and place; nothing is executed.

The numbers are those of the cases in docs/reliability.md.
"""

import os
import tempfile
from pathlib import Path

import pytest
import yaml

from metarl.config.schema import dump_config, load_config
from metarl.config.yaml_io import MOST_BYTES
from metarl.errors import UserError
from tests.faults.processes import COMMAND, NAVIGATION, assert_one_line_error, run_cli
from tests.faults.small_runs import listing

# 3: settings that are none


def test_case_03_an_unknown_key_is_named_with_file_path_and_the_nearest(mistake, config):
    path = config("agent: {outer: {lrr: 0.1}}")
    message = mistake("train", path)
    assert message == f"metarl: {path}: agent.outer.lrr: unknown setting; did you mean 'lr'?\n"


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
    message = mistake(*NAVIGATION, *flags.split())
    for expected in (
        "--agent.outer.lr: got -1, expected greater than 0",
        "--agent.gamma: got 1.5, expected less than or equal to 1",
        "--num-tasks: got 0, expected greater than or equal to 1",
        "--agent.inner-lr: got 'nan', expected a finite number",
    ):
        assert expected in message
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
        ("seed", "9" * 5000, "is not a valid int"),
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
    message = refused("train", config(text), expected=[expected])
    assert setting in message or "mine.yaml:1:" in message or last in message


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
        ("agent: 5", "agent: got 5, expected nested settings"),
        ("agent:", "agent: got None, expected nested settings"),
        ("agent: [a]", "agent: expected nested settings"),
        ("agent: {name: [maml_ppo]}", "agent: got ['maml_ppo'], expected one of maml_ppo"),
        ("agent: {outer: 3}", "agent.outer: got 3, expected nested settings"),
        ("stages: reach", "stages: got 'reach', expected a list"),
        ("stages: {}", "stages: expected a list"),
        ("stages: []", "stages: expected at least 1 item"),
        ("stages: [null]", "stages.0: got None, expected nested settings"),
        ("stages: [[]]", "stages.0: expected nested settings"),
        ("stages: [{tasks: 3}]", "stages.0.tasks: got 3, expected nested settings"),
        ("stages: [{init_from: ''}]", "stages.0.init_from: got '', expected at least 1 character"),
        ('stages: [{init_from: "a\\0b"}]', "stages.0.init_from: got 'a\\x00b', expected the path of a run directory"),
        ("stability: 5", "stability.0: got 5, expected nested settings"),
        ("seed: 2020-01-01", "seed: got datetime.date(2020, 1, 1), expected a valid integer"),
        ("seed: !!binary aGk=", "seed: got b'hi', expected a valid integer"),
        ('stages: [{name: "\\ud800"}]', ":1:17: not valid YAML: an unpaired surrogate"),
        ("seed: 0b_", ":1:7: not valid YAML: '0b_' is not a valid int"),
        ("seed: 010", "010 means 8 in YAML 1.1"),
        ("seed: 1:30", "1:30 means 90 in YAML 1.1"),
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
        (b"seed: 1 # caf\xe9", "byte 14 is not UTF-8; save the file as UTF-8"),
        ("seed: 1".encode("utf-16"), "byte 1 is not UTF-8"),
        (bytes(range(256)) * 40, "not valid YAML"),
        (b"PK\x03\x04" + bytes(1000), "not valid YAML"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{a: " * 100_000, "nested too deeply"),
        (b"- " * 100_000, "nested too deeply"),
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
    refused("train", path, expected=["expanded it has more than 100,000 values"])
    refused("train", config("\n".join(["l0: &l0 {a: 1}", *layers, "agent: {outer: *l11}"])), expected=["100,000"])


def test_case_05_a_file_that_cannot_hold_settings(refused, config, tmp_path):
    sparse = config("seed: 0\n", "huge.yaml")
    os.truncate(sparse, 100 << 20)
    refused("train", sparse, expected=[f"huge.yaml has more than {MOST_BYTES:,} bytes"])
    dashes = config(b"seed: 0 # " + b"x" * MOST_BYTES)
    refused("train", dashes, expected=["is this another file?"])
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in ("folder.yaml", "pipe.yaml", "dangling.yaml", "loop.yaml", "missing.yaml", "/dev/null", "/dev/zero"):
        refused("train", name, expected=["neither a file nor an embedded config", "metarl list configs"])
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
        as_nobody = [
            COMMAND[0],
            "-c",
            f"import os, metarl.config.schema, metarl.deploy.policy\nos.setuid(65534)\n{COMMAND[2]}",
        ]
        for arguments, place in (
            (["train", folder / "secret.yaml", "--run-dir", folder / "open" / "run"], "secret.yaml"),
            (["train", folder / "closed" / "x.yaml", "--run-dir", folder / "open" / "run"], "x.yaml"),
            (["train", "quickstart", "--run-dir", folder / "closed" / "run"], "run"),
            (["inspect", folder / "closed"], "closed"),
            (["plot", folder / "closed" / "run"], "closed"),
        ):
            done = run_cli(*arguments, cwd=folder, command=as_nobody)
            assert_one_line_error(done, "cannot ", place, "Permission denied")
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
        "agent: !!python/object:metarl.agents.maml.maml.MamlPpoConfig {{}}",
        "%TAG ! tag:yaml.org,2002:python/\n---\nseed: !object/apply:os.mkdir ['{marker}']",
        "stages: [{{name: !!python/tuple [a]}}]",
        "seed: !other 1",
    ],
)
def test_case_06_yaml_that_names_code_is_refused(refused, config, tmp_path, form):
    marker = tmp_path / "executed"
    refused(
        "train", config(form.format(marker=marker)), expected=["asks for an object; settings can only be text, numbers"]
    )
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
    assert_one_line_error(done, "config.yaml:1:7: not valid YAML")
    assert not (tmp_path / "executed").exists()
