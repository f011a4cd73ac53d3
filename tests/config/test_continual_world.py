"""Continual World's ten classes of Meta-World, in small: both agents go through all stages, guarded."""

import json

import numpy as np
import pytest

from metarl.config.schema import load_config
from metarl.config.sequences import CW10
from metarl.training.loop import train

SMALL = [
    *("--stages.0.iterations=1", "--stages.0.tasks.horizon=12", "--num-tasks=2", "--num-workers=0"),
    *("--evaluation.num-tasks=1", "--evaluation.every-iterations=0", "--stability", "ewc", "replay"),
    *("--stability.0.fisher-states=16", "--stability.1.capacity=20"),
]
RL2 = ["--agent.trial-episodes=2", "--agent.memory.size=16", "--agent.encoder-sizes=16", "--agent.epochs=2"]
MAML = ["--rollouts-per-task=2", "--agent.hidden-sizes=16", "--agent.outer.epochs=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [("cw10_rl2", RL2), ("cw10_maml_ppo", MAML)])
def test_cw10_goes_through_all_ten_stages(tmp_path, name, flags):
    run = train(load_config(name, [*SMALL, *flags]), run_dir=tmp_path)
    assert run.finished
    account = json.loads((tmp_path / "evaluation" / "continual.json").read_text())
    assert account["stages"] == list(CW10)
    for phase in ("pre", "post"):
        matrix = np.array(account[f"scores_{phase}"], dtype=float)
        assert matrix.shape == (11, 10) and np.isin(matrix, [0.0, 0.5, 1.0]).all()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    guarded = [line["stage"] for line in lines if "stability/ewc/loss" in line and "stability/replay/loss" in line]
    assert guarded == list(range(1, 10))  # from the second stage on
    assert all(0 <= line["stability/ewc/loss"] < np.inf for line in lines if "stability/ewc/loss" in line)
