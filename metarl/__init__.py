"""metarl: agents that learn a new robot task from a few episodes and keep the tasks that they learned before.

The public API, imported lazily: `import metarl` loads neither torch nor a simulator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarl import baseline as baseline
    from metarl import envs as envs
    from metarl import evaluation as evaluation
    from metarl.evaluation import evaluate as evaluate
    from metarl.policy import Policy as Policy
    from metarl.policy import load as load
    from metarl.sb3 import to_sb3 as to_sb3
    from metarl.training import train as train
    from metarl.types import Rollout as Rollout
    from metarl.types import Task as Task
    from metarl.types import Trajectory as Trajectory

_NAMES = {
    "load": "metarl.policy",
    "Policy": "metarl.policy",
    "train": "metarl.training",
    "evaluate": "metarl.evaluation",
    "to_sb3": "metarl.sb3",
    "Task": "metarl.types",
    "Rollout": "metarl.types",
    "Trajectory": "metarl.types",
}
_MODULES = ("baseline", "envs", "evaluation", "play", "runtime", "sb3")

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"metarl.{name}")
    raise AttributeError(f"module 'metarl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
