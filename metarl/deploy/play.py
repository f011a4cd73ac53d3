"""Videos of an episode before and one after adaptation, side by side, as `metarl play` shows them.

Uses only gymnasium's interface of environments, so that it works with custom tasks.
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

from metarl.build import check_spaces
from metarl.collect import run_episode
from metarl.deploy.policy import Policy
from metarl.envs.drawing.rendering import Frame
from metarl.errors import UserError
from metarl.spaces import CheckedEnv, env_attribute

# Okabe and Ito's colour-blind-safe palette: vermilion, blue, bluish green.
_BEFORE, _AFTER, _SOLVED = "#D55E00", "#0072B2", "#00805C"
_INK, _QUIET, _PAPER = "#111111", "#666666", "#FFFFFF"
_HEADER, _PANEL, _FOOTER, _MARGIN = 68, 360, 34, 16
_MIN_WIDTH = 440
"""Minimum width of a panel, for the text above it."""

_SHORTEST_S, _LONGEST_S = 4.0, 15.0
_HOLD_S = 1.5
_STEPS_PER_SECOND = 20.0
_SLOWEST_FPS = 0.05


@dataclass(frozen=True)
class Episode:
    """The F frames of one episode: after the reset, after some of its steps, and after the last one.

    Attributes:
        frames: F frames, `[H, W, 3]`.
        steps: the number of steps before each frame.
        returns: the undiscounted return up to each frame.
        success: 1 if the task was solved up to the frame, else 0; None if the environment defines no success.
    """

    frames: list[Frame]
    steps: list[int]
    returns: list[float]
    success: list[float | None]


@dataclass(frozen=True)
class Play:
    """An episode before and one after adaptation.

    Attributes:
        before: the episode before adaptation.
        after: the episode after adaptation.
        title: the caption at the bottom.
        adapted_by: how the agent adapted, in words.
        fps: frames per second.
        speed: playback speed relative to real time; None if the environment has no clock (`dt`).
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
        """1 for an episode in which the task was solved at any step, else 0; None if success is not defined."""
        return self.before.success[-1], self.after.success[-1]

    @property
    def num_frames(self) -> int:
        """The number of frames: those of the longer episode, with its last one held for a while."""
        return max(len(self.before.steps), len(self.after.steps)) + round(_HOLD_S * self.fps)

    @property
    def frames(self) -> Iterator[Frame]:
        """A new iterator over the frames `[H, W, 3]`; H and W are even."""
        for i in range(self.num_frames):
            yield self._frame(i)

    def _frame(self, i: int) -> Frame:
        """Compose one frame; an episode that has ended shows its last frame."""
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
            right, current = left + panel.width, min(i, len(episode.steps) - 1)
            frame.paste(panel, (left, _HEADER))
            draw.text((left, 20), label, colour, _font(21, bold=True), anchor="lm")
            draw.text((right, 20), note, _QUIET, _font(15), anchor="rm")
            draw.text((left, 48), f"return {episode.returns[current]:.1f}", _INK, _font(19), anchor="lm")
            solved = episode.success[current]
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
    """Play an episode, adapt as in training, and play another episode from the same seed.

    An agent of the MAML family takes K steps, each on `rollouts_per_task` fresh episodes of `Policy.record`. For an
    agent with a memory, the first and the last episode of one trial are shown.

    Args:
        policy: a policy from `metarl.load`, before adaptation.
        env: the environment of one task, made with `render_mode="rgb_array"`; its episodes must end. The control period
            comes from gymnasium's `metadata["render_fps"]`.
        seed: the seed of both episodes and of all actions.
        deterministic: whether to show mean actions instead of sampled ones; adaptation always samples.
        fps: approximate frames per second; a frame is taken after a whole number of steps.
        speed: playback speed relative to real time. None is real time, adjusted so that a full episode lasts 4 to 15 s
            if the environment has a known horizon.
        title: the caption at the bottom.

    Raises:
        UserError: the policy is already adapted, does not adapt or does not fit the environment; a trial has a single
            episode; or `fps` or `speed` is less than a frame or step in 20 s.
        ValueError: the environment does not render RGB frames.
    """
    _check(policy, env)
    real_time = float(env.metadata.get("render_fps") or _STEPS_PER_SECOND)  # steps per second
    if speed is None:
        horizon = _horizon(env)
        seconds = horizon / real_time if horizon else _LONGEST_S
        speed = seconds / min(max(seconds, _SHORTEST_S), _LONGEST_S)
    rate = real_time * speed
    if not (_SLOWEST_FPS <= rate < math.inf and fps >= _SLOWEST_FPS):
        raise UserError(
            f"speed is {speed:g}, which is {rate:g} steps per second, and fps is {fps:g}; expected at least "
            f"{_SLOWEST_FPS:g} for both rates"
        )
    every = max(1, round(rate / fps))
    run = functools.partial(_run, env=env, deterministic=deterministic, every=every)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which also seeds the GPUs
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
            count = f"{episodes} {'episode' if episodes == 1 else 'episodes'}"
            if policy.agent.adapts_by == "gradient":
                adapted_by = f"1 step on {count}" if steps == 1 else f"{steps} steps, {count} each"
            else:
                adapted_by = f"inferred from {count}"
    clock = env.has_wrapper_attr("dt")
    return Play(before, after, title, adapted_by, rate / every, speed if clock else None)


def _check(policy: Policy, env: gymnasium.Env[Any, Any]) -> None:
    if policy.adapted:
        raise UserError("the policy is already adapted; pass the policy before adaptation")
    if env.render_mode != "rgb_array":
        raise ValueError(f'env.render_mode is {env.render_mode!r}; build the environment with render_mode="rgb_array"')
    check_spaces(policy.spaces, CheckedEnv(env).spaces, bounds=False)
    if policy.agent.adapts_by == "nothing":
        raise UserError("the agent does not adapt, so there is no episode after adaptation to show")
    if policy.has_memory and policy.agent.trial_episodes == 1:
        raise UserError("the agent's trials have one episode, so there is no episode after adaptation to show")


def _horizon(env: gymnasium.Env[Any, Any]) -> int | None:
    """Return the maximum number of steps of an episode, if known."""
    task = env_attribute(env, "task")
    if task is not None and "horizon" in dict(getattr(task, "options", ())):
        return int(task.option("horizon"))
    return env.spec.max_episode_steps if env.spec else None


_Memory = tuple[Any, float | None]
"""What an agent carries from one episode of a trial to the next: its state and the last reward."""


def _run(
    policy: Policy,
    env: gymnasium.Env[Any, Any],
    deterministic: bool,
    every: int | None,
    memory: _Memory = (None, None),
    seed: int | None = None,
) -> tuple[Episode, _Memory]:
    """Run an episode and render its start, every `every`-th step and its end; no frame at all if `every` is None."""
    state, reward = memory
    checked = CheckedEnv(env)
    episode = Episode([], [], [], [])
    total, steps = 0.0, 0
    success: float | None = None

    def add_frame() -> None:
        episode.frames.append(_render(env))
        episode.steps.append(steps)
        episode.returns.append(total)
        episode.success.append(success)

    def choose(observation: Any, reward: float, start: bool) -> Any:
        nonlocal state
        if every is not None and steps % every == 0:
            add_frame()
        starts = np.array([start])
        action, state = policy.predict(observation, state, starts, deterministic=deterministic, reward=reward)
        return checked.env_action(policy.spaces.to_policy(action).reshape(-1))

    for step in run_episode(checked, choose, seed=seed, reward=math.nan if reward is None else reward):
        reward, total, steps = step.reward, total + step.reward, steps + 1
        if not math.isnan(solved := float(step.info.get("success", math.nan))):  # NaN: not defined
            success = max(success or 0.0, solved)
    if every is not None:
        add_frame()
    return episode, (state, reward)


def _render(env: gymnasium.Env[Any, Any]) -> Frame:
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"render() returned {frame.dtype} {frame.shape}; expected uint8 [H, W, 3]")
    return frame


def _panel(episode: Episode, i: int) -> Image.Image:
    """Return a frame scaled to the height of a panel, with margins if it is too narrow."""
    image = Image.fromarray(episode.frames[min(i, len(episode.frames) - 1)])
    if image.height != _PANEL:
        size = round(image.width * _PANEL / image.height), _PANEL
        image = image.resize(size, Image.Resampling.LANCZOS)
    if image.width < _MIN_WIDTH:
        panel = Image.new("RGB", (_MIN_WIDTH, _PANEL), _PAPER)
        panel.paste(image, ((_MIN_WIDTH - image.width) // 2, 0))
        return panel
    return image


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which ships with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
