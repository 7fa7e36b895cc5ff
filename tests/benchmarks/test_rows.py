"""The arithmetic of the benchmark's result rows, and their page."""

from __future__ import annotations

import json

import pytest

from suite.page import page
from suite.rows import Row, alone, compared, not_measured

CONDITIONS = {
    "date": "2026-01-02",
    "threads": 2,
    "load": 0.0,
    "minutes": 30.0,
    "machine": {"cpu": "cpu", "cores": 2, "python": "3.11", "packages": {"torch": "2"}},
}


def test_compared_takes_the_ratio_of_medians() -> None:
    """Medians 30 and 10, so the ratio is 3; pairs give 20/10, 30/8 and 90/20."""
    row = compared("p", "tokens/s", [20, 30, 90], [10, 8, 20], peer_name="other", target=3.0)
    assert (row.ours, row.peer, row.ratio) == (30, 10, 3.0)
    assert row.ratio_range == (2.0, 4.5)
    assert (row.ours_range, row.peer_range, row.repetitions) == ((20, 90), (8, 20), 3)
    assert row.met is True


@pytest.mark.parametrize(
    ("sense", "target", "met"),
    [(">=", 3.0, True), (">=", 3.1, False), ("<=", 3.0, True), ("<=", 2.9, False)],
)
def test_the_target_is_held_against_the_ratio(sense: str, target: float, met: bool) -> None:
    row = compared("p", "s", [3.0], [1.0], peer_name="other", sense=sense, target=target)
    assert row.met is met


def test_without_a_peer_the_target_is_held_against_our_median() -> None:
    assert alone("p", "s", [1.0, 1.4, 9.0], target=1.5).met is True
    assert alone("p", "s", [1.0, 1.6, 1.7], target=1.5).met is False
    assert alone("p", "GB/s", [1.0]).met is None


def test_what_was_not_measured_is_not_met() -> None:
    row = not_measured("p", "tokens/s", "no such stage", target=1.5)
    assert row.met is False
    assert row.note == "not measured: no such stage"
    assert not_measured("p", "tokens/s", "no such stage").met is None


def test_a_row_becomes_json_with_the_promised_fields() -> None:
    row = compared("p", "s", [1 / 3], [1.0], peer_name="other", details={"all": {"a": 2 / 3}})
    values = json.loads(json.dumps(row.as_json()))
    assert {"path", "ours", "peer", "unit", "ratio", "target", "met"} <= set(values)
    assert (values["ours"], values["details"]) == (0.3333, {"all": {"a": 0.6667}})
    assert values["ours_range"] == [0.3333, 0.3333]


def test_the_page_has_each_row_once_and_each_note_once() -> None:
    rows = [
        Row(path="a", unit="s", ours=1.0, ratio=2.0, target=3.0, note="same").as_json(),
        Row(path="b", unit="s", ours=12345.6, note="same").as_json(),
        not_measured("c", "s", "why", target=1.0).as_json(),
    ]
    lines = page(rows, CONDITIONS).splitlines()
    assert "0 of 2 targets are met." in lines
    assert "| a | 1 | - | s | 2.00 | >= 3 | no |  |  |  |" in lines
    assert "| b | 12,350 | - | s |  |  |  |  |  |  |" in lines
    assert "| c | - | - | s |  | >= 1 | no |  |  |  |" in lines
    assert "- a; b: same." in lines
    assert "- c: not measured: why." in lines
