"""Meta-World 3 (Yu et al. 2019): the ML1, ML10, ML25 and ML45 benchmarks, and custom lists of classes.

Owns the tasks and builds an environment from a `Task`. Physics and rewards are those of the `metaworld` package, which
is imported at first use (0.3 s) and never changed. Of metarl it imports `types`, `settings`, `errors` and `rendering`.

Upstream draws a goal vector from the global `np.random`, running 500 physics steps for each goal. Here the same numbers
come from a private stream without physics, so that a task is rebuilt from its fields alone, instantly and bit for bit.
"""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Annotated, Any, Literal, get_args

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from metarl.envs.drawing.rendering import check_render_mode, render_metadata
from metarl.envs.metaworld.classes import CLASSES
from metarl.errors import unknown_name
from metarl.settings import Settings, as_tuple
from metarl.types import FloatArray, Task

RewardVersion = Literal["v1", "v2", "sparse"]
Official = Literal["ML1", "ML10", "ML25", "ML45"]

MULTI_CLASS = ("ML10", "ML25", "ML45")
"""Benchmarks with a fixed list of classes."""

GOALS_PER_CLASS = 50
"""Goals per class in each split, as upstream (`metaworld._N_GOALS`)."""

MAX_HORIZON = 500
"""Longest episode of the official environments, in steps."""

_NOW = (
    *("hand_x", "hand_y", "hand_z", "gripper_opening"),
    *(
        f"object{number}_{part}"
        for number in (1, 2)
        for part in ("x", "y", "z", "quaternion_0", "quaternion_1", "quaternion_2", "quaternion_3")
    ),
)
"""Names of the observation of one time step; the second object is zeros in classes with a single object."""

_MIN_DISTANCE = {
    f"{name}-v3": metres
    for metres, listed in (
        (0.1, "assembly disassemble peg-insert-side shelf-place stick-pull stick-push"),
        (0.15, "basketball coffee-pull coffee-push hand-insert pick-out-of-hole pick-place pick-place-wall"),
        (0.15, "push push-back push-wall reach reach-wall soccer sweep-into"),
        (0.25, "box-close"),
    )
    for name in listed.split()
}
"""Minimum distance in m in the plane between object and goal; below it, `reset_model` of the class redraws."""

_FIXED_GOAL = {"sweep-into-v3": (0.0, 0.84)}
"""Classes for which upstream measures that distance to a constant instead of the goal."""


class MetaWorldConfig(Settings):
    """Meta-World tasks with hidden goals.

    - `ML1`: one class, `name`; the held-out tasks are other goals.
    - `ML10`, `ML25`, `ML45`: the held-out tasks are of classes not seen in training. Deviation: upstream's ML25 lists
      basketball-v3 in both splits; here the test split omits it, which leaves four held-out classes.
    - `custom`: the ML1 training tasks of each of `names`; a task is an ML1 task, rebuilt without the list. The held-out
      tasks are the ML1 test tasks of `test_names` or, without them, of `names`: other goals.
    """

    family: Literal["metaworld"] = "metaworld"
    benchmark: Literal[Official, "custom"] = Field("ML1", description="distribution of tasks")
    name: str | None = Field(None, description="the class of ML1, e.g. reach-v3 (ML1 only)")
    names: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="classes to train on (custom only)"
    )
    test_names: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="held-out classes (custom only); none: other goals of `names`"
    )
    horizon: int = Field(MAX_HORIZON, ge=1, le=MAX_HORIZON, description="steps per episode")
    reward_version: RewardVersion = Field(
        "v2", description="Meta-World's reward_function_version, or sparse: 1 if the task is solved, else 0"
    )
    seed: int = Field(0, ge=0, le=2**32 - 2, description="seed of the goals")

    @model_validator(mode="after")
    def _check_names(self) -> MetaWorldConfig:
        if (self.name is None) == (self.benchmark == "ML1"):
            raise ValueError(
                f"name={self.name!r} with benchmark={self.benchmark!r}: ML1 needs a name, the others have none"
            )
        if bool(self.names) != (self.benchmark == "custom") or (self.test_names and not self.names):
            raise ValueError(
                f"names={self.names} and test_names={self.test_names} with benchmark={self.benchmark!r}: "
                "custom needs names, the others have neither"
            )
        listed = [*self.names, *self.test_names, *([self.name] if self.name is not None else [])]
        for name in listed:
            _check_name(name)
        duplicates = sorted({name for name in listed if listed.count(name) > 1})
        if duplicates:
            raise ValueError(f"{', '.join(duplicates)} listed twice; list each class once, in names or test_names")
        return self


class MetaWorldTasks:
    """The tasks of a `MetaWorldConfig`, 50 goals for each class in upstream's order; a `TaskDistribution`."""

    def __init__(self, config: MetaWorldConfig) -> None:
        self.config = config

    @cached_property
    def train_tasks(self) -> list[Task]:
        """The official training tasks."""
        return self._tasks("train")

    @cached_property
    def test_tasks(self) -> list[Task]:
        """The official test tasks: unseen goals for ML1, goals of unseen classes otherwise."""
        return self._tasks("test")

    def _tasks(self, split: str) -> list[Task]:
        config = self.config
        benchmark: str
        if config.benchmark == "custom":
            benchmark, classes = "ML1", config.test_names if split == "test" and config.test_names else config.names
        elif config.name is not None:
            benchmark, classes = "ML1", (config.name,)
        else:
            benchmark, classes = config.benchmark, _classes(config.benchmark, split)
        options = (("horizon", config.horizon), ("reward_version", config.reward_version))
        return [
            Task("metaworld", benchmark, split, name, index, config.seed, options)
            for name in classes
            for index in range(GOALS_PER_CLASS)
        ]

    def make(self, task: Task) -> MetaWorldEnv:
        """Build the environment of `task`."""
        return make(task)

    @staticmethod
    def retarget(env: gymnasium.Env[Any, Any], task: Task) -> None:
        """Give an environment that `make` built another task of its class; takes effect at the next reset."""
        env.unwrapped.set_task(task)  # type: ignore[attr-defined]

    def difficulty(self, task: Task) -> float:
        """Return the difficulty of a task; harder is larger.

        With several classes in `names` it is the position in that list, which the user orders from easy to hard. With
        one class it is `hand_path_length`.

        Raises:
            ValueError: the classes are those of a benchmark, which have no order of difficulty.
        """
        config = self.config
        if config.benchmark in MULTI_CLASS:
            raise ValueError(
                f"the classes of {config.benchmark} have no order of difficulty; set benchmark to custom and "
                "list names from easy to hard"
            )
        return float(config.names.index(task.name)) if len(config.names) > 1 else hand_path_length(task)


def make(task: Task, render_mode: str | None = None) -> MetaWorldEnv:
    """Build the environment of a task from its fields alone, in about 0.3 s; reuse it through `set_task`.

    Raises:
        ValueError: a field of the task is invalid for this family.
    """
    return MetaWorldEnv(task, render_mode)


def names() -> dict[str, dict[str, str]]:
    """Return the benchmarks and classes by name: name → the settings that select it."""
    return {name: {"benchmark": name} for name in MULTI_CLASS} | {
        name: {"benchmark": "ML1", "name": name} for name in CLASSES
    }


def env_id(name: str) -> str | None:
    """Return the gymnasium id of a class; None for a benchmark, which has several classes."""
    return None if name in MULTI_CLASS else f"metarl/{name}"


def goal_vector(task: Task) -> FloatArray:
    """Return the `rand_vec` of a task, `[D]`: the position of its object, its goal or both.

    It is a pure function of the fields, equal bit for bit to the official benchmark with the same seed. As upstream,
    the test split of ML1 is drawn with `seed + 1`: the held-out goals of one seed are the training goals of the next.

    Raises:
        ValueError: a field of the task is invalid for this family.
    """
    if task.family != "metaworld":
        raise ValueError(f"task.family is {task.family!r}; expected 'metaworld'")
    if task.benchmark not in get_args(Official):
        raise ValueError(f"task.benchmark is {task.benchmark!r}; expected one of {', '.join(get_args(Official))}")
    if task.split not in ("train", "test"):
        raise ValueError(f"task.split is {task.split!r}; expected 'train' or 'test'")
    if not 0 <= task.index < GOALS_PER_CLASS:
        raise ValueError(f"task.index is {task.index}; expected 0 to {GOALS_PER_CLASS - 1}")
    _check_name(task.name)
    if task.benchmark == "ML1":
        goals = _goals((task.name,), task.seed + (task.split == "test"))
    elif task.name in _classes(task.benchmark, task.split):
        goals = _goals(_official_classes(task.benchmark, task.split), task.seed)
    else:
        raise ValueError(f"task.name {task.name!r} is not in the {task.split} split of {task.benchmark}")
    goal: FloatArray = goals[task.name][task.index]
    return goal


def hand_path_length(task: Task) -> float:
    """Return the length in m of the path from the initial hand position to the object and on to the goal.

    Classes that draw no goal end at the object. The reach classes skip the object, which plays no role there.
    """
    points = goal_vector(task).reshape(-1, 3)
    points = np.vstack([_hand_start(task.name), points[-1:] if task.name.startswith("reach") else points])
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


class MetaWorldEnv(gymnasium.Env[FloatArray, NDArray[np.float32]]):
    """One official environment with a hidden goal.

    Observations `[39]` float64: hand and gripper (4) and objects (14), the same 18 at the previous step, and three
    zeros in place of the goal. Actions `[4]` in ±1: the displacement of the hand and the effort of the gripper.

    An episode is truncated at the horizon of the task and never terminates, not even on success.

    Attributes:
        task: the current task.
        render_mode: `rgb_array` or None.
        observation_names: `[39]`, the name of each entry of an observation. The class orders its quaternions.
        action_names: `[4]`, the name of each entry of an action.
        dt: the control period in s.
    """

    metadata = render_metadata(80)
    observation_names = (*_NOW, *(f"previous_{name}" for name in _NOW), "goal_x", "goal_y", "goal_z")
    action_names = ("hand_x", "hand_y", "hand_z", "gripper_effort")
    dt = 0.0125

    def __init__(self, task: Task, render_mode: str | None = None) -> None:
        check_render_mode(render_mode)
        self.task, self.render_mode = task, render_mode
        self._scene: Any = None
        self._official = _build(task)
        self.observation_space = self._official.sawyer_observation_space
        self.action_space = self._official.action_space
        self.set_task(task)

    def set_task(self, task: Task) -> None:
        """Switch to another task of the same class without recompiling the model; call `reset` next.

        Raises:
            ValueError: the task is of another class, or a field is invalid for this family.
        """
        if task.name != self.task.name:
            raise ValueError(
                f"task.name is {task.name!r}; this environment is built for {self.task.name!r}: call make(task)"
            )
        horizon, reward_version = _options(task)
        official, self._sparse = self._official, reward_version == "sparse"
        official._last_rand_vec = goal_vector(task).copy()
        official._freeze_rand_vec = official._set_task_called = True
        official._set_task_inner()
        official.reward_function_version = _official_version(reward_version)
        self.task, self._horizon, self._steps_left = task, horizon, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin an episode, a pure function of the task; as upstream, the seed has no effect."""
        super().reset(seed=seed)
        observation, info = self._official.reset()
        self._steps_left = self._horizon
        return observation, info

    def step(self, action: NDArray[np.float32]) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Take one official step, 5 × 0.0025 s.

        Returns:
            The observation `[39]`, the reward, terminated (always False), truncated (at the horizon), and upstream's
            info with `success`, 0 or 1.

        Raises:
            gymnasium.error.ResetNeeded: the episode has ended, or none has begun.
            FloatingPointError: the physics diverged, or the action is not finite; upstream would continue from a
                simulation that MuJoCo has silently reset.
        """
        if self._steps_left == 0:
            raise gymnasium.error.ResetNeeded(f"no episode in progress in {self.task.name}; call reset() before step()")
        try:
            observation, reward, _, _, info = self._official.step(action)
        except FloatingPointError as error:
            self._steps_left = 0
            raise type(error)(f"{error} (task {self.task.to_json()})") from None
        self._steps_left -= 1
        info["success"] = float(info["success"])
        return observation, info["success"] if self._sparse else float(reward), False, self._steps_left == 0, info

    def render(self) -> NDArray[np.uint8] | None:
        """Return an image `[360, 480, 3]` with the goal as a yellow ball, or None if `render_mode` is None.

        The first call compiles the official model (0.2 s).

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun.
            UserError: no OpenGL backend works; see `metarl.envs.drawing.rendering`.
        """
        if self.render_mode is None:
            return None
        if self._official._target_pos is None:
            raise gymnasium.error.ResetNeeded(f"no episode has begun in {self.task.name}; call reset() before render()")
        if self._scene is None:
            from metarl.envs.metaworld.scene import SawyerScene

            self._scene = SawyerScene(self._official)
        image: NDArray[np.uint8] = self._scene.render(self._official)
        return image

    def close(self) -> None:
        """Free all resources; calling it twice is fine."""
        self._official.close()
        if self._scene is not None:
            self._scene.close()
            self._scene = None


def _build(task: Task) -> Any:
    """Create the official environment of a task; the only function that does."""
    from metarl.envs.metaworld.fast import fast_class

    goal_vector(task)  # validates the task before the model is compiled
    _, reward_version = _options(task)
    official = fast_class(_official_class(task.name))(reward_function_version=_official_version(reward_version))
    official._partially_observable = True
    official.__dict__.pop("sawyer_observation_space", None)  # cached with a visible goal, and steps clip to it
    return official


def _options(task: Task) -> tuple[int, str]:
    options = dict(task.options)
    horizon, reward_version = options.get("horizon"), options.get("reward_version")
    if type(horizon) is not int or not 1 <= horizon <= MAX_HORIZON:
        raise ValueError(f"task option horizon is {horizon!r}; expected 1 to {MAX_HORIZON} steps")
    if reward_version not in get_args(RewardVersion):
        versions = ", ".join(map(repr, get_args(RewardVersion)))
        raise ValueError(f"task option reward_version is {reward_version!r}; expected one of {versions}")
    return horizon, str(reward_version)


def _official_version(reward_version: str) -> str:
    return "v2" if reward_version == "sparse" else reward_version


def _check_name(name: str) -> None:
    if name not in CLASSES:
        raise unknown_name("Meta-World task", name, CLASSES, "metarl list envs")


def _official_class(name: str) -> Any:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return ALL_V3_ENVIRONMENTS[name]


@cache
def _official_classes(benchmark: str, split: str) -> tuple[str, ...]:
    from metaworld import env_dict

    return tuple(getattr(env_dict, f"{benchmark}_V3")[split])


@cache
def _classes(benchmark: str, split: str) -> tuple[str, ...]:
    """Return the official classes of a split; the test split without any training class."""
    excluded = _official_classes(benchmark, "train") if split == "test" else ()
    return tuple(name for name in _official_classes(benchmark, split) if name not in excluded)


@lru_cache(maxsize=256)
def _goals(classes: tuple[str, ...], seed: int) -> dict[str, FloatArray]:
    """Return the goals that `metaworld._make_tasks` draws for each class in turn, `[50, D]`, read-only.

    Upstream's `reset` calls `reset_model` twice. Each call draws until the vector is valid; the second gives the goal.
    """
    rng = np.random.RandomState(seed)  # the stream of np.random.seed(seed)
    goals = {}
    for name in classes:
        box = _reset_box(name)
        vectors = [[_draw(name, box, rng) for _ in range(2)][-1] for _ in range(GOALS_PER_CLASS)]
        goals[name] = np.stack(vectors)
        goals[name].setflags(write=False)
    return goals


def _draw(name: str, box: gymnasium.spaces.Box, rng: np.random.RandomState) -> FloatArray:
    while True:
        vector = rng.uniform(box.low, box.high, size=box.low.size).astype(np.float64)
        if name not in _MIN_DISTANCE:
            return vector
        goal = _FIXED_GOAL.get(name, vector[-3:-1])
        if np.linalg.norm(vector[:2] - goal) >= _MIN_DISTANCE[name]:
            return vector


@cache
def _reset_box(name: str) -> gymnasium.spaces.Box:
    """Return the bounds of the `rand_vec` of a class, object before goal, `[3]` or `[6]`."""
    box: gymnasium.spaces.Box = _without_robot(name)._random_reset_space
    return box


@cache
def _hand_start(name: str) -> FloatArray:
    """Return the initial hand position of a class, `[3]`."""
    return np.array(_without_robot(name).hand_init_pos, dtype=np.float64)


def _without_robot(name: str) -> Any:
    """Return an environment of a class built without compiling the robot's model: only its constants are valid."""
    import mujoco
    from metaworld.sawyer_xyz_env import SawyerMocapBase

    class WithoutRobot(SawyerMocapBase):
        """Replaces the base class whose constructor would load the XML."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.model = mujoco.MjModel.from_xml_string(
                '<mujoco><worldbody><body><joint name="doorjoint"/><geom size="1"/></body></worldbody></mujoco>'
            )
            self.data = mujoco.MjData(self.model)

        def get_body_com(self, body_name: str) -> FloatArray:
            return np.zeros(3)

    no_observation = {"_get_curr_obs_combined_no_goal": lambda self: np.zeros(18)}
    return type("ConstantsOnly", (_official_class(name), WithoutRobot), no_observation)()
