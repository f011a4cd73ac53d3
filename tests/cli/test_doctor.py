"""`metarl doctor`: what must be there, what is optional, and how to get it."""

import itertools
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from metarl.cli import doctor, main
from metarl.envs.drawing import rendering
from metarl.errors import UserError

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def findings(monkeypatch, capsys):
    """Run `metarl doctor` without some packages: the status, and what it says of each thing."""
    monkeypatch.setattr(doctor, "_steps_per_second", lambda family, options: 1234.5)
    monkeypatch.setattr(rendering, "choose_gl", lambda: "egl")
    monkeypatch.setattr(rendering, "gl_works", lambda backend: True)

    def run(*missing):
        def version_unless_missing(name):
            if name in missing:
                raise PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(doctor, "version", version_unless_missing)
        with pytest.raises(SystemExit) as error:
            main(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        return error.value.code, {line[4:24].strip(): (line[:4].strip(), line[24:]) for line in lines}

    return run


def test_all_is_well(findings):
    status, found = findings()
    assert status == 0 and {state for state, _ in found.values()} == {"ok"}
    assert found["mujoco"] == ("ok", "1,234 env steps/s in one process")
    assert found["rendering"] == ("ok", "OpenGL with egl")
    assert "--device auto is " in found["gpu"][1]
    assert "python" in found and "cpu cores" in found


def test_a_missing_extra_is_no_fault_and_has_its_pip_line(findings):
    status, found = findings("imageio-ffmpeg", "onnxruntime")
    assert status == 0
    assert found["extra video"] == ("--", 'no imageio-ffmpeg (metarl play as MP4): pip install "metarl[video]"')
    state, detail = found["extra onnx"]
    assert state == "--" and detail.startswith("no onnxruntime ") and detail.endswith('pip install "metarl[onnx]"')


def test_a_missing_library_is_a_fault(findings):
    status, found = findings("torch")
    assert status == 1 and found["torch"] == ("BAD", "missing: pip install torch")


def test_nothing_that_draws_is_no_fault(findings, monkeypatch):
    def fail():
        raise UserError("no OpenGL here")

    monkeypatch.setattr(rendering, "choose_gl", fail)
    status, found = findings()
    assert status == 0 and found["rendering"] == ("--", "no OpenGL here")
    monkeypatch.setattr(rendering, "choose_gl", lambda: "glfw")
    monkeypatch.setattr(rendering, "gl_works", lambda backend: False)
    status, found = findings()
    assert status == 0 and found["rendering"][0] == "--" and "unset MUJOCO_GL" in found["rendering"][1]


def test_a_simulator_that_fails_is_a_fault(findings, monkeypatch):
    monkeypatch.setattr(doctor, "_steps_per_second", lambda family, options: 1 / 0)
    status, found = findings()
    assert status == 1 and found["metaworld"] == ("BAD", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(("name", "weak"), [("torch", "2.9.1"), ("pillow", "12.2.0"), ("onnx", "1.20.1")])
def test_versions_with_known_weaknesses_are_not_installed(name, weak):
    """torch before 2.10: CVE-2025-32434 and CVE-2026-24747; docs/reliability.md names the others."""
    listed = [*PYPROJECT["dependencies"], *itertools.chain(*PYPROJECT["optional-dependencies"].values())]
    requirements = [each for each in map(Requirement, listed) if each.name == name]
    assert requirements and not any(each.specifier.contains(weak) for each in requirements)


def test_the_extras_are_those_of_the_package():
    listed = {
        extra: tuple(re.split(r"[<>=]", requirement)[0] for requirement in PYPROJECT["optional-dependencies"][extra])
        for extra in doctor.EXTRAS
    }
    assert {extra: sorted(packages) for extra, (packages, _) in doctor.EXTRAS.items()} == {
        extra: sorted(packages) for extra, packages in listed.items()
    }
    for_users = PYPROJECT["optional-dependencies"].keys() - {"dev", "docs"}
    assert for_users == doctor.EXTRAS.keys()
