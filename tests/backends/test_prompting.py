"""Modes of a problem row: what a verifier sees, and which demonstration belongs to a mode."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.backends.prompting import demonstration, format_answer, in_modes, visible
from posttrain.rewards.verifiers import AnswerVerifier, ExactVerifier

ROW: dict[str, Any] = {
    "id": "1",
    "domain": "add",
    "prompt": "a 4-1",
    "answer": "3",
    "demo": "4-1=3",
    "thought": "4-1=3",
    "direct": "3",
}


@pytest.mark.parametrize(
    ("response", "mode", "seen"),
    [
        ("<think>4-1=3</think>3", None, "3"),
        ("hm 4</think>3", None, "3"),
        ("<think>3", None, None),
        ("x <think> 3", None, "x <think> 3"),
        ("<think>4-1=3</think>3", "high", "3"),
        ("3", "low", None),
        ("<think>4-1=3</think>3", "think", "3"),
        ("<think>\nhm\n</think>\n\n3 ", "think", "3 "),
        # The prompt may have opened the block.
        ("hm</think>3", "think", "3"),
        ("<think>a</think>b</think>3", "think", "3"),
        ("<think>4-1=3", "think", None),
        ("3", "think", None),
        ("3", "no_think", "3"),
        ("<think>hm</think>3", "no_think", None),
        ("hm</think>3", "no_think", None),
        ("<think>3", "no_think", None),
    ],
)
def test_what_is_visible(response: str, mode: str | None, seen: str | None) -> None:
    assert visible(response, mode) == seen


@pytest.mark.parametrize(
    ("response", "mode", "score"),
    [
        ("3", None, 1.0),
        ("3", "no_think", 1.0),
        ("3", "think", 0.0),
        ("<think>x</think>3", "think", 1.0),
        ("<think>3</think>4", "think", 0.0),
        ("<think>x</think>3", "no_think", 0.0),
        ("<think>x</think>3", None, 1.0),
        ("<think>3</think>4", None, 0.0),
    ],
)
def test_a_verifier_sees_the_answer_alone(response: str, mode: str | None, score: float) -> None:
    row = ROW if mode is None else ROW | {"mode": mode}
    assert AnswerVerifier(verifier=ExactVerifier()).score(response, row) == score


def test_the_demonstration_of_a_mode() -> None:
    assert demonstration(ROW) == "4-1=3"
    assert demonstration(ROW, "think") == "<think>4-1=3</think>3"
    assert demonstration(ROW, "no_think") == "3"
    plain = {field: ROW[field] for field in ROW if field not in ("thought", "direct")}
    assert demonstration(plain, "no_think") == "4-1=3"
    assert demonstration(plain, "think") is None
    assert demonstration(plain | {"thought": "t"}, "think") == "<think>t</think>4-1=3"
    assert demonstration(plain | {"demo": None, "thought": "t"}, "think") is None


def test_rows_occur_in_each_mode() -> None:
    other = ROW | {"id": "2"}
    assert in_modes([ROW, other], []) == [ROW, other]
    rows = in_modes([ROW, other], ["no_think", "think"])
    assert [(r["id"], r["mode"], r["demo"]) for r in rows] == [
        ("1", "no_think", "3"),
        ("1", "think", "<think>4-1=3</think>3"),
        ("2", "no_think", "3"),
        ("2", "think", "<think>4-1=3</think>3"),
    ]
    assert "mode" not in ROW


def test_an_answer_in_the_form_of_its_mode() -> None:
    assert [visible(format_answer("3", m), m) for m in (None, "think", "no_think")] == ["3"] * 3
