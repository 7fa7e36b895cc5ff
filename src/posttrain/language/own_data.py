"""Data of a user's own that is no domain: `r.preferences` and `r.table`.

A source is a name in the suite, whose columns stand there, or a place, whose columns the recipe
names. Relative places are relative to the current directory, as those of models are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.graph import Node
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage
from posttrain.stages.kinds import KINDS
from posttrain.suites import data_table, preferences
from posttrain.suites.domain import domain_name
from posttrain.suites.own_data import TableKind


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What `r.preferences` and `r.table` have of their own."""

    kind: TableKind
    plural: str
    """As a suite calls its part."""
    source: type[Any]
    example: str

    @property
    def name(self) -> str:
        """As it is written, and the kind of the stage."""
        return self.kind.name


PREFERENCES = Verb(
    kind=preferences.PREFERENCES,
    plural="preferences",
    source=preferences.Preferences,
    example="pairs.jsonl",
)
TABLE = Verb(
    kind=data_table.TABLE, plural="tables", source=data_table.DataTable, example="chat.jsonl"
)


def taken_in(
    build: Builder, verb: Verb, source: object, name: str | None, columns: Mapping[str, Any]
) -> Stage:
    """The stage that takes a table in; the same table under the same name is one stage.

    Raises ConfigError for a name that the suite does not have, and for whatever is wrong in the
    table.
    """
    where = f"r.{verb.name}({str(source)!r})"
    if not isinstance(source, str | Path) or not str(source):
        raise ConfigError(
            f"r.{verb.name}({source!r}): it takes a name of the suite's {verb.plural}, or where a "
            f"table lies, such as {verb.example!r}"
        )
    known: Mapping[str, Any] = getattr(build.suite, verb.plural)
    if str(source) in known:
        declared, directory = known[str(source)], build.directory
        if columns:
            column = next(iter(columns))
            raise ConfigError(
                f"{where}: its columns stand in suite {build.suite.name!r}, under "
                f"[{verb.plural}.{source}]; write {column} = ... there"
            )
    else:
        declared, directory = _placed(build, verb, str(source), columns, where), Path()
    label = name or (str(source) if str(source) in known else _name_of(str(source)))
    domain_name(label, where=f"{where}: name")
    if label in build.suite.domains:
        raise ConfigError(
            f"{where}: {label!r} is a domain of suite {build.suite.name!r}, and rows are told "
            "apart by such names; give it another name="
        )
    cache = None if build.store is None else build.store.cache
    pieces = verb.kind.node(declared, label, directory, build.hash_file, cache)
    node = Node(
        name=label,
        kind=verb.name,
        version=KINDS[verb.name].version,
        config=pieces.config,
        data=pieces.data,
        runtime=pieces.runtime,
    )
    return build.handle(label) if build.nodes.get(label) == node else build.add(node)


def _placed(build: Builder, verb: Verb, source: str, columns: Mapping[str, Any], where: str) -> Any:
    """What the recipe declares of a table somewhere."""
    if re.fullmatch(r"\w+", source) and not Path(source).exists():
        raise ConfigError(f"{where}: {_unknown(build, verb, source)}")
    choices = [field.name for field in fields(verb.source) if field.name != "data"]
    for column, value in columns.items():
        if column not in choices:
            raise ConfigError(
                f"{where}: unknown option {column!r}; {choices_text(column, [*choices, 'name'])}"
            )
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: {column} = {value!r}; it takes the name of a column")
    return verb.source(data=source, **columns)


def _unknown(build: Builder, verb: Verb, source: str) -> str:
    """Why a word is none of the suite's names."""
    suite = build.suite
    for other in (PREFERENCES, TABLE):
        if source in getattr(suite, other.plural):
            return f"{source!r} stands among the {other.plural} of suite {suite.name!r}; write " + (
                f"r.{other.name}({source!r})"
            )
    if source in suite.domains:
        return f"{source!r} is a domain; write r.demos({source!r}) or r.prompts({source!r})"
    known = getattr(suite, verb.plural)
    return (
        f"suite {suite.name!r} has no {verb.plural} of that name; {choices_text(source, known)}; "
        f"a table somewhere else is given by its place, such as {verb.example!r}"
    )


def _name_of(place: str) -> str:
    """A name for a table: that of its file, or of its repository on the Hub."""
    if place.startswith("hub:"):
        place = re.split("[:@#]", place.removeprefix("hub:"))[0]
    stem = Path(place.partition("#")[0]).name.partition(".")[0]
    return re.sub(r"[^a-z0-9_]+", "_", stem.lower()).strip("_") or "data"
