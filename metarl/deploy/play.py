"""An episode before adaptation and one after it, side by side: what `metarl play` shows.

Knows environments by gymnasium's interface alone, so that it goes with tasks of one's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from metarl.build import check_env
from metarl.collect import run_episode
from metarl.deploy.policy import Policy
from metarl.envs.drawing.rendering import Frame
from metarl.errors import UserError

# Okabe and Ito's palette for the colour-blind: vermilion, blue, bluish green.
_BEFORE, _AFTER, _SOLVED = "#D55E00", "#0072B2", "#00805C"
_INK, _QUIET, _PAPER = "#111111", "#666666", "#FFFFFF"
_HEADER, _PANEL, _FOOTER, _MARGIN = 68, 360, 34, 16
_MIN_WIDTH = 440
"""Of a panel: the words over it need as much."""

_SHORTEST_S, _LONGEST_S = 4.0, 15.0
_HOLD_S = 1.5
_STEPS_PER_SECOND = 20.0
_SLOWEST_FPS = 0.05


@dataclass(frozen=True)
class Episode:
    """What is seen of one episode; a picture comes from the reset, from some of its steps, and from the last.

    Attributes:
        pictures: F of them, `[H, W, 3]`.
        steps: after how many steps each was taken.
        returns: the undiscounted return until then.
        success: whether the task had been solved by then, 0 or 1; None if the environment does not say.
    """

    pictures: list[Frame]
    steps: list[int]
    returns: list[float]
    success: list[float | None]


@dataclass(frozen=True)
class Play:
    """An episode before adaptation and one after it.

    Attributes:
        before: as the agent begins.
        after: adapted.
        title: what is written below.
        adapted_by: what it adapted by, in words.
        fps: frames a second.
        speed: times real time; None where the environment has no clock (`dt`).
    """

    before: Episode
    after: Episode
    title: str
    adapted_by: str
    fps: float
    speed: float | None

    @property
    def returns(self) -> tuple[float, float]:
        """The returns of both episodes."""
        return self.before.returns[-1], self.after.returns[-1]

    @property
    def success(self) -> tuple[float | None, float | None]:
        """Whether the task was solved at any step of each episode, 0 or 1; None if the environment does not say."""
        return self.before.success[-1], self.after.success[-1]

    @property
    def num_frames(self) -> int:
        """How many frames there are: those of the longer episode, and its last one held for a while."""
        return max(len(self.before.steps), len(self.after.steps)) + round(_HOLD_S * self.fps)

    @property
    def frames(self) -> Iterator[Frame]:
        """The frames `[H, W, 3]`, one after the other, from the first each time; H and W are even."""
        for i in range(self.num_frames):
            yield self._frame(i)

    def _frame(self, i: int) -> Frame:
        """Compose one frame; an episode that has ended shows its last picture."""
        before, after = (_panel(episode, i) for episode in (self.before, self.after))
        width = before.width + after.width + 3 * _MARGIN
        height = _HEADER + max(before.height, after.height) + _FOOTER
        frame = Image.new("RGB", (width + width % 2, height + height % 2), _PAPER)
        draw = ImageDraw.Draw(frame)
        left = _MARGIN
        for panel, episode, label, note, colour in (
            (before, self.before, "before adaptation", "", _BEFORE),
            (after, self.after, "after adaptation", self.adapted_by, _AFTER),
        ):
            right, now = left + panel.width, min(i, len(episode.steps) - 1)
            frame.paste(panel, (left, _HEADER))
            draw.text((left, 20), label, colour, _font(21, bold=True), anchor="lm")
            draw.text((right, 20), note, _QUIET, _font(15), anchor="rm")
            draw.text((left, 48), f"return {episode.returns[now]:.1f}", _INK, _font(19), anchor="lm")
            solved = episode.success[now]
            if solved is not None:
                word, ink = ("✓ solved", _SOLVED) if solved else ("not solved", _QUIET)
                draw.text((right, 48), word, ink, _font(19, bold=bool(solved)), anchor="rm")
            left = right + _MARGIN
        step = max(episode.steps[min(i, len(episode.steps) - 1)] for episode in (self.before, self.after))
        pace = f"step {step}" + ("" if self.speed is None else f", {self.speed:.2g} × real time")
        draw.text((width - _MARGIN, height - _FOOTER / 2), pace, _QUIET, _font(15), anchor="rm")
        title, room = self.title, width - 5 * _MARGIN - _font(15).getlength(pace)
        while title and _font(17).getlength(title) > room:
            title = f"{title[:-2]}…"
        draw.text((_MARGIN, height - _FOOTER / 2), title, _INK, _font(17), anchor="lm")
        return np.asarray(frame)


def play(
    policy: Policy,
    env: gymnasium.Env[Any, Any],
    *,
    seed: int = 0,
    deterministic: bool = False,
    fps: float = 20.0,
    speed: float | None = None,
    title: str = "",
) -> Play:
    """Play an episode, adapt as in training, and play another one from the same seed.

    An agent of the MAML family makes its K steps, each on `rollouts_per_task` fresh episodes of `Policy.record`. Of an
    agent with a memory, the first and the last episode of one trial are shown.

    Args:
        policy: from `metarl.load`, before adaptation.
        env: of one task, made with `render_mode="rgb_array"`; its episodes must end. The control period is read from
            `metadata["render_fps"]`, as gymnasium has it.
        seed: of both episodes, and of all actions.
        deterministic: show the mean actions instead of draws; what a MAML agent adapts on is drawn nonetheless.
        fps: frames a second, about: pictures are taken after whole steps.
        speed: times real time; None for real time, but slower or faster if that would take a full episode less than
            4 s or more than 15 s (as far as the environment tells its horizon).
        title: what is written below.

    Raises:
        UserError: the policy is adapted already, the environment does not fit it, a trial has one episode only, less
            than a frame in 20 s would be shown, or nothing here can draw.
        ValueError: the environment does not draw itself.
    """
    _check(policy, env)
    real_time = float(env.metadata.get("render_fps") or _STEPS_PER_SECOND)  # steps a second
    if speed is None:
        horizon = _horizon(env)
        seconds = horizon / real_time if horizon else _LONGEST_S
        speed = seconds / min(max(seconds, _SHORTEST_S), _LONGEST_S)
    rate = real_time * speed
    if not (_SLOWEST_FPS <= rate < math.inf and fps >= _SLOWEST_FPS):
        raise UserError(
            f"speed {speed:g} means {rate:g} steps a second, and fps is {fps:g}; expected numbers of at least "
            f"{_SLOWEST_FPS:g} for both"
        )
    every = max(1, round(rate / fps))
    run = functools.partial(_run, env=env, deterministic=deterministic, every=every)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed the GPUs as well
        before, memory = run(policy, seed=seed)
        if policy.has_memory:
            episodes = policy.agent.trial_episodes
            for _ in range(episodes - 2):
                _, memory = run(policy, memory=memory, every=None)
            after, _ = run(policy, memory=memory, seed=seed)
            adapted_by = f"{episodes - 1} {'episode' if episodes == 2 else 'episodes'} in memory"
        else:
            steps, episodes = policy.agent.adaptation_steps, policy.config.rollouts_per_task
            for _ in range(steps):
                policy = policy.adapt(policy.record(env, episodes))
            torch.default_generator.manual_seed(seed)
            after, _ = run(policy, seed=seed)
            each = f"{episodes} {'episode' if episodes == 1 else 'episodes'}"
            if policy.agent.adapts_by == "gradient":
                adapted_by = f"1 step on {each}" if steps == 1 else f"{steps} steps, {each} each"
            else:
                adapted_by = f"inferred from {each}"
    clock = hasattr(env.unwrapped, "dt")
    return Play(before, after, title, adapted_by, rate / every, speed if clock else None)


def _check(policy: Policy, env: gymnasium.Env[Any, Any]) -> None:
    if policy.adapted:
        raise UserError("the policy is adapted already, and playing adapts by itself; give the agent before adaptation")
    if env.render_mode != "rgb_array":
        raise ValueError(f'env.render_mode is {env.render_mode!r}; build the environment with render_mode="rgb_array"')
    check_env(policy.spaces, env.observation_space, env.action_space)
    if policy.agent.adapts_by == "nothing":
        raise UserError("the agent does not adapt, so there is nothing after adaptation to show")
    if policy.has_memory and policy.agent.trial_episodes == 1:
        raise UserError("the agent's trials have one episode, so there is none after adaptation to show")


def _horizon(env: gymnasium.Env[Any, Any]) -> int | None:
    """How many steps an episode may have, if the environment tells."""
    task = getattr(env.unwrapped, "task", None)
    if task is not None and "horizon" in dict(getattr(task, "options", ())):
        return int(task.option("horizon"))
    return env.spec.max_episode_steps if env.spec else None


_Memory = tuple[Any, float | None]
"""What lives from one episode of a trial to the next: the state, and the last reward."""


def _run(
    policy: Policy,
    env: gymnasium.Env[Any, Any],
    deterministic: bool,
    every: int | None,
    memory: _Memory = (None, None),
    seed: int | None = None,
) -> tuple[Episode, _Memory]:
    """Run an episode; take a picture at its begin, after each `every` steps, and at its end, or none at all."""
    state, reward = memory
    shown = Episode([], [], [], [])
    total, steps = 0.0, 0
    success: float | None = None

    def show() -> None:
        shown.pictures.append(_picture(env))
        shown.steps.append(steps)
        shown.returns.append(total)
        shown.success.append(success)

    def choose(observation: Any, reward: float, start: bool) -> Any:
        nonlocal state
        if every is not None and steps % every == 0:
            show()
        begins = np.array([start])
        action, state = policy.predict(observation, state, begins, deterministic=deterministic, reward=reward)
        return action

    for step in run_episode(env, choose, seed=seed, reward=math.nan if reward is None else reward):
        reward, total, steps = step.reward, total + step.reward, steps + 1
        if not math.isnan(solved := float(step.info.get("success", math.nan))):  # NaN: it is not defined
            success = max(success or 0.0, solved)
    if every is not None:
        show()
    return shown, (state, reward)


def _picture(env: gymnasium.Env[Any, Any]) -> Frame:
    picture = np.asarray(env.render())
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"render() returned {picture.dtype} {picture.shape}; expected uint8 [H, W, 3]")
    return picture


def _panel(episode: Episode, i: int) -> Image.Image:
    """Return a picture at the height of a panel, with paper at its sides if it is narrow."""
    picture = Image.fromarray(episode.pictures[min(i, len(episode.pictures) - 1)])
    if picture.height != _PANEL:
        size = round(picture.width * _PANEL / picture.height), _PANEL
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if picture.width < _MIN_WIDTH:
        panel = Image.new("RGB", (_MIN_WIDTH, _PANEL), _PAPER)
        panel.paste(picture, ((_MIN_WIDTH - picture.width) // 2, 0))
        return panel
    return picture


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings along."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
