"""What runs beside what."""

from __future__ import annotations

from posttrain.estimate.timetable import timetable

INPUTS = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []}
SECONDS = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 1.0, "e": 3.0}


def test_one_at_a_time_adds_up() -> None:
    times = timetable("abcde", INPUTS, SECONDS, jobs=1)
    assert times.seconds == 12
    assert [slot.name for slot in times.slots] == ["a", "b", "c", "d", "e"]
    assert times.critical == ["a", "b", "c", "d", "e"]


def test_two_at_once_end_with_the_longest_chain() -> None:
    times = timetable("abcde", INPUTS, SECONDS, jobs=2)
    starts = {slot.name: slot.start for slot in times.slots}
    # e takes the second place at once; c has to wait for it.
    assert starts == {"a": 0, "e": 0, "b": 1, "c": 3, "d": 8}
    assert times.seconds == 9
    assert times.critical == ["e", "c", "d"] or times.critical == ["a", "b", "c", "d"]
    assert times.beside("b") == ["e"]


def test_the_most_at_once() -> None:
    times = timetable("abcde", INPUTS, SECONDS, jobs=3)
    amounts = {"a": 1.0, "b": 10.0, "c": 20.0, "d": 5.0, "e": 7.0}
    assert times.most(amounts) == (37.0, ["e", "b", "c"])


def test_what_is_there_already_is_not_waited_for() -> None:
    times = timetable("abcde", INPUTS, {"d": 1.0}, jobs=2)
    assert times.seconds == 1 and times.critical == ["d"]
    assert timetable("abcde", INPUTS, {}, jobs=2).critical == []
