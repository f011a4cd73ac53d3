"""Run directories that hold a run already, that cannot be written, that hold no run, or a damaged one.

The numbers are those of the cases in docs/reliability.md.
"""

import json
import os
import shutil

import pytest

from tests.faults.harness import mounted
from tests.faults.processes import NAVIGATION
from tests.faults.small_runs import listing

# 10: a run directory that holds a run


@pytest.mark.slow
def test_case_10_a_run_is_not_written_over(mistake, cli, copied):
    before = listing(copied)
    message = mistake(*NAVIGATION, "--run-dir", copied)
    assert "already holds a run" in message and "--resume" in message and "--overwrite" in message
    assert listing(copied) == before
    done = cli(*NAVIGATION, "--overwrite", "--run-dir", copied)
    assert done.status == 0 and "finished" in done.out


def test_case_10_no_run_to_go_on_with(refused, copied):
    refused(
        *NAVIGATION, "--run-dir", copied.parent / "new", "--resume", expected=["holds no run to resume; drop --resume"]
    )
    refused(*NAVIGATION, "--run-dir", copied, "--seed", "5", expected=["already holds a run"])
    refused(*NAVIGATION, "--run-dir", copied, "--resume", "--overwrite", expected=["are mutually exclusive"])


def test_case_10_a_mistaken_flag_is_named_before_the_run_in_the_folder(refused, copied):
    refused(*NAVIGATION, "--run-dir", copied, "--agent.inner-lrr", "0.1", expected=["mean --agent.inner-lr?"])


def test_case_10_a_mistake_with_overwrite_costs_no_run(refused, copied):
    for flags in (["--agent.gamma", "7"], ["--stages.0.tasks.name", "gaols"], ["--device", "cuda:1"], ["--sede", "1"]):
        refused(*NAVIGATION, "--overwrite", "--run-dir", copied, *flags)
    refused("train", "quickstrat", "--overwrite", "--run-dir", copied)


# 11: a run directory that cannot be written


@pytest.mark.parametrize(
    "place", ["file", "file/run", "/dev/null", "/dev/null/run", "/proc/run", "x" * 300, "dangling"]
)
def test_case_11_a_place_that_cannot_be_written_is_named(mistake, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("/proc/nowhere/at/all")
    before = listing(tmp_path)
    message = mistake(*NAVIGATION, "--run-dir", place)
    assert place[:40] in message and ("cannot" in message or "too long" in message)
    assert listing(tmp_path) == before


def test_case_11_a_disk_that_is_read_only(mistake, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        message = mistake(*NAVIGATION, "--run-dir", disk / "run")
        assert f"cannot write to {disk / 'run'}: Read-only file system; choose another with --run-dir" in message


def test_case_11_no_name_of_a_directory(refused):
    for name in ("", " "):
        refused(*NAVIGATION, "--run-dir", name, expected=["--run-dir"])


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
    message = refused(verb, place, *READING[verb])
    assert message == f"metarl: {place} holds no run: there is no config.yaml; train one with `metarl train CONFIG`\n"


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


def tracked(changes):
    """Return a line of metrics with some of them changed."""
    good = {"iteration": 1, "stage": 0, "env_steps": 20, "meta_train/return_post": 1.0}
    return json.dumps(good | changes).encode() + b"\n"


@pytest.mark.parametrize("verb", ["inspect", "plot"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"\xff\xfe\n", "not a JSON object"),
        (b"[1, 2]\n", "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (b"\n", "not a JSON object"),
        (b"[" * 100_000 + b"\n", "not a JSON object"),
        (b'{"iteration": 1\n', "not a JSON object"),
        (b"9" * 5000 + b"\n", "not a JSON object"),
        (b"{}\n", "iteration is not an integer"),
        (tracked({"iteration": "1"}), "iteration is not an integer"),
        (tracked({"iteration": True}), "iteration is not an integer"),
        (tracked({"env_steps": -1}), "env_steps is not an integer"),
        (tracked({"stage": 1}), "stage is 1, the run has 1"),
        (tracked({"meta_train/return_post": "high"}), "meta_train/return_post is not a finite"),
        (tracked({"meta_train/return_post": {}}), "meta_train/return_post is not a finite"),
        (tracked({"meta_test/return_post": None}), "meta_test/return_post is not a finite"),
        (tracked({"x": float("nan")}), "x is not a finite number"),
        (tracked({"x": 10**400}), "x is not a finite number"),
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
