"""What a machine lacks: a GPU, OpenGL, a package, memory, room, letters. The error is one line, too.

The numbers are those of the cases in docs/reliability.md.
"""

import subprocess

import pytest

from metarl.config.schema import embedded_configs
from tests.faults.processes import COMMAND, NAVIGATION, assert_one_line_error, environment
from tests.faults.small_runs import listing

# 9: a GPU that is not there


@pytest.mark.slow
def test_case_09_a_gpu_that_is_not_there_is_refused(mistake, cli, run_dir, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    message = mistake(*NAVIGATION, "--device", "cuda", "--run-dir", tmp_path / "run", **hidden)
    assert "PyTorch finds no GPU here; use --device cpu or auto" in message and listing(tmp_path) == {}
    mistake("evaluate", run_dir, "--device", "cuda", expected=["--device cpu or auto"], **hidden)
    done = cli(*NAVIGATION, "--device", "auto", "--run-dir", tmp_path / "run", **hidden)
    assert done.status == 0, done.err


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:0", "mps", "0"])
def test_case_09_other_devices(refused, device):
    refused(*NAVIGATION, "--device", device, expected=["--device: got ", "expected 'auto', 'cpu' or 'cuda'"])


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
def cheetah(trained):
    """A run whose tasks MuJoCo draws."""
    tasks = ["--stages.0.tasks", "{family: mujoco, name: HalfCheetahVel, horizon: 5}", "--stages.0.iterations", "1"]
    return trained("cheetah", *tasks)


@pytest.mark.slow
def test_case_25_no_opengl_says_what_to_install_and_leaves_no_video(mistake, cheetah, without, tmp_path):
    message = mistake("play", cheetah, "--gif", tmp_path / "play.gif", **without("OpenGL"))
    assert "no OpenGL backend works here: `apt install libosmesa6`" in message and "only rendering needs it" in message
    assert not (tmp_path / "play.gif").exists()
    message = mistake("play", cheetah, "--gif", tmp_path / "play.gif", MUJOCO_GL="disable")
    assert "MUJOCO_GL=disable turns rendering off; unset it" in message


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
    message = mistake(*(word.format(run=run_dir) for word in arguments), **without(package))
    assert f'pip install "metarl[{extra}]"' in message
    assert not (tmp_path / "x.onnx").exists() and not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_case_25_a_nonsense_choice_of_opengl_is_named_by_whatever_needs_mujoco(mistake, tmp_path, workers):
    train = ["train", "half_cheetah_dir_maml_ppo", "--run-dir", tmp_path / "run", "--num-workers", workers]
    mistake(
        *train, MUJOCO_GL="nonsense", expected=["MUJOCO_GL=nonsense is not supported by MuJoCo on this system; unset"]
    )


def test_case_25_all_else_works_under_a_nonsense_choice_and_the_doctor_reports_it(cli):
    for arguments in (["--help"], ["list", "envs"], ["train", "--help"], ["evaluate", "--help"], NAVIGATION):
        done = cli(*arguments, MUJOCO_GL="nonsense")
        assert (done.status, done.err) == (0, "")
    done = cli("doctor", MUJOCO_GL="nonsense")
    assert done.status == 1 and "ok  torch" in done.out and "BAD mujoco" in done.out and "unset it" in done.out


# Memory, room, letters


def test_a_run_that_needs_more_memory_than_there_is_says_so(command, monkeypatch, tmp_path):
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] you can't allocate memory: 8 GB")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("metarl.training.loop.train", fail)
        done = command(*NAVIGATION, "--run-dir", tmp_path / "run")
        assert_one_line_error(done, "out of memory; lower num_tasks", status=1)


def test_output_that_cannot_be_written_is_no_traceback():
    for unbuffered, message in (
        (None, "metarl: cannot write to stdout: No space left on device\n"),
        ("1", "metarl: OSError: "),
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, "--help"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(PYTHONUNBUFFERED=unbuffered),
                check=False,
            )
        assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_a_terminal_without_our_letters_shows_the_others(cli):
    done = cli("list", "configs", PYTHONIOENCODING="ascii")
    assert (done.status, done.err) == (0, "") and len(done.out.splitlines()) == len(embedded_configs())
    assert "RL?" in done.out
