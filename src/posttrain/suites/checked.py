"""The tables of a domain, read through: what there is to tell of their rows, remembered by content.

    facts = {split: problems, rows, duplicates, further_demos, no_demo, contradicting, left_out,
             longest, median}

`longest` and `median` are characters of a row, the demonstration included. Beside these stands how
many conversations of which shape there are (`messages.shape_of`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import remembered, write_whole
from posttrain.engine.fingerprint import digest
from posttrain.rewards.spec import UNVERIFIED
from posttrain.suites.location import Location, parse_location
from posttrain.suites.messages import shape_facts
from posttrain.suites.split import Placement, require_all_splits
from posttrain.suites.tables import Columns, Row, columns_of, read_rows

ROWS = 2
"""How rows are read and placed; raised when that changes, it makes other domains of tables."""
ORDER = ("heldout", "validation", "train")
"""In which tables are read: those that nobody trains on first."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of one domain."""

    domain: str
    source: Mapping[str, Any]
    """Their identity, as it stands in the domain's config."""
    verifier: str
    """The name of the domain's verifier."""
    places: Mapping[str, Location]
    """Split to where its table lies."""

    @property
    def where(self) -> str:
        """What begins every message."""
        return f"domain {self.domain}"

    @property
    def columns(self) -> Columns:
        """Which of their columns mean what."""
        return columns_of(self.source, self.verifier)

    @property
    def without(self) -> list[str]:
        """The splits that there are not to be."""
        return list(self.source.get("without", ()))

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Every row with the split of its table. Raises ConfigError as `read_rows` does."""
        for split in ORDER:
            if split in self.places:
                where = f"{self.where}: {split}"
                for row in read_rows(self.places[split], self.columns, where=where):
                    yield split, row

    def placed(self, *, keep: bool) -> Placement:
        """All rows in their splits; without `keep` counted only.

        Raises ConfigError for rows that cannot be used, and for a split without a problem.
        """
        placement = self._placement(keep)
        for split, row in self.rows():
            placement.take(split, row)
        require_all_splits(placement.facts(), self.where, without=self.without)
        return placement

    def new_rows(self) -> Iterator[Row]:
        """The rows that are no repeats of earlier ones. Raises ConfigError as `placed` does."""
        placement = self._placement(keep=False)
        return (row for split, row in self.rows() if placement.take(split, row))

    def _placement(self, keep: bool) -> Placement:
        return Placement(
            self.domain,
            tables=self.places,
            without=self.without,
            judged=self.verifier != UNVERIFIED,
            keep=keep,
        )


def tables_of(config: Mapping[str, Any], files: Mapping[str, str]) -> Tables:
    """The tables of a domain by its config and where they lie. Raises ConfigError for one that is
    gone."""
    places = {
        split: parse_location(text, Path(), where=f"domain {config['domain']}: {split}")
        for split, text in files.items()
    }
    return Tables(
        domain=config["domain"],
        source=config["source"],
        verifier=config["verifier"]["name"],
        places=places,
    )


def checked_facts(
    tables: Tables, data: Mapping[str, str], cache: Path | None = None
) -> dict[str, int]:
    """Reads all tables, and says what there is to tell of them; {} where one lies on the Hub, whose
    tables are read when the domain is built.

    `data` has the sha256 of each. Tables that were found good before are not read again where the
    directory `cache` remembers them.
    """
    if len(data) < len(tables.places):
        for split, place in tables.places.items():
            if place.path is not None:
                for _ in read_rows(place, tables.columns, where=f"{tables.where}: {split}"):
                    pass
        return {}
    name = memory_of(tables.source, tables.verifier, data)
    known = recall(cache, name)
    if known is None:
        placement = tables.placed(keep=False)
        known = placement.facts() | shape_facts(placement.shapes)
        remember(cache, name, known)
    return known


def memory_of(source: Mapping[str, Any], verifier: str, data: Mapping[str, str]) -> str:
    """The name under which the facts of these tables are remembered."""
    tables = {split: data[split] for split in source["tables"] if split in data}
    return f"rows-{digest({'source': source, 'verifier': verifier, 'data': tables})[:32]}"


def remember_built(
    cache: Path, config: Mapping[str, Any], data: Mapping[str, str], facts: Any
) -> None:
    """Keeps the facts of a domain that was built: the plan before may have had no store yet."""
    if facts and config["source"]["kind"] == "table":
        remember(cache, memory_of(config["source"], config["verifier"]["name"], data), facts)


def recall(cache: Path | None, name: str) -> dict[str, int] | None:
    """What is remembered under a name; None where nothing is, or where it is damaged."""
    if cache is None:
        return None
    found = remembered(cache / f"{name}.json")
    whole = isinstance(found, dict) and all(isinstance(value, int) for value in found.values())
    return found if whole else None


def remember(cache: Path | None, name: str, facts: Mapping[str, int]) -> None:
    """Keeps facts under a name, where the store is there and can be written: they can be had
    again."""
    if cache is None or not cache.parent.is_dir():
        return
    try:
        cache.mkdir(exist_ok=True)
        write_whole(cache / f"{name}.json", json.dumps(facts).encode("ascii"))
    except OSError:
        return
