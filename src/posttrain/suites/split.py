"""Which split a problem belongs to. Its text alone decides, so two splits can never share one,
whatever the seed, the order of the rows or the domain. For a procedural domain the text is the
format's `key`, which is the same for prompts that ask the same thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from posttrain.engine.errors import ConfigError
from posttrain.suites.tables import Row

SPLITS = ("train", "validation", "heldout")

HELDOUT_PERCENT = 15
VALIDATION_PERCENT = 10


def prompt_digest(prompt: str) -> str:
    """sha256 of the problem text, 64 hex digits."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()


def split_of(prompt: str) -> str:
    """train (75 %), validation (10 %) or heldout (15 %), by the hash of the problem text."""
    bucket = int(prompt_digest(prompt)[:8], 16) % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "validation" if bucket < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"


def place_rows(tables: Mapping[str, Iterable[Row]]) -> Iterator[tuple[str, Row]]:
    """Puts the rows of a user's tables into splits: yields (split, row).

    `tables` maps a split to its rows. A row of `train` goes where `split_of` puts it, unless that
    split has a table of its own; then it stays in train. A problem that occurs twice in
    one table counts once (the first row is kept, the split of the others is "duplicate").

    Raises:
        ConfigError: a problem stands in two tables, or an id occurs twice.
    """
    seen: dict[str, tuple[str, str]] = {}
    ids: dict[str, str] = {}
    for label in ("heldout", "validation", "train"):
        for row in tables.get(label, ()):
            key = prompt_digest(row.prompt)
            other, place = seen.setdefault(key, (label, row.place))
            if other != label:
                raise ConfigError(
                    f"{row.place}: this problem also stands in the {other} table ({place}); no "
                    "stage may train on a problem that it is judged by, so remove one of them: "
                    f"{row.prompt[:80]!r}"
                )
            if place != row.place:
                yield "duplicate", row
                continue
            if row.id is not None and ids.setdefault(row.id, row.place) != row.place:
                raise ConfigError(
                    f"{row.place}: the id {row.id!r} already stands at {ids[row.id]}; ids have to "
                    "be unique in a domain, or leave the id column out"
                )
            split = split_of(row.prompt) if label == "train" else label
            yield (label if split in tables else split), row


def require_all_splits(counts: Mapping[str, int], where: str) -> None:
    """Raises ConfigError where a split got no row."""
    for split in SPLITS:
        if not counts.get(split):
            total = sum(counts.get(name, 0) for name in SPLITS)
            raise ConfigError(
                f"{where}: the {split} split got none of the {total} distinct problems (by hash, "
                "15 % of the problems of train are held out and 10 % validate); give "
                f'{split} = "..." a file of its own or add rows'
            )
