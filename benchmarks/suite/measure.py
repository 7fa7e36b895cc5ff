"""Timing: both sides in turn, one warm-up each, wall-clock seconds of the work alone."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a part is measured."""

    threads: int
    repetitions: int
    quick: bool
    """Small batches, to see that a part works; its numbers mean nothing."""
    folder: Path
    """A scratch directory, shared by all parts of a run."""
    model: Path | None = None
    """A checkpoint of a real model, for the parts that measure one."""

    def few(self, most: int) -> int:
        """Repetitions of a row that only informs and is slow."""
        return min(self.repetitions, most)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one repetition did."""

    tokens: int
    """Useful ones: no padding, nothing after the end token."""
    lengths: tuple[int, ...] = ()
    """Of the sampled responses, where it sampled; they add up to `tokens`."""


def sampled(lengths: list[int]) -> Work:
    """Responses of these lengths."""
    return Work(tokens=sum(lengths), lengths=tuple(lengths))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One repetition."""

    seconds: float
    work: Work

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.work.tokens / self.seconds


Side = Callable[[int], Work]
"""Does the work of repetition i; only what must be timed happens inside."""


def interleave(
    sides: Mapping[str, Side], repetitions: int, *, warm_up: bool = True, what: str = ""
) -> dict[str, list[Timed]]:
    """Run all sides in turn, `repetitions` times, after one untimed repetition of each."""
    timed: dict[str, list[Timed]] = {name: [] for name in sides}
    for repetition in range(-1 if warm_up else 0, repetitions):
        for name, side in sides.items():
            began = time.perf_counter()
            work = side(repetition)
            seconds = time.perf_counter() - began
            if repetition >= 0:
                timed[name].append(Timed(seconds=seconds, work=work))
            number = "warm-up" if repetition < 0 else repetition + 1
            say(f"{what}  {name}  {number}: {seconds:.2f} s")
    return timed


def rates(series: list[Timed]) -> list[float]:
    """Useful tokens per second of every repetition."""
    return [one.rate for one in series]


def seconds(series: list[Timed]) -> list[float]:
    """Wall-clock seconds of every repetition."""
    return [one.seconds for one in series]


def all_lengths(series: list[Timed]) -> list[int]:
    """Response lengths of all repetitions."""
    return [length for one in series for length in one.work.lengths]


def agreement(ours: list[Timed], peer: list[Timed]) -> str:
    """A sentence on whether two sides sampled responses of the same mean length.

    They do if the means are less than four standard errors of their difference apart.
    """
    mine, theirs = all_lengths(ours), all_lengths(peer)
    apart = abs(statistics.mean(mine) - statistics.mean(theirs))
    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in (mine, theirs)))
    verdict = "agree" if apart <= 4 * error else "DIFFER"
    return (
        f"mean response lengths {statistics.mean(mine):.1f} and {statistics.mean(theirs):.1f} "
        f"{verdict} (longest {max(mine)} and {max(theirs)})"
    )


def say(text: str) -> None:
    """A line of progress on the terminal; results go to files and standard output."""
    print(f"    {text}", file=sys.stderr, flush=True)
