"""Schedules by hand, their mistakes, and how a stage's settings take them in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from posttrain import schedules
from posttrain.engine.errors import ConfigError
from posttrain.schedules import Schedule, parse_schedule


def values(schedule: Schedule, count: int, history: Sequence[float] = ()) -> list[Any]:
    return [schedule.at(step, count, lambda _: history) for step in range(count)]


def test_steps_hold_until_the_next() -> None:
    assert values(schedules.steps({0: 1.0, 2: 0.5, 3: 0}), 5) == [1.0, 1.0, 0.5, 0, 0]


def test_linear_ends_at_the_last_step_or_where_it_is_told() -> None:
    assert values(schedules.linear(1.0, 0.0), 5) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert values(schedules.linear(1.0, 0.0, until=2), 5) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_a_line_between_whole_numbers_is_a_line() -> None:
    """What counts something is rounded by the settings; a weight from 0 to 1 must not jump."""
    assert values(schedules.linear(0, 1), 5) == [0, 0.25, 0.5, 0.75, 1]


def test_cosine_by_hand() -> None:
    assert values(schedules.cosine(2.0, 0.0), 3) == pytest.approx([2.0, 1.0, 0.0])
    # cos(pi / 4) = .7071
    assert values(schedules.cosine(2.0, 0.0), 5)[1] == pytest.approx(1.70711, abs=1e-5)


def test_alternate_takes_turns() -> None:
    assert values(schedules.alternate("a", "b", every=2), 6) == ["a", "a", "b", "b", "a", "a"]


def test_a_plateau_moves_the_value_once_per_pair_of_windows() -> None:
    """Rising for 4 steps, flat after: windows of 2 first see (.2, .3) after (.0, .1), gain .2.

    Without a move the windows slide: after 5 rewards (.2 .3 | .1 ...): mean(.3, .3) - mean(.1, .2)
    = .15 >= .1 stays; after 6, mean(.3, .3) - mean(.2, .3) = .05 < .1 moves. The windows start anew
    at 6, so the next move is at 10.
    """
    rewards = [0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    plateau = schedules.on_plateau(1.0, 1.3, change=0.2, patience=2, gain=0.1)
    assert values(plateau, 12, rewards) == [1.0] * 6 + [1.2] * 4 + [1.3] * 2


def test_a_plateau_reads_only_what_came_before() -> None:
    plateau = schedules.on_plateau(1.0, 2.0, times=2.0, patience=1)
    assert plateau.at(1, 9, lambda _: [0.5, 0.5, 0.5]) == 1.0
    assert plateau.at(2, 9, lambda _: [0.5, 0.5, 0.5]) == 2.0


def test_tracking_steps_towards_its_target_within_bounds() -> None:
    follow = schedules.track("entropy", target=0.3, first=0.0, change=0.25, low=0.0, high=0.5)
    seen = [0.1, 0.2, 0.2, 0.5, 0.3]
    assert values(follow, 6, seen) == [0.0, 0.25, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: schedules.steps({5: 1.0}), "the first is 0"),
        (lambda: schedules.alternate(1.0, every=2), "at least 2 items"),
        (lambda: schedules.linear(1.0, 0.0, until=0), "until = 0"),
        (lambda: schedules.on_plateau(1.0, 2.0), "exactly one of change and times"),
        (lambda: schedules.on_plateau(1.0, 2.0, change=-0.1), "never move from 1.0 towards 2.0"),
        (lambda: schedules.on_plateau(1.0, 2.0, change=0.1, patience=0), "patience = 0"),
        (
            lambda: schedules.track("x", target=1, first=3.0, change=1, low=0, high=2),
            "not between",
        ),
        (lambda: parse_schedule({"schedule": "linaer"}), "choices: steps, linear"),
        (lambda: parse_schedule({"schedule": "linear", "first": 1}), "it takes first, last"),
        (
            lambda: parse_schedule({"schedule": "linear", "firs": 1, "last": 0}),
            "has the fields firs",
        ),
        (lambda: parse_schedule("linear"), "schedule None is not known"),
        (lambda: schedules.linear("a", 1.0), "first = 'a' is none; choices for other values"),
        (lambda: schedules.linear(1.0, 0.0, until="x"), "until = 'x': "),
        (lambda: schedules.steps([1.0]), r"values = \[1.0\]; see posttrain.schedules.steps"),
    ],
)
def test_mistakes_are_told(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_plateaus_start_their_windows_anew() -> None:
    """Windows of 2: 1, 1 after 0, 1 has risen; 1, 1 after 1, 1 has not; then four more are seen."""
    seen = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert schedules.plateaus(seen, patience=2, gain=0.01) == [5, 9]
    assert schedules.plateaus(seen[:4], patience=2, gain=0.01) == []


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.steps({0: 32, 820: 64}),
        schedules.linear(1, 0.5, until=3),
        schedules.cosine(1.0, 0.0),
        schedules.alternate("a", None, every=2),
        schedules.on_plateau(0.9, 1.2, change=0.1),
        schedules.track("entropy", target=1, first=0, change=0.5, low=0, high=2),
    ],
    ids=lambda schedule: schedule.schedule,
)
def test_the_json_form_is_read_again(schedule: Schedule) -> None:
    told = json.loads(json.dumps(schedule.model_dump(mode="json")))
    assert told["schedule"] == schedule.schedule
    assert schedules.is_schedule(told) and schedules.is_schedule(schedule)
    assert parse_schedule(told) == schedule
    assert parse_schedule(told).model_dump(mode="json") == told


def test_corners_are_where_schedules_turn() -> None:
    """2 values of 2 steps each, 8 rounds: the last of 16 turns is at 30."""
    turning = [schedules.steps({0: 1, 5: 2}), schedules.linear(1, 0, until=7)]
    assert schedules.corners(turning, 10) == ([0, 5, 7, 9], 10)
    found, total = schedules.corners([schedules.alternate(1, 2, every=2)], None)
    assert found == [*range(0, 31, 2), 31] and total == 32
