"""Which OpenGL is chosen, and what is in the files that are written."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from metarl.envs.drawing import rendering
from metarl.envs.drawing.rendering import check_gl, choose_gl, gl_works, write_gif, write_mp4
from metarl.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """A Linux machine on which some backends work; returns the list of those that were tried."""
    tried = []

    def with_working(*backends, system="Linux", **environment):
        def run(command, env, **options):
            tried.append(env["MUJOCO_GL"])
            compile(command[-1], "probe", "exec")
            return SimpleNamespace(returncode=0 if env["MUJOCO_GL"] in backends else 1)

        for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.setenv(name, "")  # so that it is restored afterwards
            os.environ.pop(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(rendering.subprocess, "run", run)
        monkeypatch.setattr(rendering.platform, "system", lambda: system)
        gl_works.cache_clear()
        return tried

    yield with_working
    gl_works.cache_clear()


@pytest.mark.parametrize(
    ("working", "chosen", "tried"),
    [
        (("egl", "osmesa"), "egl", ["egl"]),
        (("osmesa",), "osmesa", ["egl", "osmesa"]),
    ],
)
def test_the_first_that_works_is_chosen_and_passed_on(machine, working, chosen, tried):
    asked = machine(*working)
    assert choose_gl() == chosen == os.environ["MUJOCO_GL"]
    assert choose_gl() == chosen
    assert asked == tried  # once each


def test_what_the_user_has_set_stays(machine):
    asked = machine("egl", MUJOCO_GL="osmesa")
    assert choose_gl() == "osmesa" == os.environ["MUJOCO_GL"]
    machine("egl", MUJOCO_GL="on")  # MuJoCo's word for its default
    assert choose_gl() == "glfw"
    assert asked == []


def test_nothing_that_draws_is_said_with_the_cure(machine):
    asked = machine()
    with pytest.raises(UserError, match="`apt install libosmesa6`, or libegl1 and a driver") as error:
        choose_gl()
    assert "\n" not in str(error.value) and "only rendering needs it" in str(error.value)
    assert asked == ["egl", "osmesa"] and "MUJOCO_GL" not in os.environ


def test_drawing_that_is_switched_off_is_said(machine):
    machine("egl", MUJOCO_GL="Off")
    with pytest.raises(UserError, match="MUJOCO_GL=off turns rendering off"):
        choose_gl()


@pytest.mark.parametrize(
    ("system", "unknown", "known"),
    [("Linux", "wgl", "GLX"), ("Darwin", "egl", "cgl"), ("Windows", "osmesa", "wgl"), ("Linux", "foo", " ")],
)
def test_what_mujoco_does_not_know_is_refused(machine, system, unknown, known):
    asked = machine(system=system, MUJOCO_GL=unknown)
    for check in (check_gl, choose_gl):
        with pytest.raises(UserError, match=f"MUJOCO_GL={unknown} is not supported by MuJoCo on this system; unset it"):
            check()
    machine(system=system, MUJOCO_GL=known)
    check_gl()
    machine(system=system, MUJOCO_GL="off")  # which matters to what is drawn with MuJoCo alone
    check_gl()
    assert asked == []


def test_a_display_is_the_last_choice(machine):
    asked = machine("glfw", DISPLAY=":0")
    assert choose_gl() == "glfw"
    assert asked == ["egl", "osmesa", "glfw"]


@pytest.mark.parametrize(("system", "backend"), [("Darwin", "cgl"), ("Windows", "glfw")])
def test_other_systems_have_one_way(machine, system, backend):
    asked = machine(system=system)
    assert choose_gl() == backend and asked == []


def test_a_probe_that_hangs_or_cannot_start_is_a_no(machine, monkeypatch):
    for error in (subprocess.TimeoutExpired("python", 1), OSError("no such file")):
        machine()

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(rendering.subprocess, "run", fail)
        assert not gl_works("egl")


def test_the_probe_draws():
    """As a process of its own, which says nothing on the terminal."""
    gl_works.cache_clear()
    try:
        choose_gl()
    except UserError as error:
        pytest.skip(str(error))
    assert gl_works(choose_gl())
    assert not gl_works("nonsense")


# Files

COLOURS = ((230, 159, 0), (0, 114, 178), (0, 158, 115), (213, 94, 0))


def frames(count=4, height=90, width=120, square=30):
    """Grey frames with a square at the left that has another colour in each."""
    for i in range(count):
        frame = np.full((height, width, 3), 128, dtype=np.uint8)
        frame[:square, :square] = COLOURS[i % len(COLOURS)]
        yield frame


def noise(count, height, width):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_mp4(path):
    """Codec, frames a second and frames, by ffmpeg itself: imageio's reader leaves pipes open."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    codec, width, height, fps = re.search(r"Video: (\w+).*, (\d+)x(\d+).*, ([\d.]+) fps", done.stderr.decode()).groups()
    return codec, float(fps), np.frombuffer(done.stdout, np.uint8).reshape(-1, int(height), int(width), 3)


def read_gif(path):
    shown, durations = [], []
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shown.append(np.asarray(gif.convert("RGB")))
    return shown, durations


def test_mp4_holds_the_frames(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    write_mp4(frames(), path, fps=12.5)
    codec, fps, read = read_mp4(path)
    assert (codec, fps, read.shape) == ("h264", 12.5, (4, 90, 120, 3))
    for frame, colour in zip(read, COLOURS, strict=True):
        np.testing.assert_allclose(frame[8:22, 8:22].mean((0, 1)), colour, atol=12)
        np.testing.assert_allclose(frame[60:, 60:].mean((0, 1)), 128, atol=3)
    assert list(path.parent.iterdir()) == [path]


def test_gif_holds_the_frames(tmp_path):
    path = tmp_path / "a.gif"
    write_gif(frames(), path, fps=10)
    shown, durations = read_gif(path)
    assert len(shown) == 4 and durations == [100] * 4
    for frame, colour in zip(shown, COLOURS, strict=True):
        assert frame.shape == (90, 120, 3)
        np.testing.assert_allclose(frame[15, 15], colour, atol=8)
        np.testing.assert_allclose(frame[60, 60], 128, atol=8)


def test_gif_has_at_most_ten_frames_a_second_and_holds_what_stands_still(tmp_path):
    path = tmp_path / "a.gif"
    moving = list(frames(8))
    write_gif([*moving, *[moving[-1]] * 8], path, fps=20)  # every second one of 16: 4 that move, and 4 alike
    shown, durations = read_gif(path)
    # frames 0, 2, 4, 6 at 100 ms each; 8, 10, 12 and 14 are the same as each other
    assert durations == [100, 100, 100, 100, 400]
    np.testing.assert_allclose(shown[1][15, 15], COLOURS[2], atol=8)


def test_gif_of_a_busy_but_static_background_stays_small(tmp_path):
    (background,) = noise(1, 90, 120)
    moving = []
    for i in range(12):
        moving.append(background.copy())
        for top in (0, 80):  # changes in opposite corners, so that cropping a frame to them does not help
            moving[-1][top : top + 10, 9 * i : 9 * i + 10] = COLOURS[0]
    write_gif(moving[:1], tmp_path / "one.gif", fps=10)
    write_gif(moving, tmp_path / "all.gif", fps=10)
    # A change covers 2 · 10 · 18 of 90 · 120 pixels, so that eleven of them cover 0.37 frames.
    assert (tmp_path / "all.gif").stat().st_size < 2 * (tmp_path / "one.gif").stat().st_size
    assert read_gif(tmp_path / "all.gif")[1] == [100] * 12


def test_gif_keeps_the_colour_of_small_things(tmp_path):
    shades = [np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(200, axis=1) for _ in range(2)]
    for shade in shades:
        shade[100:110, 100:110] = (240, 228, 66)
    write_gif(shades, tmp_path / "a.gif", fps=10)
    np.testing.assert_allclose(read_gif(tmp_path / "a.gif")[0][0][105, 105], (240, 228, 66), atol=24)


def test_gif_becomes_smaller_until_it_fits(tmp_path):
    path, limit = tmp_path / "a.gif", 900_000
    write_gif(noise(6, 500, 1000), path, fps=10, max_bytes=limit)
    shown, _ = read_gif(path)
    assert path.stat().st_size <= limit
    assert shown[0].shape[1] in (360, 480, 600) and shown[0].shape[0] * 2 == shown[0].shape[1]
    write_gif(noise(6, 500, 1000), path, fps=10, max_bytes=1)
    shown, durations = read_gif(path)
    assert shown[0].shape == (180, 360, 3) and durations == [400, 400]  # the smallest that there is


def test_files_appear_whole_or_not_at_all(tmp_path):
    def broken():
        yield from frames(2)
        raise RuntimeError("the simulator fell over")

    for write, name in ((write_mp4, "a.mp4"), (write_gif, "a.gif")):
        path = tmp_path / name
        path.write_text("the one before")
        with pytest.raises(RuntimeError, match="fell over"):
            write(broken(), path, 10)
        assert path.read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    for write, name in ((write_mp4, "a.mp4"), (write_gif, "a.gif")):
        with pytest.raises(UserError, match=r"cannot write .*(Not a directory|File exists)"):
            write(frames(), tmp_path / "file" / name, 10)


def test_a_place_where_ffmpeg_could_not_write_is_said_in_one_line(capfd):
    with pytest.raises(UserError, match=r"^cannot write /proc/y\.mp4: .*; choose another place$"):
        write_mp4(frames(), Path("/proc/y.mp4"), 10)
    assert capfd.readouterr() == ("", "")


def test_what_ffmpeg_says_on_the_way_is_cut_to_a_line(tmp_path):
    def full():
        yield from frames(1)
        raise OSError("Broken pipe\n\nFFMPEG COMMAND:\nffmpeg")

    with pytest.raises(UserError, match=r"a\.mp4: Broken pipe; choose another place$"):
        write_mp4(full(), tmp_path / "a.mp4", 10)


def test_the_missing_extra_is_said_with_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(rendering.sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r'pip install "metarl\[video\]"'):
        write_mp4(frames(), tmp_path / "a.mp4", 10)
    write_gif(frames(), tmp_path / "a.gif", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
