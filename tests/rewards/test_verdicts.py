"""A verdict is read from its own form, or it is none."""

from __future__ import annotations

import pytest

from posttrain.engine.errors import StageError
from posttrain.rewards.verdicts import better, grade, met

RUBRIC = [{"criterion": "a", "weight": 3}, {"criterion": "b"}]


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("Grade: 7/10", 0.7),
        ("Grade: 8 out of 10", 0.8),
        ("Grade: 7 of 10", 0.7),
        ("Grade: 6. I found 3 errors.", 0.6),
        ("Some thoughts on 2 steps.\nGrade: **9** / 10", 0.9),
        ("Grade: 4\n\n(0 is useless, 10 is perfect)", 0.4),
        ("**Grade:** 8", 0.8),
        ("**Grade**: 8.5 - good", 0.85),
        (r"Grade: \boxed{8}", 0.8),
        ("Grade: $8$", 0.8),
        ("Grade: 70%", 0.7),
        ("grade: 10/10.", 1.0),
        ("Grade: 2, no:\nGrade: 3", 0.3),
        ("<think>Grade: 1</think>Grade: 3", 0.3),
    ],
)
def test_the_number_after_the_last_marker_is_the_grade(reply: str, share: float) -> None:
    assert grade(reply, 10) == pytest.approx(share)


def test_a_grade_that_brings_its_scale_is_a_share_of_that() -> None:
    assert grade("Grade: 7/10", 5) == 0.7
    assert grade("Grade: 50%", 5) == 0.5
    assert grade("Grade: 2.5", 5) == 0.5


@pytest.mark.parametrize(
    "reply",
    [
        "7",
        "I would say 7 of 10.",
        "Grade: N",
        "Grade: 7-8",
        "Grade: 7 or 8",
        "Grade: 7,5",
        "Grade: 7th",
        "Grade: 1e5",
        "Grade: 11",
        "Grade: 12/10",
        "Grade: 3 / 0",
        "Grade: -3",
        "Grade: 7 out of ten",
        "Grade: 7\nGrade: unsure",
        "Grade: " + "9" * 5000,
        "Upgrade: 3",
        "<think>Grade: 3",
        "",
    ],
)
def test_what_is_no_grade_is_not_guessed(reply: str) -> None:
    with pytest.raises(StageError, match=r"no grade from 0 to 10 after 'Grade:'"):
        grade(reply, 10)


@pytest.mark.parametrize(
    ("reply", "wins"),
    [
        ("Better: 1, because answer 2 is wrong", 1.0),
        ("Better: 2\nAnswer 1 has 1 mistake", 0.0),
        ("**Better:** Answer 2", 0.0),
        ("Better: **1**.", 1.0),
        ("Better: 2\nBetter: 1", 1.0),
        ("<think>Better: 1</think>Better: 2", 0.0),
    ],
)
def test_the_answer_after_the_last_marker_is_better(reply: str, wins: float) -> None:
    assert better(reply) == wins


@pytest.mark.parametrize(
    "reply",
    ["1", "1 is good, 2 better", "Better: both", "Better: 1 or 2", "Better: 1 or Better: 2",
     "Better: 12", "Better: 1.5"],
)  # fmt: skip
def test_what_names_no_better_answer_is_not_guessed(reply: str) -> None:
    with pytest.raises(StageError, match="neither 1 nor 2 after 'Better:'"):
        better(reply)


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("1: yes\n2: yes\n\nNotes:\n1. No errors were found.", 1.0),
        ("1: yes\n2: yes\n\nNotes:\n1. No, nothing.", 1.0),
        ("1: yes\n2: yes\n\nNotes:\n1. No", 1.0),
        ("1: no\nOn a second thought\n1: yes\n2. No", 0.75),
        ("1: no\n2: no\n\nAgain:\n1: yes\n2: no", 0.75),
        ("1: yes, it is right\n2: no - it is rude", 0.75),
        ("- **1:** Yes\n\n- **2:** No.", 0.75),
        ("Criterion 1: no\nCriterion 2: yes", 0.25),
        ("<think>1: no\n2: no</think>1: yes\n2: yes", 1.0),
    ],
)
def test_the_last_whole_block_of_verdicts_decides(reply: str, share: float) -> None:
    assert met(reply, RUBRIC) == share


@pytest.mark.parametrize(
    "reply",
    [
        "1: yes",
        "1: yes\n1: no\n2: yes",
        "1. No errors were found\n2. Yes it is",
        "1: yes, it is\n2: yes\n\nNotes:\n1. No, not all\n2. Yes, so",
        "both are met",
    ],
)
def test_criteria_without_one_verdict_each_are_not_guessed(reply: str) -> None:
    with pytest.raises(StageError, match="criteria 1 to 2"):
        met(reply, RUBRIC)


def test_one_criterion_is_not_overridden_by_notes() -> None:
    assert met("1: yes\n\nNotes:\n1. No, nothing.", RUBRIC[:1]) == 1.0
    with pytest.raises(StageError):
        met("1: yes, it is\n\nNotes:\n1. No, nothing.", RUBRIC[:1])
