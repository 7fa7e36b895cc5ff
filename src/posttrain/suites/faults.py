"""What is wrong with the rows of one table, all found before any of it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from posttrain.engine.errors import ConfigError

SHOWN = 5
"""Bad rows that a message names; it says how many there are in all."""


class Faults:
    """The bad rows of a table: the first of them in words, and how many there are."""

    def __init__(self, start: str) -> None:
        """`start` begins every message: who reads which table."""
        self.start = start
        self.count = 0
        self._first: list[str] = []

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Takes a ConfigError inside as a fault of the row at `place`, such as "line 3"."""
        try:
            yield
        except ConfigError as error:
            self._add(f"{place}: {error}")
        except RecursionError:
            self._add(f"{place}: values of too many levels inside each other")

    def _add(self, fault: str) -> None:
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append(fault)

    def check(self) -> None:
        """Raises ConfigError where there was a fault."""
        if self.count == 1:
            raise ConfigError(f"{self.start}, {self._first[0]}")
        if self.count:
            shown = "".join(f"\n  {fault}" for fault in self._first)
            first = f"; the first {SHOWN}" if self.count > SHOWN else ""
            raise ConfigError(f"{self.start}: {self.count} rows cannot be used{first}:{shown}")
