"""Data of a user's own that is no domain: `r.preferences` and `r.table`.

A source is a name in the suite, whose columns stand there, or a place, whose columns the recipe
names. Relative places are relative to the current directory, as those of models are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.graph import Node
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage
from posttrain.stages.kinds import KINDS
from posttrain.suites.data_table import TABLE
from posttrain.suites.domain import domain_name
from posttrain.suites.own_data import TableKind
from posttrain.suites.preferences import PREFERENCES


def taken_in_data(
    build: Builder, kind: TableKind, source: object, name: str | None, columns: Mapping[str, Any]
) -> Stage:
    """The stage that takes a table in; the same table under the same name is one stage.

    Raises ConfigError for a name that the suite does not have, and for whatever is wrong in the
    table.
    """
    where = f"r.{kind.name}({str(source)!r})"
    if not isinstance(source, str | Path) or not str(source):
        raise ConfigError(
            f"r.{kind.name}({source!r}): it takes a name of the suite's {kind.plural}, or where a "
            f"table lies, such as {kind.example!r}"
        )
    known: Mapping[str, Any] = getattr(build.suite, kind.plural)
    if str(source) in known:
        declared, directory = known[str(source)], build.directory
        if columns:
            column = next(iter(columns))
            raise ConfigError(
                f"{where}: its columns stand in suite {build.suite.name!r}, under "
                f"[{kind.plural}.{source}]; write {column} = ... there"
            )
    else:
        declared, directory = _placed(build, kind, str(source), columns, where), Path()
    label = name or (str(source) if str(source) in known else _name_of(str(source)))
    domain_name(label, where=f"{where}: name")
    if label in build.suite.domains:
        raise ConfigError(
            f"{where}: {label!r} is a domain of suite {build.suite.name!r}, and rows are told "
            "apart by such names; give it another name="
        )
    cache = None if build.store is None else build.store.cache
    pieces = kind.node(declared, label, directory, build.hash_file, cache)
    node = Node(
        name=label,
        kind=kind.name,
        version=KINDS[kind.name].version,
        config=pieces.config,
        data=pieces.data,
        runtime=pieces.runtime,
    )
    return build.handle(label) if build.nodes.get(label) == node else build.add(node)


def _placed(
    build: Builder, kind: TableKind, source: str, columns: Mapping[str, Any], where: str
) -> Any:
    """What the recipe declares of a table somewhere."""
    if re.fullmatch(r"\w+", source) and not Path(source).exists():
        raise ConfigError(f"{where}: {_unknown(build, kind, source)}")
    choices = [field.name for field in fields(kind.source) if field.name != "data"]
    for column, value in columns.items():
        if column not in choices:
            raise ConfigError(
                f"{where}: unknown option {column!r}; {choices_text(column, [*choices, 'name'])}"
            )
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: {column} = {value!r}; it takes the name of a column")
    return kind.source(data=source, **columns)


def _unknown(build: Builder, kind: TableKind, source: str) -> str:
    """Why a word is none of the suite's names."""
    suite = build.suite
    for other in (PREFERENCES, TABLE):
        if source in getattr(suite, other.plural):
            return f"{source!r} stands among the {other.plural} of suite {suite.name!r}; write " + (
                f"r.{other.name}({source!r})"
            )
    if source in suite.domains:
        return f"{source!r} is a domain; write r.demos({source!r}) or r.prompts({source!r})"
    known = getattr(suite, kind.plural)
    return (
        f"suite {suite.name!r} has no {kind.plural} of that name; {choices_text(source, known)}; "
        f"a table somewhere else is given by its place, such as {kind.example!r}"
    )


def _name_of(place: str) -> str:
    """A name for a table: that of its file, or of its repository on the Hub."""
    if place.startswith("hub:"):
        place = re.split("[:@#]", place.removeprefix("hub:"))[0]
    stem = Path(place.partition("#")[0]).name.partition(".")[0]
    return re.sub(r"[^a-z0-9_]+", "_", stem.lower()).strip("_") or "data"
