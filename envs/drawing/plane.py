"""Images of 2D navigation, drawn with Pillow. Of metarl it imports only `types`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from metarl.types import FloatArray

HEIGHT, WIDTH = 360, 480
"""Size of an image in pixels."""

_SMOOTH = 3  # supersampling factor, since Pillow's shapes have hard edges
_GRID = 0.5  # distance between grid lines, in units of the plane
_PAPER, _LINES, _AXES = "#FFFFFF", "#E8E8E8", "#BBBBBB"
# Okabe and Ito's palette for the colour-blind.
_POINT, _TRAIL, _GOAL, _REACH = "#0072B2", "#56B4E9", "#E69F00", "#F9E5BA"


def draw_plane(trail: Sequence[FloatArray], goal: FloatArray, radius: float, half_height: float) -> NDArray[np.uint8]:
    """Return an image `[HEIGHT, WIDTH, 3]`, y upwards.

    Args:
        trail: the positions of the point, `[2]` each, oldest first; one outside the image is drawn at its edge.
        goal: the goal, `[2]`.
        radius: the distance at which the goal counts as reached.
        half_height: the distance from the origin to the upper and lower edge, in units of the plane.
    """
    scale = _SMOOTH * HEIGHT / 2 / half_height
    half_width = half_height * WIDTH / HEIGHT
    image = Image.new("RGB", (WIDTH * _SMOOTH, HEIGHT * _SMOOTH), _PAPER)
    draw = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[float, float]:
        return (half_width + x) * scale, (half_height - y) * scale

    def disc(centre: FloatArray, pixels: float, colour: str) -> None:
        x, y = place(*centre)
        draw.ellipse((x - pixels, y - pixels, x + pixels, y + pixels), fill=colour)

    count = int(half_width / _GRID)
    for k in range(-count, count + 1):
        colour = _LINES if k else _AXES
        draw.line((place(k * _GRID, -half_height), place(k * _GRID, half_height)), fill=colour, width=_SMOOTH)
        draw.line((place(-half_width, k * _GRID), place(half_width, k * _GRID)), fill=colour, width=_SMOOTH)
    disc(goal, radius * scale, _REACH)
    disc(goal, 5 * _SMOOTH, _GOAL)
    edge = np.array([half_width, half_height]) * 0.98
    inside = [np.clip(position, -edge, edge) for position in trail]
    draw.line([place(*position) for position in inside], fill=_TRAIL, width=3 * _SMOOTH, joint="curve")
    disc(inside[-1], 7 * _SMOOTH, _POINT)
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))
