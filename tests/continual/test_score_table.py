"""The score of a stage, and the score table before and after adaptation."""

import math

import pytest

from metarl.config.schema import StageConfig
from metarl.continual.score_table import ScoreTable, score


def stage(**settings):
    return StageConfig.model_validate({"name": "a", "tasks": {"family": "navigation"}, **settings})


def report(**means):
    return {"aggregate": {name: {"mean": mean} for name, mean in means.items()}}


@pytest.mark.parametrize(
    ("settings", "means", "expected"),
    [
        ({}, {"return_post": -6.0, "success_post": 0.25}, 0.25),
        ({}, {"return_post": -6.0}, -6.0),
        ({"score_range": [-10.0, -2.0]}, {"return_post": -6.0, "success_post": 0.25}, 0.5),  # (−6 + 10) / (−2 + 10)
        ({"score_range": [-10.0, -2.0]}, {"return_post": 0.0}, 1.25),
        ({"score_range": [-10.0, -2.0]}, {"success_post": 0.25}, math.nan),
        ({}, {"return_pre": -6.0}, math.nan),
    ],
)
def test_a_score_is_success_or_the_return_on_the_scale_of_the_stage(settings, means, expected):
    assert score(report(**means), stage(**settings), "post") == pytest.approx(expected, nan_ok=True)


def test_scores_before_and_after_adaptation_are_not_mixed_up():
    table = ScoreTable([stage(name="a"), stage(name="b")], [])
    for number, (pre, post) in enumerate([(0.125, 0.25), (0.25, 0.875), (0.375, 0.625)]):
        reports = [report(success_pre=pre + part, success_post=post + part) for part in (0.0, 0.0625)]
        place = {"iteration": number, "stage": max(0, number - 1), "env_steps": 7 * number}
        tracked = table.add(place, reports, finished=number)
    assert (tracked["continual/score/a"], tracked["continual/score_pre/a"]) == (0.625, 0.375)
    assert tracked["continual/forgetting"] == (0.875 - 0.625) / 2  # after adaptation; the last counts as 0
    final = table.report(finished=2)
    assert final["scores_pre"] == [[0.125, 0.1875], [0.25, 0.3125], [0.375, 0.4375]]
    assert final["scores_post"] == [[0.25, 0.3125], [0.875, 0.9375], [0.625, 0.6875]]
