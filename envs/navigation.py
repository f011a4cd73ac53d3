"""2D navigation: a point mass that must find a hidden goal. Owns its tasks, dynamics and rewards, in vectorised numpy.

Imports neither torch nor the rest of metarl except `types`, `settings`, `errors`, `registration` and `drawing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator

from metarl.envs.drawing.rendering import check_render_mode, render_metadata
from metarl.envs.registration import versioned_id
from metarl.errors import unknown_name
from metarl.settings import Settings, as_tuple
from metarl.spaces import Spaces
from metarl.types import BoolArray, FloatArray, Step, Task

Name = Literal["goals", "semicircle", "cued_wedges", "rotated_wedges", "rotated_cued_wedges"]

_STREAM = 2  # makes the goals independent of a run with the same seed

ACTION_SCALE = 0.1
"""Distance per step of a full action, in units of the plane (Finn et al. 2017, 5.3)."""

NUM_WEDGES = 4
"""Number of wedge families, which are the stages of a continual sequence."""


class NavigationConfig(Settings):
    """2D navigation tasks.

    The point starts at the origin and moves by 0.1 · clip(action, ±1) per step. The goal is not observed.

    - `goals`: goals uniform in [−0.5, 0.5]², reward = −distance after the move, horizon 100. The 2D task of Finn et al.
      2017, 5.3, in the form of its published code (the distance, not its square). Deviation: the episode does not end
      within 0.01 of the goal, so that every return is a sum of 100 rewards.
    - `semicircle`: goals on the upper unit half circle, reward 1 within 0.2 of the goal, else 0, horizon 60: a sparse
      reward that the agent must explore to find (Rakelly et al. 2019).
    - `cued_wedges`, `rotated_wedges`, `rotated_cued_wedges`: four families k = 0..3, one class each. The goal lies at
      angle k · 90° ± 40°, radius in [0.5, 1]; reward = −distance, horizon 20, position clipped to ±1.2. Rotated:
      actions are rotated by −90° · k, so that a policy for one family is wrong in the next. Cued: the observation
      ends in a one-hot k, which makes the sequence task-incremental.
    """

    family: Literal["navigation"] = "navigation"
    name: Name = "goals"
    """Name of the distribution of goals."""
    horizon: int | None = Field(None, ge=1, description="steps per episode; none: the default of the distribution")
    wedges: Annotated[tuple[Literal[0, 1, 2, 3], ...], BeforeValidator(as_tuple)] = Field(
        (0, 1, 2, 3), min_length=1, description="wedge families to draw goals from (wedge distributions only)"
    )
    num_train: int = Field(1000, ge=1, description="number of training goals of each class")
    num_test: int = Field(100, ge=1, description="number of held-out goals of each class")
    seed: int = Field(0, ge=0, description="seed of the goals")

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, name: object) -> object:
        if isinstance(name, str) and name not in get_args(Name):
            raise unknown_name("navigation distribution", name, get_args(Name), "metarl list envs")
        return name

    @field_validator("wedges")
    @classmethod
    def _check_unique(cls, wedges: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(wedges)) < len(wedges):
            raise ValueError(f"wedges {wedges} lists a family twice; list each once")
        return wedges

    @model_validator(mode="after")
    def _check_wedges_apply(self) -> NavigationConfig:
        if "wedges" in self.model_fields_set and self.wedges != (0, 1, 2, 3) and not _VARIANTS[self.name].wedges:
            raise ValueError(
                f"wedges={self.wedges} with name={self.name!r}: only wedge distributions have them; leave out wedges"
            )
        return self


class _Variant(NamedTuple):
    horizon: int
    radius: float  # distance at which the task counts as solved
    sparse: bool = False
    wedges: bool = False
    rotated: bool = False
    cued: bool = False
    bound: float = np.inf
    half_height: float = 1.3  # of the image, in units of the plane


_VARIANTS: dict[str, _Variant] = {
    "goals": _Variant(horizon=100, radius=0.1, half_height=0.7),
    "semicircle": _Variant(horizon=60, radius=0.2, sparse=True),
    "cued_wedges": _Variant(horizon=20, radius=0.1, wedges=True, cued=True, bound=1.2),
    "rotated_wedges": _Variant(horizon=20, radius=0.1, wedges=True, rotated=True, bound=1.2),
    "rotated_cued_wedges": _Variant(horizon=20, radius=0.1, wedges=True, rotated=True, cued=True, bound=1.2),
}


class NavigationTasks:
    """The task distribution of a `NavigationConfig`."""

    def __init__(self, config: NavigationConfig) -> None:
        self.config = config

    @cached_property
    def train_tasks(self) -> list[Task]:
        """`num_train` goals of each class."""
        return self._tasks("train", self.config.num_train)

    @cached_property
    def test_tasks(self) -> list[Task]:
        """`num_test` other goals of each class."""
        return self._tasks("test", self.config.num_test)

    def _tasks(self, split: str, count: int) -> list[Task]:
        config, variant = self.config, _VARIANTS[self.config.name]
        classes = [f"wedge-{wedge}" for wedge in config.wedges] if variant.wedges else [config.name]
        options = (("horizon", config.horizon or variant.horizon),)
        return [
            Task("navigation", config.name, split, name, index, config.seed, options)
            for name in classes
            for index in range(count)
        ]

    def difficulty(self, task: Task) -> float:
        """Return the distance of the goal from the start; the same for all goals of `semicircle`."""
        return float(np.linalg.norm(goal(task)))

    def make(self, task: Task) -> NavigationEnv:
        """Build the environment of `task`."""
        return NavigationEnv(task)

    @staticmethod
    def retarget(env: gymnasium.Env[Any, Any], task: Task) -> None:
        """Give an environment that `make` built another task of its class; takes effect at the next reset."""
        env.unwrapped.set_task(task)  # type: ignore[attr-defined]

    def make_batch(self, max_envs: int) -> NavigationBatch:
        """Build `max_envs` environments that step as one numpy computation."""
        return NavigationBatch(self.config.name, max_envs)


def names() -> dict[str, dict[str, str]]:
    """Return the distributions by name: name → the settings that select it."""
    return {name: {"name": name} for name in _VARIANTS}


def env_id(name: str) -> str:
    """Return the gymnasium id of a distribution, e.g. `metarl/NavigationCuedWedges-v0`."""
    return versioned_id(f"Navigation{name.title().replace('_', '')}")


def goal(task: Task) -> FloatArray:
    """Return the hidden goal `[2]` of a task, a pure function of its fields."""
    wedge = _wedge(task)
    position = (("train", "test").index(task.split), wedge, task.index)
    entropy = np.random.SeedSequence([task.seed, _STREAM], spawn_key=position)
    rng = np.random.default_rng(entropy)
    if task.benchmark == "goals":
        return rng.uniform(-0.5, 0.5, size=2)
    if task.benchmark == "semicircle":
        radius, angle = 1.0, rng.uniform(0.0, np.pi)
    else:
        radius, angle = rng.uniform(0.5, 1.0), np.deg2rad(90.0 * wedge + rng.uniform(-40.0, 40.0))
    return radius * np.array([np.cos(angle), np.sin(angle)])


def _wedge(task: Task) -> int:
    return int(task.name.removeprefix("wedge-")) if task.name.startswith("wedge-") else 0


class NavigationBatch:
    """E point masses stepped together, each with its own goal; a `BatchEnv`.

    Attributes:
        positions: the positions of the points, `[E, 2]`.
        goals: the goals, `[E, 2]`.
    """

    lanes = 1  # a single computation is fastest

    def __init__(self, name: str, max_envs: int) -> None:
        self.max_envs = max_envs
        self._variant = variant = _VARIANTS[name]
        size = 2 + NUM_WEDGES * variant.cued
        self.spaces = Spaces.within_one(size, 2)

    def reset(self, tasks: Sequence[Task], seeds: NDArray[np.uint32]) -> FloatArray:
        """Move every point to the origin; the seeds have no effect, since nothing is random."""
        count, variant = len(tasks), self._variant
        self.goals = np.stack([goal(task) for task in tasks])
        self._horizons = np.array([task.option("horizon") for task in tasks])
        self._elapsed = np.zeros(count, dtype=np.int64)
        self.positions = np.zeros((count, 2))
        wedges = np.array([_wedge(task) for task in tasks])
        self._cues = np.eye(NUM_WEDGES)[wedges] if variant.cued else np.zeros((count, 0))
        angle = np.deg2rad(-90.0 * wedges) if variant.rotated else np.zeros(count)
        self._rotations = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
        return self._observations()

    def _observations(self) -> FloatArray:
        return np.concatenate([self.positions, self._cues], axis=-1)

    def step_async(self, rows: slice, actions: NDArray[Any], active: BoolArray) -> None:
        """Move the active points of `rows`; see `BatchEnv.step_async`."""
        variant = self._variant
        moves = ACTION_SCALE * np.clip(actions.astype(np.float64), -1.0, 1.0)
        if variant.rotated:
            moves = np.einsum("eij,ej->ei", self._rotations[rows], moves)
        moved = np.clip(self.positions[rows] + moves, -variant.bound, variant.bound)
        self.positions[rows] = np.where(active[:, None], moved, self.positions[rows])
        self._elapsed[rows] += active

    def step_wait(self, rows: slice) -> Step:
        """See `BatchEnv.step_wait`."""
        distances = np.linalg.norm(self.positions[rows] - self.goals[rows], axis=-1)
        near = distances < self._variant.radius
        rewards = near.astype(np.float64) if self._variant.sparse else -distances
        terminated = np.zeros(len(near), dtype=np.bool_)
        truncated = self._elapsed[rows] >= self._horizons[rows]
        return Step(self._observations()[rows], rewards, terminated, truncated, near.astype(np.float64))

    def close(self) -> None:
        """Nothing to free."""


class NavigationEnv(gymnasium.Env[FloatArray, NDArray[np.float32]]):
    """One point mass as a `gymnasium.Env`: a batch of one, so that both forms share their dynamics.

    Attributes:
        task: the current task.
        render_mode: `rgb_array` or None.
        observation_names: `[O]`, the name of each entry of an observation.
        action_names: `[2]`, the name of each entry of an action.
    """

    metadata = render_metadata(10)
    action_names = ("move_x", "move_y")

    def __init__(self, task: Task, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self._batch = NavigationBatch(task.benchmark, max_envs=1)
        variant = _VARIANTS[task.benchmark]
        cues = NUM_WEDGES if variant.cued else 0
        high = np.array([variant.bound] * 2 + [1.0] * cues)
        self.observation_space = gymnasium.spaces.Box(-high, high, dtype=np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
        self.observation_names = ("position_x", "position_y", *(f"cue_{k}" for k in range(cues)))
        self._trail: list[FloatArray] = []
        self.set_task(task)

    def set_task(self, task: Task) -> None:
        """Switch to another task; takes effect at the next reset."""
        self.task = task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin an episode at the origin."""
        super().reset(seed=seed)
        self._trail = [np.zeros(2)]
        return self._batch.reset([self.task], np.zeros(1, dtype=np.uint32))[0], {}

    def step(self, action: NDArray[np.float32]) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Move by 0.1 · clip(action, ±1)."""
        self._batch.step_async(slice(0, 1), np.asarray(action, dtype=np.float64)[None], np.ones(1, dtype=np.bool_))
        step = self._batch.step_wait(slice(0, 1))
        info = {"success": float(step.success[0])}
        return step.observations[0], float(step.rewards[0]), False, bool(step.truncated[0]), info

    def render(self) -> NDArray[np.uint8] | None:
        """Return an image `[360, 480, 3]`, or None if `render_mode` is None.

        The goal is orange, inside the disc in which it counts as reached. The point is blue; its trail connects the
        positions at the previous calls in this episode.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun.
        """
        if self.render_mode is None:
            return None
        if not self._trail:
            raise gymnasium.error.ResetNeeded("no episode has begun; call reset() before render()")
        from metarl.envs.drawing.plane import draw_plane

        self._trail.append(self._batch.positions[0].copy())
        variant = _VARIANTS[self.task.benchmark]
        return draw_plane(self._trail, self._batch.goals[0], variant.radius, variant.half_height)
