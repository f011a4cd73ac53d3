"""Choice of OpenGL backend, render modes, and MP4 and GIF files. Of metarl it imports only `errors`.

MuJoCo renders off screen through EGL (a GPU driver, or Mesa) or OSMesa (the CPU). Each is tested in a subprocess,
because a broken driver writes on stderr and leaves PyOpenGL in a state from which a process cannot recover.
"""

from __future__ import annotations

import functools
import io
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Frame = NDArray[np.uint8]
"""Image `[H, W, 3]`."""

RENDER_MODES = ("rgb_array",)
"""Render modes of the environments of metarl, besides None."""

OFF_SCREEN = ("egl", "osmesa")
"""OpenGL backends that need no display, in the order in which they are tried: GPU first."""

_SWITCHED_OFF = ("0", "disable", "disabled", "false", "off")
_DEFAULT = ("", "1", "enable", "enabled", "glfw", "on", "true")  # in MuJoCo's spelling
_OF_SYSTEM = {"Linux": ("egl", "osmesa", "glx"), "Windows": ("wgl",), "Darwin": ("cgl",)}
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 9"/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().max() > 0
renderer.close()
"""
_PROBE_TIMEOUT_S = 60.0

GIF_BYTES = 3_000_000
"""Default maximum size of a GIF."""

_GIF_FPS = 10.0
_GIF_SIZES = ((840, 1), (720, 1), (600, 1), (480, 1), (480, 2), (360, 2), (360, 4))
"""(width, stride over frames) to try in turn."""
_GIF_COLOURS = 128  # leaves room for transparency, with which Pillow encodes unchanged pixels


def render_metadata(steps_per_second: float) -> dict[str, Any]:
    """Return the `metadata` of a gymnasium environment."""
    return {"render_modes": list(RENDER_MODES), "render_fps": round(steps_per_second)}


def check_render_mode(render_mode: str | None) -> None:
    """Raise ValueError for an unknown render mode."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode is {render_mode!r}; expected None or {' or '.join(map(repr, RENDER_MODES))}")


def check_gl() -> None:
    """Raise UserError if `MUJOCO_GL` has a value with which mujoco cannot be imported on this system."""
    chosen = _chosen_gl()
    if chosen not in (*_SWITCHED_OFF, *_DEFAULT, *_OF_SYSTEM.get(platform.system(), ())):
        alternative = ", or set it to egl or osmesa" if platform.system() == "Linux" else ""
        raise UserError(f"MUJOCO_GL={chosen} is not supported by MuJoCo on this system; unset it{alternative}")


def _chosen_gl() -> str:
    return os.environ.get("MUJOCO_GL", "").strip().lower()


def choose_gl() -> str:
    """Return the OpenGL backend for MuJoCo: `egl`, `osmesa`, `glfw` or, on macOS, `cgl`.

    `MUJOCO_GL` decides if it is set. Otherwise it is set to the first backend that works, for all later rendering in
    this process and its children. MuJoCo's own `Renderer` reads it when mujoco is imported.

    Raises:
        UserError: no backend works; the message says what to install, or how to change `MUJOCO_GL`.
    """
    check_gl()
    chosen = _chosen_gl()
    if chosen in _SWITCHED_OFF:
        raise UserError(f"MUJOCO_GL={chosen} turns rendering off; unset it, or set it to egl or osmesa")
    if platform.system() != "Linux":
        return "cgl" if platform.system() == "Darwin" else "glfw"
    if chosen:
        return chosen if chosen in OFF_SCREEN else "glfw"
    on_screen: tuple[str, ...] = ()
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        on_screen = ("glfw",)
    for backend in (*OFF_SCREEN, *on_screen):
        if gl_works(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise UserError(
        "no OpenGL backend works here: `apt install libosmesa6`, or libegl1 and a driver; only rendering needs it"
    )


@functools.cache
def gl_works(backend: str) -> bool:
    """Return whether MuJoCo can draw a small scene with a backend, in a subprocess; takes about a second."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def check_mp4() -> None:
    """Raise UserError if MP4 cannot be written because the extra `video` is missing."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f'MP4 needs the extra video: pip install "metarl[video]" ({error})') from error


def write_mp4(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """Write an MP4 (H.264), atomically.

    Args:
        frames: the frames, `[H, W, 3]` each, of equal size; H and W even.
        path: the file to write or replace.
        fps: frames per second.

    Raises:
        UserError: the extra `video` is missing, or the file cannot be written.
    """
    check_mp4()
    import imageio_ffmpeg

    with _replacing(path) as temporary:
        writer: Any = None
        try:
            for frame in frames:
                if writer is None:
                    height, width, _ = frame.shape
                    writer = imageio_ffmpeg.write_frames(
                        str(temporary), (width, height), fps=fps, quality=8, macro_block_size=2
                    )
                    writer.send(None)
                writer.send(np.ascontiguousarray(frame))
        finally:
            if writer is not None:
                writer.close()


def write_gif(frames: Iterable[Frame], path: Path, fps: float, max_bytes: int = GIF_BYTES) -> None:
    """Write a looping GIF, atomically, with at most 10 frames per second and the largest width that fits `max_bytes`.

    Args:
        frames: the frames, `[H, W, 3]` each, of equal size.
        path: the file to write or replace.
        fps: frames per second of `frames`.
        max_bytes: the maximum size of the file; if no size fits, the smallest is written.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image

    every = max(1, round(fps / _GIF_FPS))
    images = [Image.fromarray(frame) for i, frame in enumerate(frames) if i % every == 0]
    for width, stride in _GIF_SIZES:
        gif = _encode_gif(images[::stride], width, 1000 * every * stride / fps)
        if len(gif) <= max_bytes:
            break
    with _replacing(path) as temporary:
        temporary.write_bytes(gif)


def _encode_gif(images: Sequence[Image.Image], width: int, frame_ms: float) -> bytes:
    """Return a GIF of at most `width` pixels, in one palette and without dithering: static regions cost no bytes."""
    from PIL import Image

    full_width, full_height = images[0].size
    width = min(width, full_width)
    size = width, round(full_height * width / full_width)
    resized = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    sample = np.concatenate([np.asarray(image) for image in resized[:: max(1, len(resized) // 6)]])
    # An octree keeps the colours of small objects, unlike the median cut.
    palette = Image.fromarray(sample).quantize(_GIF_COLOURS, method=Image.Quantize.FASTOCTREE)
    first, *rest = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in resized)
    target = io.BytesIO()
    duration_ms = 10 * max(2, round(frame_ms / 10))  # GIF counts in hundredths of a second
    first.save(target, "GIF", save_all=True, append_images=rest, duration=duration_ms, loop=0, optimize=True)
    return target.getvalue()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that then replaces `path`; an OSError becomes a UserError."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # ffmpeg infers the format from the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fails with a short reason; ffmpeg would print a screenful
        yield temporary
        temporary.replace(path)
    except OSError as error:
        cause = error.strerror or str(error).partition("\n")[0]  # imageio_ffmpeg raises a screenful
        raise UserError(f"cannot write {path}: {cause}; choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
