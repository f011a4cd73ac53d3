"""What the command line shows while it trains."""

import io

import pytest
from rich.console import Console

from metarl.cli.display import TrainingDisplay
from metarl.config.schema import as_config
from metarl.types import Position

ITERATION = {"meta_train/return_pre": 1.0, "meta_train/return_post": 2.0, "time/env_steps_per_second": 3.0}


def display(terminal):
    return TrainingDisplay(as_config({}), 100, Console(file=io.StringIO(), force_terminal=terminal, width=200))


@pytest.mark.parametrize("seconds", [1.0, 20.0, 40.0, 900.0])
def test_the_time_that_is_left_is_told_however_long_iterations_take(seconds):
    """After iteration 53 of 100, 47 are left. The first one after resuming, 51 at once, says nothing of the speed."""
    shown, now = display(terminal=True), [0.0]
    shown._live.get_time = lambda: now[0]
    for iteration in (51, 52, 53):
        now[0] += seconds
        shown(Position(0, iteration, iteration, 10 * iteration), ITERATION)
    assert shown._live.tasks[0].time_remaining == 47 * seconds


def test_an_evaluation_without_a_result_is_told():
    """Every task has lost its episodes of some phase: there is no return."""
    shown = display(terminal=False)
    shown(Position(0, 5, 5, 50), {"time/evaluation_seconds": 1.0})
    shown(Position(0, 6, 6, 60), ITERATION)
    lines = shown._console.file.getvalue().splitlines()
    assert lines == ["meta-training  5/100  50 env steps  held out: no result, every task has broken episodes"]
