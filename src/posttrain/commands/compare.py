"""`diff` and `verify`: what differs, and whether what is there is what was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from posttrain.commands.find import find_artifact
from posttrain.commands.output import console, emit
from posttrain.engine import ancestry
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import ABSENT, diff_payloads
from posttrain.engine.record import Artifact, label_of
from posttrain.engine.store import Store
from posttrain.report.wording import number


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One pair of artifacts, at the same place of two ancestries, that differ by themselves."""

    path: str
    """Edges that lead to it, such as "start / start"; "" for the two artifacts themselves."""
    a: str
    b: str
    fields: Sequence[tuple[str, Any, Any]]
    """Dotted field and its two values; inputs only where an edge is missing on one side."""


def diff(root: Path, first: str, second: str, *, as_json: bool) -> None:
    """Print in which settings, data and ancestors two artifacts differ, and their metrics."""
    store = Store(root)
    a, b = find_artifact(store, first), find_artifact(store, second)
    found = list(_compare(_records(store, a), _records(store, b), a.record, b.record, "", set()))
    keys = dict.fromkeys([*a.metrics, *b.metrics])
    metrics = {key: {"a": a.metrics.get(key), "b": b.metrics.get(key)} for key in keys}
    if as_json:
        differences = [
            {
                "path": d.path,
                "a": d.a,
                "b": d.b,
                "fields": [{"field": f, "a": _plain(x), "b": _plain(y)} for f, x, y in d.fields],
            }
            for d in found
        ]
        emit({"a": a.label, "b": b.label, "differences": differences, "metrics": metrics})
        return
    out = console()
    table = _table(a, b)
    for item in found:
        if item.path:
            table.add_row(Text(item.path, "bold"), Text(item.a, "dim"), Text(item.b, "dim"))
        for field, x, y in item.fields:
            indent = "  " if item.path else ""
            name = field.removeprefix("config.")
            table.add_row(Text(indent + name), Text(str(_plain(x))), Text(str(_plain(y))))
    if found:
        out.print(table)
    else:
        out.print("the same settings, data and ancestors")
    table = _table(a, b)
    for key, values in metrics.items():
        table.add_row(Text(key), number(values["a"]), number(values["b"]))
    if metrics:
        out.print(Text("\nmetrics", "bold"))
        out.print(table)


def _table(a: Artifact, b: Artifact) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", a.label, b.label):
        table.add_column(column, overflow="fold")
    return table


def _plain(value: Any) -> Any:
    return None if value == ABSENT else value


def _records(store: Store, artifact: Artifact) -> dict[str, Mapping[str, Any]]:
    return {a.record["fingerprint"]: a.record for a in ancestry.lineage(store, artifact)}


def _compare(
    known_a: Mapping[str, Mapping[str, Any]],
    known_b: Mapping[str, Mapping[str, Any]],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    path: str,
    seen: set[tuple[str, str]],
) -> Iterator[Difference]:
    """Differences of a pair, then of its inputs by edge: each pair once, equal ones not at all."""
    pair = (a["fingerprint"], b["fingerprint"])
    if pair in seen or pair[0] == pair[1]:
        return
    seen.add(pair)
    ours, theirs = a["inputs"], b["inputs"]
    shared = [edge for edge in ours if edge in theirs]
    deeper = [
        edge
        for edge in shared
        if ours[edge]["fingerprint"] in known_a and theirs[edge]["fingerprint"] in known_b
    ]
    followed = {f"inputs.{edge}" for edge in deeper}
    fields = [
        (field, x, y)
        for field, x, y in diff_payloads(
            a["payload"], b["payload"], old_config=a["config"], new_config=b["config"]
        )
        if field not in followed
    ]
    if fields:
        labels = [label_of(record) for record in (a, b)]
        yield Difference(path=path, a=labels[0], b=labels[1], fields=fields)
    for edge in deeper:
        yield from _compare(
            known_a,
            known_b,
            known_a[ours[edge]["fingerprint"]],
            known_b[theirs[edge]["fingerprint"]],
            f"{path} / {edge}" if path else edge,
            seen,
        )


def verify(root: Path, names: Sequence[str], *, as_json: bool) -> bool:
    """Print every problem of the named artifacts and their ancestors, of all if none is named.

    Returns whether there is none.
    """
    store = Store(root)
    problems: list[str] = []
    artifacts, starts = _chosen(store, names, problems)
    for artifact in starts:
        problems += [p for p in ancestry.verify(store, artifact) if p not in problems]
    records: dict[str, Mapping[str, Any]] = {}
    for artifact in artifacts:
        records |= {record["fingerprint"]: record for record in artifact.history}
        records[artifact.fingerprint] = artifact.record
    counts = {
        "artifacts": len(artifacts),
        "files": sum(len(artifact.files) for artifact in artifacts),
        "records": len(records),
    }
    if as_json:
        emit({"ok": not problems, "problems": problems, **counts})
        return not problems
    out = console()
    for problem in problems:
        out.print(Text.assemble(("✗ ", "bold red"), problem), soft_wrap=True)
    state = ("ok", "bold green") if not problems else (f"{len(problems)} problems", "bold red")
    checked = f"{counts['files']} files and {counts['records']} records"
    out.print(Text.assemble(state, f": {checked} of {len(artifacts)} artifacts checked"))
    return not problems


def _chosen(
    store: Store, names: Sequence[str], problems: list[str]
) -> tuple[list[Artifact], list[Artifact]]:
    """All artifacts to check, and those among them whose ancestries cover them all."""
    if names:
        starts = [find_artifact(store, name) for name in names]
        found: dict[str, Artifact] = {}
        for start in starts:
            try:
                ancestors = ancestry.lineage(store, start)
            except StoreError:
                # `Store.verify` tells about the damaged record.
                found[start.fingerprint] = start
                continue
            found |= {a.artifact.fingerprint: a.artifact for a in ancestors if a.artifact}
        return list(found.values()), starts
    artifacts = []
    for path in store.index().values():
        try:
            artifacts.append(store.load(path))
        except StoreError as error:
            problems.append(str(error))
    used = {source["fingerprint"] for a in artifacts for source in a.inputs.values()}
    return artifacts, [a for a in artifacts if a.fingerprint not in used]
