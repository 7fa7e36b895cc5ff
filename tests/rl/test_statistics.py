"""Accuracy, recovery and intervals against values derived by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from posttrain.report.scores import verdict
from posttrain.rl.statistics import (
    Scores,
    candidates,
    evaluation,
    ratio_interval,
    wins,
)


def same(values: Any) -> Scores:
    """One model's scores, alike under both decodings."""
    array = np.asarray(values, dtype=float)
    return Scores(sampled=array, greedy=array)


def evaluate(
    scores: Mapping[str, Mapping[str, Scores]], *, resamples: int = 4000, seed: int = 0
) -> dict[str, Any]:
    names = list(scores["student"])
    routes = {name: name for name in names if f"teachers.{name}" in scores}
    constants = {name: {"value": 0.0, "response": ""} for name in names}
    return evaluation(scores, routes=routes, constants=constants, resamples=resamples, seed=seed)


def test_recovery_and_its_interval_by_hand():
    """Init knows nothing, the teacher everything, the student the first half of 100 problems.

    Every resample has gain 1, so recovery is the student's mean in it: a binomial of 100 tries at
    1/2, whose 2.5 % and 97.5 % quantiles are 40 and 60 successes.
    """
    half = [1.0] * 50 + [0.0] * 50
    result = evaluate(
        {"init": {"a": same([0] * 100)}, "teachers.a": {"a": same([1] * 100)}}
        | {"student": {"a": same(half)}}
    )
    row = result["domains"]["a"]
    assert row["num_problems"] == 100
    assert row["recovery"]["value"] == pytest.approx(0.5)
    assert row["recovery"]["low"] == pytest.approx(0.40, abs=0.011)
    assert row["recovery"]["high"] == pytest.approx(0.60, abs=0.011)
    # 100 differences of 1, with one of 1 and one of -1 more: .98 +- 1.96 sqrt(.0388 / 102).
    assert row["teacher_gain"] == pytest.approx(
        {"value": 1.0, "low": 0.9422, "high": 1.0}, abs=1e-4
    )
    assert row["student"]["value"] == 0.5
    assert row["note"] is None


def test_recovery_divides_by_the_teachers_gain():
    """Init 0.2, teacher 0.6, student 0.5: (0.5 - 0.2) / (0.6 - 0.2) = 0.75."""
    columns = {"init": 0.2, "teachers.a": 0.6, "student": 0.5}
    result = evaluate({model: {"a": same([value] * 10)} for model, value in columns.items()})
    assert result["domains"]["a"]["recovery"]["value"] == pytest.approx(0.75)
    assert result["models"]["teachers.a"]["a"]["sampled"] == pytest.approx(0.6)


def test_student_above_the_teacher_recovers_more_than_one():
    columns = {"init": 0.0, "teachers.a": 0.5, "student": 1.0}
    result = evaluate({model: {"a": same([value] * 10)} for model, value in columns.items()})
    assert result["domains"]["a"]["recovery"]["value"] == pytest.approx(2.0)


def test_norm_is_the_mean_over_domains_and_minimum_the_worst():
    """Recoveries 0.5 and 1.0 give Norm 0.75 and minimum 0.5."""
    zero, one = same([0] * 20), same([1] * 20)
    result = evaluate(
        {
            "init": {"a": zero, "b": zero},
            "teachers.a": {"a": one, "b": zero},
            "teachers.b": {"a": zero, "b": one},
            "student": {"a": same([1, 0] * 10), "b": one},
        }
    )
    assert result["norm"] == pytest.approx(0.75)
    assert result["min_recovery"] == pytest.approx(0.5)
    assert result["norm_low"] < 0.75 < result["norm_high"]
    # Only domain a varies, and it makes up half of the mean.
    interval = result["domains"]["a"]["recovery"]
    assert result["norm_high"] == pytest.approx((interval["high"] + 1) / 2)


def test_models_are_resampled_on_the_same_problems():
    """A teacher 0.1 better on every problem: its gain has no spread, whatever the problems' own.

    Resampling the two models separately would give the gain an interval about as wide as theirs.
    """
    hard = np.repeat([0.0, 0.9], 20)
    result = evaluate(
        {
            "init": {"a": same(hard)},
            "teachers.a": {"a": same(hard + 0.1)},
            "student": {"a": same(hard)},
        }
    )
    row = result["domains"]["a"]
    assert row["init"]["high"] - row["init"]["low"] > 0.2
    assert row["teacher_gain"]["high"] - row["teacher_gain"]["low"] < 1e-12
    assert row["recovery"]["value"] == pytest.approx(0.0)


@pytest.mark.parametrize("teacher", ["same", "worse", "noise"])
def test_recovery_is_suppressed_where_the_teacher_has_no_clear_gain(teacher: str):
    """Also where the teacher's mean is a little higher: 11 of 20 against 10 of 20 is noise."""
    init = np.array([1.0, 0.0] * 10)
    columns = {"same": init, "worse": init * 0.5, "noise": np.roll(init, 1)}
    columns["noise"][0] = columns["noise"][1] = 1.0
    result = evaluate(
        {
            "init": {"a": same(init), "b": same([0] * 20)},
            "teachers.a": {"a": same(columns[teacher]), "b": same([0] * 20)},
            "teachers.b": {"a": same(init), "b": same([1] * 20)},
            "student": {"a": same([1] * 20), "b": same([1] * 20)},
        }
    )
    row = result["domains"]["a"]
    assert row["recovery"] is None
    worse = teacher == "worse"
    assert row["note"] == (
        "teacher is worse than init" if worse else "teacher and init cannot be told apart"
    )
    # The suppressed domain counts neither for Norm nor for the minimum.
    assert result["norm"] == result["min_recovery"] == pytest.approx(1.0)
    assert result["norm_domains"] == result["greedy"]["norm_domains"] == 1


def test_decodings_are_judged_apart():
    """A gain under sampling only is sharpening: greedy recovery is not given."""
    init = Scores(sampled=np.zeros(30), greedy=np.ones(30))
    teacher = Scores(sampled=np.ones(30), greedy=np.ones(30))
    result = evaluate(
        {"init": {"a": init}, "teachers.a": {"a": teacher}, "student": {"a": teacher}}
    )
    row = result["domains"]["a"]
    assert row["recovery"]["value"] == pytest.approx(1.0)
    assert row["greedy"]["recovery"] is None
    assert row["greedy"]["init"]["value"] == 1.0
    assert result["norm"] == pytest.approx(1.0)
    found = {name: value for name, value in result["greedy"].items() if name != "gain"}
    assert found == dict.fromkeys(("norm", "norm_low", "norm_high", "min_recovery"), None) | {
        "norm_domains": 0
    }
    assert result["norm_domains"] == 1


def test_domain_without_a_teacher_has_accuracies_only():
    result = evaluate({"init": {"a": same([0, 1])}, "student": {"a": same([1, 1])}})
    row = result["domains"]["a"]
    assert row["teacher"] is None
    assert row["recovery"] is None
    assert row["note"] == "no teacher"
    assert row["student"]["value"] == 1.0
    assert result["norm"] is None


def test_intervals_follow_the_seed_and_nothing_else():
    generator = np.random.default_rng(1)
    columns = {m: same(generator.random(50)) for m in ("init", "student")}
    columns["teachers.a"] = same(columns["init"].sampled + 0.3)
    tables = {model: {"a": column} for model, column in columns.items()}
    shuffled = dict(reversed(tables.items()))
    assert evaluate(tables)["domains"] == evaluate(shuffled)["domains"]
    assert evaluate(tables)["domains"] != evaluate(tables, seed=1)["domains"]


def test_the_gain_is_the_mean_over_domains_of_paired_differences():
    """Student minus init is 1 in half of a's problems and 0 elsewhere, and 0.5 in all of b's:
    means .5 and .5. Resampled, a's is a binomial of 100 tries, half of whose spread is left in the
    mean over the two domains: .5 +- .05."""
    half = [1.0] * 50 + [0.0] * 50
    result = evaluate(
        {
            "init": {"a": same([0.0] * 100), "b": same([0.25] * 100)},
            "student": {"a": same(half), "b": same([0.75] * 100)},
        }
    )
    assert result["domains"]["a"]["gain"]["low"] == pytest.approx(0.40, abs=0.011)
    assert result["domains"]["b"]["gain"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    for table in (result, result["greedy"]):
        assert table["gain"]["value"] == pytest.approx(0.5)
        assert table["gain"]["low"] == pytest.approx(0.45, abs=0.01)
        assert table["gain"]["high"] == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ([1.0] * 20, "The student beats the init at temperature 1: +50.0 points"),
        ([0.0] * 20, "The student does NOT beat the init at temperature 1, it is worse: "),
        ([1.0, 0.0] * 10, "the two cannot be told apart: +0.0 points"),
    ],
)
def test_whether_the_student_beats_the_init_is_said_plainly(student: list[float], says: str):
    result = evaluate({"init": {"a": same([0.5] * 20)}, "student": {"a": same(student)}})
    assert says in verdict(result)


def test_a_domain_that_got_worse_is_named():
    result = evaluate(
        {
            "init": {"a": same([0.0] * 20), "b": same([0.5] * 20)},
            "student": {"a": same([1.0] * 20), "b": same([0.25] * 20)},
        }
    )
    assert verdict(result).endswith("over all domains; it is worse in b.")


def two_students(first: Any, second: Any, **others: Any) -> dict[str, Any]:
    scores = {"students.a": {"d": same(first)}, "students.b": {"d": same(second)}, **others}
    return candidates(
        scores,
        students={"a": "students.a", "b": "students.b"},
        along={},
        routes={},
        constants={"d": {"value": 0.0, "response": ""}},
        resamples=4000,
        seed=0,
    )


def test_paired_difference_by_hand():
    """Both are right on the same half of 100 problems, and the first on ten more.

    With one problem more for either side 11 and 1 of 102 tell them apart: 10/102 plus or minus
    1.96 sqrt((12/102 - (10/102)^2) / 102) is .034 to .162, however many both are right on. The two
    accuracies, unpaired, would differ by .1 plus or minus .14.
    """
    half = [1.0] * 50 + [0.0] * 50
    more = [1.0] * 60 + [0.0] * 40
    (pair,) = two_students(more, half)["pairs"]
    assert (pair["first"], pair["second"]) == ("a", "b")
    found = pair["domains"]["d"]
    assert found["value"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.0342, abs=1e-4)
    assert found["high"] == pytest.approx(0.1619, abs=1e-4)
    assert found["greedy"] == {key: found[key] for key in ("value", "low", "high")}
    assert pair["all"] == found


def test_the_difference_over_all_domains_is_the_mean_of_theirs():
    """+1 on 10 problems and -.5 on 40: every resample has these, so their mean .25 is certain."""
    scores = {
        "students.a": {"x": same([1] * 10), "y": same([0.0] * 40)},
        "students.b": {"x": same([0] * 10), "y": same([0.5] * 40)},
    }
    (pair,) = candidates(
        scores,
        students={"a": "students.a", "b": "students.b"},
        along={},
        routes={},
        constants={name: {"value": 0.0, "response": ""} for name in "xy"},
        resamples=100,
        seed=0,
    )["pairs"]
    for value in (pair["all"], pair["all"]["greedy"]):
        assert [value[end] for end in ("low", "value", "high")] == pytest.approx([0.25] * 3)


def test_without_an_init_there_is_no_gain_and_no_recovery():
    result = two_students([1, 0], [0, 0], **{"teachers.t": {"d": same([1, 1])}})
    view = result["students"]["a"]
    assert view["gain"] is None and view["norm"] is None and view["greedy"]["gain"] is None
    assert view["domains"]["d"]["init"] is None
    assert view["domains"]["d"]["note"] == "no init"
    assert verdict(view) == ""
    assert "init" not in result["models"]


def test_a_ratio_of_sums_weighs_problems_by_their_counts():
    """Log-ratios 3 on 3 tokens and 0 on 1: 3 / 4. A resample of two problems has 1 (both times the
    first), 0 (both times the second) or 3/4: the 2.5 % and 97.5 % quantiles are 0 and 1."""
    value = ratio_interval(np.array([3.0, 0.0]), np.array([3.0, 1.0]), resamples=2000, seed=0)
    assert value == pytest.approx({"value": 0.75, "low": 0.0, "high": 1.0})


def test_wins_count_ties_half():
    found = wins(np.array([2.0, -1.0, 0.5, -3.0]), np.array([1.0, -1.0, 0.7, -4.0]))
    assert found.tolist() == [1.0, 0.5, 0.0, 1.0]
