"""How numbers are written."""

from __future__ import annotations

import pytest

from posttrain.engine.atomic import human_bytes
from posttrain.report import wording
from posttrain.stages.kinds import shown_kind

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (7.0, "7"),
        (0.01234, "0.0123"),
        (-0.5, f"{MINUS}0.5"),
        (9999, "9999"),
        (12345, "12.3k"),
        (999_999, "1M"),
        (1_234_567, "1.23M"),
        (2.5e9, "2.5G"),
        (1e-7, f"1e{MINUS}07"),
        (float("inf"), "inf"),
        (None, "—"),
        (True, "True"),
        ("text", "text"),
    ],
)
def test_number(value: object, text: str):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "clock", "duration"),
    [
        (0.44, "0:00", "0.4 s"),
        (42.4, "0:42", "42 s"),
        (60, "1:00", "1 min"),
        (312, "5:12", "5 min 12 s"),
        (3723, "1:02:03", "1 h 2 min"),
    ],
)
def test_times(seconds: float, clock: str, duration: str):
    assert wording.clock(seconds) == clock
    assert wording.duration(seconds) == duration


def test_no_minus_zero():
    assert wording.fixed(-0.001, 2) == "0.00"
    assert wording.fixed(-0.01, 2) == f"{MINUS}0.01"


def test_shares():
    assert wording.percent(0.1234) == "12.3"
    assert wording.percent_range({"low": 0.1, "high": 0.256}) == "10.0\N{EN DASH}25.6"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_400_000, "1.4 MB")]
)
def test_size(count: int, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("kind", "metrics", "text"),
    [
        ("evaluate", {"norm": 0.9123, "reward": 1.0}, "Norm 0.912"),
        ("reward_model", {"accuracy": 0.5, "heldout_accuracy": 0.75}, "held-out 0.75"),
        ("reward_model", {"accuracy": 0.5}, "accuracy 0.5"),
        ("domain", {"train": 3000, "heldout": 400}, "problems 3000"),
        ("rl", {"kl": 1.0, "reward": None}, ""),
        ("no_kind_of_ours", {"loss": 0.25}, "loss 0.25"),
    ],
)
def test_headline_is_the_number_of_the_kind(kind: str, metrics: dict[str, object], text: str):
    assert wording.headline(shown_kind(kind), metrics) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.91, 1, "0.91|1.00"), (-0.05, 0.2, "-0.05 to 0.20"), (-2, -0.4, "-2.00 to -0.40")],
)
def test_no_minus_stands_behind_a_dash(low: float, high: float, text: str):
    written = text.replace("-", MINUS).replace("|", wording.RANGE)
    assert wording.ratio_range(low, high) == written
