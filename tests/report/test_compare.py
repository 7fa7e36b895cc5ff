"""Evaluations side by side."""

from __future__ import annotations

import pytest

from posttrain.report.compare import Column, Side, unpaired


def column(artifact: str, student: str | None = None, **domains: float) -> Column:
    values = {name: {"value": value} for name, value in domains.items()}
    return Column(artifact=artifact, student=student, evaluation=artifact, domains=values)


def test_an_unpaired_interval_by_hand() -> None:
    """Half widths .3 and .4 give .5."""
    a = {"value": 0.5, "low": 0.2, "high": 0.8}
    b = {"value": 0.6, "low": 0.2, "high": 1.0}
    found = unpaired(a, b)
    assert found == {
        "value": pytest.approx(0.1),
        "low": pytest.approx(-0.4),
        "high": pytest.approx(0.6),
    }
    assert unpaired({"value": 0.5}, b) == {"value": pytest.approx(0.1)}


def test_a_student_is_compared_with_the_one_of_its_name() -> None:
    one, two = column("A", "x", add=1), column("A", "y", rev=1)
    same, other = column("B", "y", add=1), column("C", "z", mul=1)
    side = Side(split="validation", columns=[one, two, same, other])
    assert [side.reference(c) for c in side.columns] == [None, None, two, one]
    assert side.domains == ["add", "rev", "mul"]
