"""Every command, Python block and config in README.md and docs/*.md runs as it is written.

Each section of a page is one test. It runs in a folder that looks like a clone of the repository in which the runs in
`RUNS` were trained. Commands run as written, with flags appended that make them small. A few cannot run here; the
nearest form that can is in `STAND_INS`. A command without an entry fails. Inline code is parsed by the real parsers,
without doing the work.
"""

import argparse
import ast
import contextlib
import fcntl
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from metarl.cli import main
from metarl.config.schema import RunConfig, find_config, load_config
from metarl.envs.drawing.rendering import choose_gl, gl_works
from metarl.envs.registration import ENVIRONMENTS
from metarl.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RUNS = {
    "runs/quickstart": "train quickstart",
    "runs/ml10": "train ml10_maml_ppo --seed 1",
    "runs/ml1_reach_rl2": "train ml1_reach_rl2",
    "runs/continual_cued_wedges_rl2": "train continual_cued_wedges_rl2 --stability replay",
}
"""Runs that the pages mention → the command that trains them."""

NOT_RUN: set[tuple[str, str]] = set()
"""Page and first line of each block below `<!-- not run: reason -->`. Slowness is not a reason."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str  # the file that it is saved as
    text: str
    line: int
    not_run: bool


@dataclass(frozen=True)
class Section:
    """The part of a page between two headings of the second level."""

    page: str
    heading: str
    blocks: tuple[Block, ...]

    def __str__(self):
        return f"{self.page}:{self.heading}".replace(" ", "_")


def read_sections(page):
    """Split a page at its headings. A fence begins at the margin and names its language."""
    found, heading, blocks, lines = [], "", [], page.read_text(encoding="utf-8").splitlines()
    name, i = page.relative_to(ROOT).as_posix(), 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = lines.index("```", i + 1)
            info = re.fullmatch(r'```(\w+)(?: title="([^"]+)")?', lines[i])
            assert info, f"{name}:{i + 1}: {lines[i]!r} names no language, or more than a title"
            above = next((line for line in reversed(lines[:i]) if line), "")
            marked = re.fullmatch(r"<!-- not run: .+ -->", above) is not None
            blocks.append(Block(info[1], info[2] or "", "\n".join(lines[i + 1 : end]) + "\n", i + 1, marked))
            i = end
        elif lines[i].startswith("## "):
            found.append(Section(name, heading, tuple(blocks)))
            heading, blocks = lines[i][3:], []
        i += 1
    return [*found, Section(name, heading, tuple(blocks))]


SECTIONS = {page: read_sections(page) for page in PAGES}
RUNNABLE = [section for sections in SECTIONS.values() for section in sections if section.blocks]


def commands(text):
    """Return the commands of a bash block as lists of words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# Making commands small


def small(words):
    """Append flags to a metarl command that make it small. The page's flags win, except for `baseline`."""
    verb, *rest = words
    if "--help" in rest:
        return words
    if verb == "baseline":  # all of its flags are costs; the last one counts
        forced = "--env-steps 120 --num-tasks 1 --eval-episodes 1 --stages.0.tasks.horizon 20"
        return [*words, *forced.split()]
    added = {}
    if verb == "train":
        added = small_training(*rest)
    elif verb == "evaluate" and "--official" in rest:
        added = {"--num-evals": 1, "--adaptation-episodes": 1}
    elif verb == "evaluate":
        added = {"--num-tasks": 1, "--rollouts-per-task": 1, "--num-workers": 0}
    elif verb == "export" and "--adapt-on" in rest:
        added = {"--rollouts-per-task": 1}
    elif verb == "play":
        added = {"--fps": 5, "--speed": 4}
    return [*words, *(str(word) for pair in added.items() if pair[0] not in rest for word in pair)]


def small_training(config, *flags):
    """Return flags for one iteration, two if a run resumes, or one in each of several stages."""
    tree = yaml.safe_load(find_config(config).read_text(encoding="utf-8"))
    stages = range(len(tree["stages"]))
    added = {"--num-tasks": 2, "--rollouts-per-task": 1, "--evaluation.num-tasks": 1, "--num-workers": 0}
    added |= {f"--stages.{i}.tasks.horizon": 20 for i in stages} | {"--device": "cpu"}
    if "rl2" in (flags[flags.index("--agent.name") + 1] if "--agent.name" in flags else tree["agent"]["name"]):
        added |= {"--agent.minibatches": 1, "--agent.epochs": 1}
    if "for_each" in tree["stages"][0] or len(stages) > 1:
        return added | {f"--stages.{i}.iterations": 1 for i in stages}
    return added | {"--max-iterations": 2 if "--resume" in flags else 1}


# Running commands


@pytest.fixture(autouse=True)
def whole_names(monkeypatch):
    """Require whole flag names: argparse accepts a prefix, which on a page is a mistake."""
    begin = argparse.ArgumentParser.__init__

    def begin_strictly(self, *arguments, **more):
        begin(self, *arguments, **{**more, "allow_abbrev": False})

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", begin_strictly)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Return the folder in which the workers of a test run keep trained runs."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "documented"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def clone(tmp_path, monkeypatch, store):
    """Return a folder like an installed clone of the repository, to run commands in."""
    folder = tmp_path / "clone"
    (folder / "scripts").mkdir(parents=True)
    for path in (ROOT / "scripts").iterdir():
        (folder / "scripts" / path.name).symlink_to(path)
    (folder / "scripts" / "_install.sh").unlink()
    (folder / "scripts" / "_install.sh").write_text("install_metarl() { :; }\n", encoding="utf-8")
    for name in ("constraints.txt", "docs", "pyproject.toml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    monkeypatch.chdir(folder)
    return folder


def provide(text, clone, store):
    """Copy the missing runs that a command or script mentions to where it looks for them."""
    for run_dir, command in RUNS.items():
        if not re.search(rf"{run_dir}\b", text) or (clone / run_dir).exists():
            continue
        with (store / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of the workers trains it
            if not (store / run_dir).exists():
                unfinished = store / "unfinished" / run_dir
                metarl([*small(command.split()), "--run-dir", str(unfinished), "--overwrite"])
                (store / run_dir).parent.mkdir(exist_ok=True)
                unfinished.rename(store / run_dir)
        shutil.copytree(store / run_dir, clone / run_dir)


def metarl(words, status=0):
    """Run the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == status, f"metarl {shlex.join(words)}: exit status {ended.value.code}"


def can_draw():
    """Return whether MuJoCo can draw here; if not, `metarl play` says so and exits with status 2."""
    with contextlib.suppress(UserError):
        return gl_works(choose_gl())
    return False


def process(words, **more):
    """Run a program to its end and return its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    settings = {"env": env, "capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run(words, **settings | more)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def pip_install(_, verb, *rest):
    """Check `pip install` without a network: all requested packages and extras must be installed already."""
    assert verb == "install"
    offline = ["--dry-run", "--no-index", "--no-build-isolation"]
    printed = process([sys.executable, "-m", "pip", "install", *offline, *rest], cwd=ROOT)
    assert "does not provide the extra" not in printed, printed


def script(program, *rest):
    """Run a script of the repository; its installer does nothing."""
    flags = []
    if program.endswith("quickstart"):
        flags = [*small(["train", "quickstart", *rest])[2:], "--agent.hidden-sizes", "8"]
    elif program.endswith("test"):
        flags = ["--collect-only", "-q", *rest, "tests/test_statistics.py"]
    assert flags, f"{program}: no flags make it small; add them to script()"
    process([program, *flags])


def tensorboard(program, *rest):
    """Run TensorBoard until it lists the runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *rest, "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        found, until = [], time.monotonic() + 50
        while not found and time.monotonic() < until and server.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/data/runs") as answer:
                found = json.load(answer)
    finally:
        server.terminate()
        errors = server.communicate()[1]
    assert found, f"no runs in TensorBoard: {errors}"


def activate(program, path):
    """Check that `metarl` is a command after `source .venv/bin/activate`."""
    assert path.endswith("activate")
    process(["bash", "-c", f"source {path} && metarl --version"])


STAND_INS = {
    "pip": pip_install,
    "./scripts/quickstart": script,
    "./scripts/test": script,
    "source": activate,
    "tensorboard": tensorboard,
}
"""Program of a page → the function that runs it here; metarl and Python need none."""

SMALL_SCRIPTS = {"docs/examples/control_loop.py": "--seconds 1"}
"""Python script of a page → flags that make it small; the last ones count."""


def run_command(words, clone, store):
    """Run a command of a page."""
    text = " ".join(words)
    assert not set(words) & {"|", "||", "&&", ";", ">", "<", "&"}, f"{text}: one command a line, without a shell"
    program, *rest = words
    if program == "metarl":
        if rest[:1] != ["train"] or "--resume" in rest:
            provide(text, clone, store)
        metarl(small(rest), status=2 if rest[0] == "play" and not can_draw() else 0)
    elif program == "python":
        provide(text, clone, store)
        run_here(*rest, *SMALL_SCRIPTS.get(rest[0], "").split())
    else:
        assert program in STAND_INS, f"{text}: add a way to run {program} to STAND_INS"
        if program == "tensorboard":
            provide("runs/quickstart", clone, store)
        STAND_INS[program](program, *rest)


def run_python(block, clone, store, capsys):
    """Run a Python block as a script and return its output; in a separate process if it starts others."""
    provide(block.text, clone, store)
    path = clone / (block.title or "example.py")
    path.write_text(block.text, encoding="utf-8")
    if "__main__" in block.text and '"num_workers": 0' not in block.text:
        return process([sys.executable, path.name])
    capsys.readouterr()
    run_here(path)
    return capsys.readouterr().out


def run_here(path, *arguments):
    """Run a Python script in this process, where most imports are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(Path.cwd())
        before = set(sys.modules)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"{shlex.join(sys.argv)}: exit status {ended.code}"
        finally:
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == Path.cwd():
                    del sys.modules[name]  # it is a file of this page


def joined(blocks):
    """Join blocks: Python that does not import metarl continues the previous Python block."""
    found = []
    for block in blocks:
        follows = block.language == "python" and not re.search(r"^(import|from) .*\bmetarl\b", block.text, re.MULTILINE)
        if follows:
            assert found and found[-1].language == "python", f"line {block.line}: it imports nothing of metarl"
            found[-1] = replace(found[-1], text=f"{found[-1].text}\n{block.text}")
        else:
            found.append(block)
    return found


# Results that a block must have, beyond ending without errors


def reach_1d_learned(clone, printed):
    gain = ast.literal_eval(printed.strip().splitlines()[-1])
    assert gain["ci95"][0] > 1.0, "adapting to the hidden goal must gain return; without learning the gain is about 0"


def earlier_stages_were_held(clone, printed):
    assert float(printed.strip().splitlines()[-1]) > -1.0
    lines = (clone / "runs" / "hold_still" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    key = "stability/hold_still/loss"
    losses = [line[key] for line in map(json.loads, lines) if key in line]
    assert len(losses) == 3 and max(losses) > 0.0  # in the second stage alone


OUTCOMES = {"class Reach1D": reach_1d_learned, "class HoldStill": earlier_stages_were_held}
"""Text in a Python block → check of its result."""


# Tests


@pytest.mark.slow
@pytest.mark.parametrize("section", RUNNABLE, ids=str)
def test_a_section_runs(section, clone, store, capsys):
    for other in SECTIONS[ROOT / section.page]:
        for block in other.blocks:
            if block.title:
                (clone / block.title).write_text(block.text, encoding="utf-8")
    for block in joined([block for block in section.blocks if not block.not_run]):
        if block.language == "bash":
            for words in commands(block.text):
                run_command(words, clone, store)
        elif block.language == "python":
            printed = run_python(block, clone, store, capsys)
            for part, check in OUTCOMES.items():
                if part in block.text:
                    check(clone, printed)
        elif block.language == "yaml":
            RunConfig.model_validate(yaml.safe_load(block.text))


class Read(BaseException):
    """Raised when the arguments have been parsed, before the work begins."""


@pytest.fixture
def only_read(monkeypatch):
    """Stop commands when they have parsed their arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*_, **__):
        raise Read

    def parse_and_stop(self, *arguments, **more):
        parse(self, *arguments, **more)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("metarl.training.loop.train", stop)
    monkeypatch.setattr("metarl.evaluation.single_task.reference", stop)


@pytest.fixture
def helps(capsys):
    """Return `metarl --help` and the help of each verb by its name."""
    found = {}
    for verb in ("", "train", "evaluate", "export", "play", "inspect", "list", "doctor", "plot", "baseline"):
        with pytest.raises(SystemExit):
            main([verb, "--help"] if verb else ["--help"])
        found[verb] = capsys.readouterr().out
    assert set(found) - {""} == set(re.findall(r"^  (\w+)", found[""], re.MULTILINE))
    return found


def code_in_text(page):
    """Return the inline code of a page, each in one line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def fits_a_config(words):
    """Return whether flags are settings of some config, perhaps with a stability method."""
    for config in ("quickstart", "ml1_reach_rl2", "continual_cued_wedges_rl2"):
        for before in ([], ["--stability", "replay"]):
            with contextlib.suppress(UserError):
                load_config(config, [*before, *words])
                return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_parse(page, helps, request):
    request.getfixturevalue("only_read")  # once the help has been read
    flags = set(re.findall(r"--[a-z][\w.-]*", " ".join(helps.values())))
    for code in code_in_text(page):
        program, *rest = code.split()
        partial = program == "metarl" and (not rest[1:] or re.search(r"[A-Z]{2}|…", code))
        if partial and rest:
            assert rest[0] in helps, code
        if code.startswith("--") or partial:
            found = [word for word in code.split() if word.startswith("--")]
            assert set(found) <= flags or fits_a_config(code.split()), code
        elif program == "metarl":
            with pytest.raises(Read):  # inline code may leave out the run directory
                main([rest[0], "RUN_DIR", *rest[1:]] if rest[1].startswith("--") else rest)
        elif re.fullmatch(r"scripts/\w+/\w+\.py", program) and rest:
            with pytest.raises(Read), pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", code.split())
                runpy.run_path(str(ROOT / program), run_name="__main__")
        elif re.match(r"(\./)?(scripts|tests|docs|metarl|agents|envs)/", program):
            assert (ROOT / program).exists() or program in ENVIRONMENTS, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_checked(page):
    text = page.read_text(encoding="utf-8")
    blocks = [block for section in SECTIONS[page] for block in section.blocks]
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks), "a fence that is not at the margin"
    assert not re.search(r"^~~~|^ {4,}\S.*\bmetarl (train|evaluate)|<pre|<code", text, re.MULTILINE)
    assert {block.language for block in blocks} <= {"bash", "python", "yaml", "text"}
    for block in blocks:
        if block.language == "text":
            assert not re.search(r"^\W*(metarl|python|pip|scripts/\w+)\s", block.text, re.MULTILINE), block
    found = {
        (section.page, block.text.splitlines()[0])
        for section in SECTIONS[page]
        for block in section.blocks
        if block.not_run
    }
    assert found == {(name, line) for name, line in NOT_RUN if ROOT / name == page}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]  # mkdocs checks the headings
        assert path.startswith("http") or (page.parent / path).exists(), target
