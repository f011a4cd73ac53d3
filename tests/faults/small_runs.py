"""Small runs that tests do things to, and what lies in their folders."""

from metarl.config.schema import as_config

WEDGES = {"family": "navigation", "name": "rotated_wedges", "horizon": 5}
TWO_STAGES = as_config(
    {
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "num_workers": 0,
        "device": "cpu",
        "checkpoint_every_iterations": 1,
        "keep_checkpoints": 2,
        "keep_best_checkpoints": 0,
        "evaluation": {"every_iterations": 0, "num_tasks": 1},
        "agent": {"name": "maml_ppo", "hidden_sizes": [8], "outer": {"epochs": 1}},
        "stability": [{"name": "ewc", "fisher_states": 20}, {"name": "replay", "capacity": 4}],
        "stages": [{"name": f"{i}", "tasks": {**WEDGES, "wedges": [i]}, "iterations": 3} for i in range(2)],
    }
)
"""A short run of two stages, guarded by two methods."""

MANIFEST = "manifest.json"
FILES = ("agent.safetensors", MANIFEST, "random.safetensors", "stability.safetensors")
"""What a checkpoint of it holds."""


def listing(folder):
    """What lies in a folder and below: paths, and contents of files that are not huge."""
    return {
        path: path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }
