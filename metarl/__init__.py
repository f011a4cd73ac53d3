"""metarl: agents that learn a new robot task from a few episodes and keep the tasks that they learned before.

The public API, imported lazily: `import metarl` loads neither torch nor a simulator.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarl import envs as envs
    from metarl import evaluation as evaluation
    from metarl import runtime as runtime
    from metarl.deploy import play as play
    from metarl.deploy import sb3 as sb3
    from metarl.deploy.policy import Policy as Policy
    from metarl.deploy.policy import load as load
    from metarl.deploy.sb3 import to_sb3 as to_sb3
    from metarl.evaluation import single_task as baseline  # noqa: F401
    from metarl.evaluation.held_out import evaluate as evaluate
    from metarl.training.loop import train as train
    from metarl.types import Rollout as Rollout
    from metarl.types import Task as Task
    from metarl.types import Trajectory as Trajectory

_NAMES = {
    "load": "metarl.deploy.policy",
    "Policy": "metarl.deploy.policy",
    "train": "metarl.training.loop",
    "evaluate": "metarl.evaluation.held_out",
    "to_sb3": "metarl.deploy.sb3",
    "Task": "metarl.types",
    "Rollout": "metarl.types",
    "Trajectory": "metarl.types",
}
_MODULES = ("baseline", "envs", "evaluation", "play", "runtime", "sb3")

__path__.append(os.path.join(os.path.dirname(__file__), "deploy", "old_names"))  # import metarl.sb3, .play, .baseline

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"metarl.{name}")
    raise AttributeError(f"module 'metarl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
