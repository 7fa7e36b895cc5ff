"""A table of prompts and responses to imitate that is no domain: no verifier, no splits, every row
is learned. Makes data.jsonl, for `sft`, `r.mix`, `r.dedup` and auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.hashes import HashFile
from posttrain.rewards.spec import NodeParts
from posttrain.suites.own_data import (
    Counts,
    Made,
    Row,
    asked_for,
    build_table,
    cell,
    lengths,
    named_row,
    read_all,
    response,
    table_node,
)
from posttrain.suites.tables import Location


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table of a user's own that is no domain."""

    data: str
    """Where it lies: as a table of a domain."""
    prompt: str | None = None
    demo: str | None = None
    """Columns of the prompt, a text or a list of messages, and of the response to learn; `prompt`
    and `demo` if not given."""
    messages: str | None = None
    """Column of whole conversations, in place of both: their last message is the response."""
    system: str | None = None
    """A system message before every prompt that has none."""

    def __post_init__(self) -> None:
        for column in ("prompt", "demo"):
            if self.messages is not None and getattr(self, column) is not None:
                raise ConfigError(
                    f"table {self.data}: messages holds whole conversations, so that {column} is "
                    "not read; name one of them"
                )


def table_parts(
    source: DataTable, name: str, base_dir: Path, hash_file: HashFile = file_digest
) -> NodeParts:
    """The parts of the graph node of kind "table"; every row of a local table is checked."""
    where = f"table {name}"
    return table_node(source, name, base_dir, where=where, make=_make, hash_file=hash_file)


def build_data_table(
    config: Mapping[str, Any], runtime: Mapping[str, Any], out: Path, data: Mapping[str, str]
) -> Counts:
    """Write data.jsonl into `out`; the others are the parts of `table_parts`.

    Returns rows, read (rows of the table), duplicates (rows that repeat others), prompts, and
    characters of the responses.
    """
    where = f"table {config['name']}"
    return build_table("data.jsonl", config, runtime, out, data, where=where, make=_make)


def _make(config: Mapping[str, Any], location: Location, *, where: str) -> Made:
    rows, num_read, duplicates = read_all(
        location, lambda record, place: [_row(config, record, place)], where=where
    )
    counts: Counts = {"rows": len(rows), "read": num_read, "duplicates": duplicates}
    counts["prompts"] = len({row["id"] for row in rows})
    return rows, counts | lengths(row["demo"] for row in rows)


def _row(config: Mapping[str, Any], record: Mapping[str, Any], place: str) -> Row:
    system = config.get("system")
    if "messages" in config:
        column = config["messages"]
        at = f"{place}: column {column!r}"
        before, demo = response(cell(record, "messages", column, place), at)
        if not before:
            raise ConfigError(
                f"{at} has no message before the response; a conversation begins with what it "
                "answers"
            )
        asked = asked_for(before, system, f"{at}: what stands before the response")
        return named_row(config["name"], asked) | {"demo": demo}
    column = config.get("prompt", "prompt")
    prompt = cell(record, "prompt", column, place)
    asked = asked_for(prompt, system, f"{place}: column {column!r}")
    column = config.get("demo", "demo")
    before, demo = response(cell(record, "demo", column, place), f"{place}: column {column!r}")
    if before:
        raise ConfigError(
            f"{place}: column {column!r} holds a whole conversation; name it with messages = "
            f"{column!r} and leave prompt and demo out"
        )
    return named_row(config["name"], asked) | {"demo": demo}
