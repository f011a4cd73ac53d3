"""Continual metrics, worked out by hand."""

import math

import numpy as np
import pytest

from metarl.continual.metrics import (
    Curve,
    Evaluation,
    area_under_curve,
    average_performance,
    backward_transfer,
    continual_metrics,
    evaluations,
    final_stage_performance,
    finished_stages,
    forgetting,
    forward_transfer,
    min_acc,
    relearning,
    score_matrix,
    training_curve,
    zero_shot_transfer,
)

NAN = float("nan")
MATRIX = np.array(
    [
        [0.1, 0.0, 0.2],  # before training
        [0.8, 0.1, 0.3],  # after stage 1
        [0.5, 0.9, 0.4],  # after stage 2
        [0.6, 0.4, 0.7],  # after stage 3
    ]
)


def evaluated(*rows):
    """Evaluations from rows of (iteration, stage, scores...); scores before adaptation are half of those after."""
    return [
        Evaluation(iteration, 100 * iteration, stage, scores, tuple(score / 2 for score in scores))
        for iteration, stage, *scores in rows
        for scores in [tuple(scores)]
    ]


RUN = evaluated(
    (0, 0, 0.1, 0.0, 0.2),
    (5, 0, 0.4, 0.0, 0.2),
    (10, 0, 0.8, 0.1, 0.3),
    (15, 1, 0.2, 0.5, 0.3),  # stage 1 dips to 0.2 amid stage 2
    (20, 1, 0.5, 0.9, 0.4),
    (25, 2, 0.7, 0.3, 0.5),  # and stage 2 to 0.3 amid stage 3
    (30, 2, 0.6, 0.4, 0.7),
)


def near(value):
    return pytest.approx(value, abs=1e-12)


def test_matrix_metrics_by_hand():
    assert average_performance(MATRIX) == near((0.6 + 0.4 + 0.7) / 3)
    # (0.8 − 0.6) + (0.9 − 0.4) + (0.7 − 0.7), over all three.
    assert forgetting(MATRIX) == near((0.2 + 0.5 + 0.0) / 3)
    # (0.6 − 0.8) + (0.4 − 0.9), over the two earlier ones.
    assert backward_transfer(MATRIX) == near((-0.2 - 0.5) / 2)
    # Stage 2 right before its training 0.1, untrained 0.0; stage 3 right before 0.4, untrained 0.2.
    assert zero_shot_transfer(MATRIX) == near((0.1 + 0.2) / 2)
    assert final_stage_performance(MATRIX) == 0.7


def test_matrix_metrics_after_two_of_three_stages_by_hand():
    matrix = MATRIX[:3]
    assert average_performance(matrix) == near((0.5 + 0.9) / 2)  # stage 3 is still to come
    assert forgetting(matrix) == near((0.3 + 0.0) / 2)
    assert backward_transfer(matrix) == near(-0.3)
    assert zero_shot_transfer(matrix) == near((0.1 + 0.2) / 2)  # stage 3 is about to be trained
    assert final_stage_performance(matrix) == 0.9
    # After one stage only the next one's gain is known.
    assert zero_shot_transfer(MATRIX[:2]) == near(0.1)


def test_two_stages_by_hand():
    matrix = np.array([[0.0, 0.1], [1.0, 0.3], [0.4, 0.8]])
    assert average_performance(matrix) == near(0.6)
    assert forgetting(matrix) == near(0.3)  # (0.6 + 0) / 2
    assert backward_transfer(matrix) == near(-0.6)
    assert zero_shot_transfer(matrix) == near(0.2)


def test_one_stage():
    matrix = np.array([[0.2], [0.9]])
    assert (average_performance(matrix), final_stage_performance(matrix)) == (0.9, 0.9)
    assert (forgetting(matrix), backward_transfer(matrix), zero_shot_transfer(matrix)) == (0.0, 0.0, 0.0)


def test_an_agent_that_never_changes():
    matrix = np.tile([0.3, -0.5, 1.5], (4, 1))
    assert average_performance(matrix) == near(1.3 / 3)
    assert (forgetting(matrix), backward_transfer(matrix), zero_shot_transfer(matrix)) == (0.0, 0.0, 0.0)
    assert final_stage_performance(matrix) == 1.5


def test_stages_without_scores_are_left_out():
    matrix = MATRIX.copy()
    matrix[:, 0] = NAN
    assert average_performance(matrix) == near((0.4 + 0.7) / 2)
    assert forgetting(matrix) == near((0.5 + 0.0) / 2)
    assert backward_transfer(matrix) == near(-0.5)
    nothing = np.full((4, 3), NAN)
    for metric in (average_performance, forgetting, backward_transfer, zero_shot_transfer, final_stage_performance):
        assert math.isnan(metric(nothing))
        assert math.isnan(metric(MATRIX[:1]))  # before the first stage has ended


def test_score_matrix_takes_the_last_evaluation_of_each_stage():
    np.testing.assert_array_equal(score_matrix(RUN, 3, 3), MATRIX)
    np.testing.assert_array_equal(score_matrix(RUN, 3, 3, pre=True), MATRIX / 2)
    np.testing.assert_array_equal(score_matrix(RUN[:6], 3, 2), MATRIX[:3])  # stage 3 is not finished
    np.testing.assert_array_equal(score_matrix(RUN[1:], 3, 1), [[NAN] * 3, MATRIX[1]])  # none before training
    np.testing.assert_array_equal(score_matrix([], 2, 0), [[NAN] * 2])


def test_evaluations_of_metrics_lines():
    def line(iteration, stage, **scores):
        scores = {f"continual/{name.replace('__', '/')}": value for name, value in scores.items()}
        return {"iteration": iteration, "stage": stage, "env_steps": 7 * iteration, **scores}

    lines = [
        line(0, 0, score__A=0.1, score__B=0.2, score_pre__A=0.0, score_pre__B=0.05),
        {"iteration": 1, "stage": 0, "env_steps": 7, "meta_train/return_post": 3.0},
        line(2, 0, score__A=0.5, score__B=0.2),
        line(2, 0, score__A=0.6, score__B=0.3),  # evaluated again after a resume
        line(3, 1, score__B=0.9, score__C=1.0),  # A has no success; C is none of ours
    ]
    first, second, third = evaluations(lines, ["A", "B"])
    assert first == Evaluation(0, 0, 0, (0.1, 0.2), (0.0, 0.05))
    assert (second.iteration, second.scores) == (2, (0.6, 0.3))
    assert np.isnan(second.scores_pre).all()
    assert (third.stage, third.env_steps) == (1, 21)
    np.testing.assert_array_equal(third.scores, [NAN, 0.9])
    assert evaluations(lines[1:2], ["A", "B"]) == []


def test_finished_stages():
    assert finished_stages(RUN, [10, 10, 10]) == 3
    assert finished_stages(RUN[:-1], [10, 10, 10]) == 2
    assert finished_stages(RUN[:2], [10, 10, 10]) == 0
    assert finished_stages([], [10]) == 0


def test_min_acc_by_hand():
    # Since their ends, stage 1 was at 0.2, 0.5, 0.7, 0.6 and stage 2 at 0.3, 0.4: lowest 0.2 and 0.3.
    assert min_acc(RUN, 3) == near((0.2 + 0.3) / 2)
    # At the end of stage 2 there is one earlier stage; its own low scores before its end do not count.
    assert min_acc(RUN[:5], 2) == near(0.2)
    # With evaluations at the ends of stages alone the dips are not seen: 0.5 and 0.4.
    assert min_acc([RUN[i] for i in (0, 2, 4, 6)], 3) == near((0.5 + 0.4) / 2)
    # The score at a stage's own end is not one after it, even where it is the lowest.
    assert min_acc(evaluated((0, 0, 0.9, 0.0), (1, 0, 0.1, 0.0), (2, 1, 0.5, 0.0)), 2) == near(0.5)
    # NaN is passed over.
    assert min_acc(evaluated((1, 0, 1.0, 0.0), (2, 1, NAN, 0.0), (3, 1, 0.5, 0.0)), 2) == near(0.5)


@pytest.mark.parametrize(("run", "finished"), [([], 0), (RUN[:1], 0), (RUN[:2], 0), (RUN[:3], 1)])
def test_min_acc_without_earlier_stages_is_undefined(run, finished):
    assert math.isnan(min_acc(run, finished))


def test_continual_metrics_by_hand():
    assert continual_metrics(RUN, 3, 3) == {
        "continual/average_performance": near(1.7 / 3),
        "continual/forgetting": near(0.7 / 3),
        "continual/backward_transfer": near(-0.35),
        "continual/forward_transfer": near(0.15),
        "continual/min_acc": near(0.25),
        "continual/plasticity": near(0.7),
    }


def test_undefined_continual_metrics_are_left_out():
    assert continual_metrics([], 3, 0) == continual_metrics(RUN[:2], 3, 0) == {}
    assert continual_metrics(RUN[:3], 3, 1) == {
        "continual/average_performance": near(0.8),
        "continual/forgetting": 0.0,
        "continual/backward_transfer": 0.0,
        "continual/forward_transfer": near(0.1),
        "continual/plasticity": near(0.8),
    }
    assert continual_metrics(RUN[:4], 3, 1) == continual_metrics(RUN[:3], 3, 1) | {
        "continual/min_acc": near(0.2)
    }  # amid stage 2
    one = continual_metrics(evaluated((0, 0, 0.1), (9, 0, 0.6)), 1, 1)
    assert one.pop("continual/average_performance") == one.pop("continual/plasticity") == 0.6
    assert set(one.values()) == {0.0}
    undefined = continual_metrics(evaluated((0, 0, NAN, 0.0), (1, 0, NAN, 0.1), (2, 1, NAN, 0.5)), 2, 2)
    assert undefined["continual/average_performance"] == 0.5
    assert "continual/backward_transfer" not in undefined  # the only earlier stage has no scores


def test_training_curve_begins_right_before_the_stage():
    curve = training_curve(RUN, 1)
    np.testing.assert_array_equal(curve.iterations, [0, 5, 10])
    np.testing.assert_array_equal(curve.scores, [0.1, 0.5, 0.9])
    np.testing.assert_array_equal(training_curve(RUN, 0).scores, [0.1, 0.4, 0.8])
    np.testing.assert_array_equal(training_curve(RUN, 1, 0).scores, [0.8, 0.2, 0.5])
    gaps = training_curve(evaluated((0, 0, NAN), (4, 0, 0.5), (8, 0, NAN)), 0)
    np.testing.assert_array_equal(gaps, [[4], [0.5]])
    assert not len(training_curve([], 0).scores)


def test_the_curve_of_a_new_agent_begins_with_what_was_scored_before_training():
    found = evaluated((0, 0, 0.0, 0.1), (10, 0, 0.9, -0.7), (20, 1, 0.2, 0.8))
    assert training_curve(found, 1).scores.tolist() == [-0.7, 0.8]
    curve = training_curve(found, 1, scratch=True)
    assert curve.iterations.tolist() == [0, 10] and curve.scores.tolist() == [0.1, 0.8]
    assert training_curve(found, 0, scratch=True).scores.tolist() == [0.0, 0.9]


def test_area_by_hand():
    # Trapezoids: (0.1 + 0.5) / 2 · 5 + (0.5 + 0.9) / 2 · 5 = 1.5 + 3.5, over 10 iterations.
    assert area_under_curve(training_curve(RUN, 1)) == near(0.5)
    # Unequal distances: (0 + 1) / 2 · 2 + 1 · 8 = 9, over 10; a plain mean of the scores were 2/3.
    curve = Curve(np.array([0.0, 2.0, 10.0]), np.array([0.0, 1.0, 1.0]))
    assert area_under_curve(curve) == near(0.9)
    # Cut off at 1, where the score is 0.5: (0 + 0.5) / 2. At 6: (1 + 4) / 6.
    assert area_under_curve(curve, 1.0) == near(0.25)
    assert area_under_curve(curve, 6.0) == near(5 / 6)
    assert area_under_curve(curve, 99.0) == near(0.9)
    assert math.isnan(area_under_curve(curve, 0.0))
    assert math.isnan(area_under_curve(Curve(np.array([3.0]), np.array([1.0]))))


def test_forward_transfer_by_hand():
    line = np.array([0.0, 10.0])
    curves = [Curve(line, np.array([0.0, 1.0])), Curve(line, np.array([0.6, 1.0])), Curve(line, np.array([0.0, 0.4]))]
    reference = Curve(line, np.array([0.2, 1.0]))
    # Areas 0.5, 0.8 and 0.2 against 0.6: −0.1/0.4, 0.2/0.4, −0.4/0.4.
    np.testing.assert_allclose(forward_transfer(curves, [reference] * 3), [-0.25, 0.5, -1.0], rtol=0, atol=1e-12)
    # A reference of 20 iterations counts up to the tenth: from 0 to 0.5, area 0.25. (0.5 − 0.25) / 0.75.
    longer = Curve(2 * line, np.array([0.0, 1.0]))
    np.testing.assert_allclose(forward_transfer(curves[:1], [longer]), [1 / 3], rtol=0, atol=1e-12)


def test_forward_transfer_that_is_undefined():
    line = np.array([0.0, 10.0])
    curve, solved = Curve(line, np.array([0.0, 1.0])), Curve(line, np.array([1.0, 1.0]))
    empty = Curve(np.array([]), np.array([]))
    assert np.isnan(forward_transfer([curve, curve, empty], [solved, empty, curve])).all()
    assert forward_transfer([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 references for 2 stages"):
        forward_transfer([curve, curve], [curve])


A_B_A = evaluated(
    (0, 0, 0.0, 0.0),
    (10, 0, 0.5, 0.0),
    (20, 0, 0.72, 0.0),
    (30, 0, 0.8, 0.1),
    (60, 1, 0.1, 0.9),  # forgotten
    (65, 2, 0.7, 0.5),
    (70, 2, 0.75, 0.3),
    (90, 2, 0.9, 0.1),
)


def test_relearning_by_hand():
    # 90 % of 0.8 is 0.72: reached at iteration 20 at first, then 70 − 60 = 10 iterations into the second time.
    assert relearning(A_B_A, 0, 2) == (20, 10)
    assert relearning(A_B_A, 0, 2, fraction=0.6) == (10, 5)  # 0.48
    assert relearning(A_B_A[:6], 0, 2) == (20, None)
    assert relearning(A_B_A, 0, 2, fraction=0.1) == (10, 0)  # 0.08 was never lost


def test_relearning_of_what_was_never_learned():
    assert relearning(evaluated((0, 0, 0.0), (9, 0, 0.0), (18, 1, 0.0), (27, 2, 0.5)), 0, 2) == (None, None)
    assert relearning(evaluated((0, 0, 0.0), (9, 0, NAN), (27, 2, 0.5)), 0, 2) == (None, None)
    assert relearning([], 0, 2) == (None, None)
