"""A table of prompts and responses to imitate that is no domain: no verifier, no splits, every row
is learned. Makes data.jsonl, for `sft`, `r.mix`, `r.dedup` and auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.suites.cells import shown
from posttrain.suites.messages import conversations_in, looks_like_messages
from posttrain.suites.own_data import (
    Config,
    Row,
    TableKind,
    asked_for,
    cell,
    check_texts,
    read_json,
    response,
)


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
    """The system message of every prompt that has none of its own."""
    system_column: str | None = None
    """Column of each row's own; an empty cell means none."""

    def __post_init__(self) -> None:
        check_texts(self, f"table of {self.data}")
        for column in ("prompt", "demo"):
            if self.messages is not None and getattr(self, column) is not None:
                raise ConfigError(
                    f"table of {self.data}: messages holds whole conversations, so that {column} "
                    "is not read; name one of them"
                )


def _rows(config: Config, record: Mapping[str, Any]) -> list[Row]:
    """The one row of data.jsonl that a row of the table makes."""
    if "messages" in config:
        column = config["messages"]
        value = cell(record, "messages", column)
        form = 'a list of {"role": ..., "content": ...}'
        value = read_json(value, f"column {column!r}", hint=form)
        if not looks_like_messages(value):
            raise ConfigError(f"column {column!r} holds {shown(value)}; it has to be {form}")
        before, demo = response(value, f"column {column!r}")
        if not before:
            raise ConfigError(
                f"column {column!r} has no message before the response; a conversation begins with "
                "what it answers"
            )
        place = f"column {column!r}: what stands before the response"
        return [asked_for(config, record, before, place) | {"demo": demo}]
    column = config.get("prompt", "prompt")
    talks = conversations_in(record) if column not in record else None
    if talks is not None:
        raise ConfigError(
            f"column {column!r} is missing, and {talks!r} holds conversations; write messages = "
            f'"{talks}"'
        )
    row = asked_for(config, record, cell(record, "prompt", column), f"column {column!r}")
    column = config.get("demo", "demo")
    before, demo = response(cell(record, "demo", column), f"column {column!r}")
    if before:
        raise ConfigError(
            f"column {column!r} holds a whole conversation; name it with messages = {column!r}, "
            "and leave prompt and demo out"
        )
    return [row | {"demo": demo}]


TABLE = TableKind(
    name="table",
    plural="tables",
    source=DataTable,
    example="chat.jsonl",
    file="data.jsonl",
    rows=_rows,
)
