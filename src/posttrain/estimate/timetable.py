"""When each stage of a run would be at work: as the engine starts them, so many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The time of one stage."""

    name: str
    start: float
    end: float
    waited_for: str | None
    """The stage whose end let it begin; None for one that begins at once."""


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """The times of all stages."""

    slots: Sequence[Slot]
    seconds: float
    """From the first start to the last end."""

    @property
    def critical(self) -> list[str]:
        """The stages that the end waits for, one after the other."""
        by_name = {slot.name: slot for slot in self.slots}
        last = max(self.slots, key=lambda slot: slot.end, default=None)
        path: list[str] = []
        while last is not None:
            path.append(last.name)
            last = None if last.waited_for is None else by_name[last.waited_for]
        return path[::-1]

    def beside(self, name: str) -> list[str]:
        """The stages that are at work at some time while `name` is."""
        own = next(slot for slot in self.slots if slot.name == name)
        return [
            slot.name
            for slot in self.slots
            if slot.name != name and slot.start < own.end and own.start < slot.end
        ]

    def most(self, amounts: Mapping[str, float]) -> tuple[float, list[str]]:
        """The largest sum of these amounts over stages at work at once, and which they are."""
        found: tuple[float, list[str]] = (0.0, [])
        for moment in self.slots:
            names = [s.name for s in self.slots if s.start <= moment.start < s.end]
            total = sum(amounts.get(name, 0.0) for name in names)
            if total > found[0]:
                found = (total, names)
        return found


def timetable(
    order: Sequence[str],
    inputs: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
    *,
    jobs: int,
) -> Timetable:
    """Stages in the order of the graph; each begins when its inputs are there and fewer than `jobs`
    are at work. `seconds` has those that are to run."""
    left = [name for name in order if name in seconds]
    ends: dict[str, float] = {}
    slots: list[Slot] = []
    running: dict[str, float] = {}
    now, freed = 0.0, None
    while left or running:
        for name in list(left):
            waits = [source for source in inputs[name] if source in seconds]
            if len(running) < jobs and all(source in ends for source in waits):
                left.remove(name)
                running[name] = now + seconds[name]
                slots.append(Slot(name=name, start=now, end=running[name], waited_for=freed))
        freed = min(running, key=lambda name: running[name])
        now = ends[freed] = running.pop(freed)
    return Timetable(slots=slots, seconds=now)
