"""`ls`, `show`, `lineage` and `diff`: what is in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from posttrain.commands import io
from posttrain.commands.io import age, console, emit, plain_table, tell_faults
from posttrain.engine import ancestry
from posttrain.engine.ancestry import Ancestor
from posttrain.engine.atomic import human_bytes
from posttrain.engine.fingerprint import ABSENT, diff_payloads
from posttrain.engine.record import SHORT, Artifact, label_of
from posttrain.engine.store import Store
from posttrain.engine.unfinished import Unfinished, find_unfinished, is_place, unfinished
from posttrain.report.gather import read_evaluation
from posttrain.report.sweep import measures, written
from posttrain.report.terminal import evaluation_table
from posttrain.report.wording import DASH, duration, headline, number
from posttrain.stages.kinds import shown_kind


def ls(store: io.StorePath = io.DEFAULT_STORE, as_json: io.Json = False) -> None:
    """List all artifacts, newest first."""
    place = Store(store)
    artifacts = [place.names.current(artifact) for artifact in place.list()[::-1]]
    if as_json:
        listed = [
            {
                "name": artifact.name,
                "kind": artifact.kind,
                "fingerprint": artifact.fingerprint,
                "path": str(artifact.path),
                "bytes": artifact.bytes,
                "created": artifact.created,
                "metrics": artifact.metrics,
            }
            for artifact in artifacts
        ]
        stopped = [
            {"name": one.name, "kind": one.kind, "fingerprint": one.fingerprint, "step": one.step}
            for one in unfinished(place)
        ]
        found = {"store": str(place.root), "artifacts": listed, "unfinished": stopped}
        emit(found | {"damaged": list(place.faults())})
        return
    out = console()
    tell_faults(out, place)
    left = unfinished(place)
    for one in left:
        if one.step is not None:
            where = f"{one.name}@step-{one.step}"
            said = f"unfinished: {one.name} ({one.kind}), {where}"
            out.print(Text(said, "yellow"), soft_wrap=True)
    # Each try with other settings leaves one, and there is nothing in them to go on from.
    without = dict.fromkeys(one.name for one in left if one.step is None)
    if without:
        said = f"unfinished, no step checkpoint: {', '.join(without)}"
        out.print(Text(said, "dim"), soft_wrap=True)
    if not artifacts:
        out.print(Text(f"no artifacts in {place.root}"), soft_wrap=True)
        return
    table = plain_table("name", "kind", "fingerprint", "size", "age", "metric")
    table.columns[2].min_width = SHORT
    table.columns[3].justify = table.columns[4].justify = "right"
    for artifact in artifacts:
        table.add_row(
            Text(artifact.name),
            artifact.kind,
            Text(artifact.fingerprint[:SHORT], "dim"),
            human_bytes(artifact.bytes),
            age(artifact.created),
            Text(key_metric(artifact)),
        )
    out.print(table)


def key_metric(artifact: Artifact) -> str:
    """The number that says most about an artifact, or else the first that it has."""
    kind = shown_kind(artifact.kind)
    found = headline(kind, artifact.metrics)
    if not found and "scores" in kind.makes:
        name, (value, unit) = next(iter(measures(artifact).items()), ("", (0.0, "number")))
        share = " %" if unit == "percent" else ""
        return f"{name} {written(value, unit)}{share}" if name else ""
    first = next((f"{name} {number(value)}" for name, value in artifact.metrics.items()), "")
    return found or first


def show(
    artifact: io.ArtifactName,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Show the record of an artifact: inputs, settings, metrics, files, provenance."""
    place = Store(store)
    if is_place(artifact):
        _show_unfinished(find_unfinished(place, artifact), as_json=as_json)
        return
    recorded = place.resolve(artifact)
    names = place.names.all_of(recorded.fingerprint, recorded.name)
    if as_json:
        emit({"path": str(recorded.path), "names": names, **recorded.record})
        return
    found = place.names.current(recorded)
    out = console()
    version = found.record["version"]
    out.print(Text.assemble((found.name, "bold"), f"  {found.kind}, stage version {version}"))
    if names[:-1]:
        out.print(Text(f"called {', '.join(names[:-1])} before", "dim"))
    out.print(Text(found.fingerprint, "dim"))
    out.print(Text(str(found.path), "dim"), soft_wrap=True)
    sections: dict[str, Mapping[str, Any]] = {
        "inputs": {edge: label_of(source) for edge, source in found.inputs.items()},
        "data": found.payload["data"],
        "settings": found.config,
        "metrics": {key: number(value) for key, value in found.metrics.items()},
        "warnings": {str(place): text for place, text in enumerate(found.warnings, start=1)},
        "files": {file: human_bytes(entry["bytes"]) for file, entry in found.files.items()},
        "provenance": {key: _fact(key, value) for key, value in found.provenance.items()},
        "history": {r["name"]: f"{r['kind']}, {r['created'][:16]}" for r in found.history},
    }
    out.print(_sections(sections))
    evaluation = read_evaluation(found)
    if evaluation is not None:
        of_edges = {edge: source["name"] for edge, source in found.inputs.items()}
        out.print(evaluation_table(evaluation, of_edges))


def _show_unfinished(found: Unfinished, *, as_json: bool) -> None:
    """A stage that was stopped or failed, and its newest step checkpoint."""
    state = found.checkpoint()
    if as_json:
        told = {"path": str(found.path), "step": found.step, "tokens": state.get("tokens")}
        told |= {"metrics": state.get("metrics", {}), "warnings": found.warnings}
        emit({**found.stage, **told})
        return
    out = console()
    out.print(Text.assemble((found.name, "bold"), f"  {found.kind}, unfinished, step {found.step}"))
    out.print(Text(found.fingerprint, "dim"))
    out.print(Text(str(found.path), "dim"), soft_wrap=True)
    metrics = {key: number(value) for key, value in state.get("metrics", {}).items()}
    inputs = {edge: Path(path).name for edge, path in found.stage["inputs"].items()}
    sections: dict[str, Mapping[str, Any]] = {
        "inputs": inputs,
        "settings": found.stage["config"],
        f"step {found.step}": metrics | {"tokens": number(state.get("tokens"))},
        "warnings": {str(place): text for place, text in enumerate(found.warnings, start=1)},
    }
    out.print(_sections(sections))


def _sections(sections: Mapping[str, Mapping[str, Any]]) -> Table:
    table = plain_table("section", "key", "value", show_header=False)
    table.columns[0].style = "bold"
    for section, rows in sections.items():
        for row, (key, value) in enumerate(rows.items()):
            table.add_row("" if row else section, Text(key, "dim"), Text(_text(value)))
    return table


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fact(key: str, value: Any) -> str:
    """One fact of the provenance on a line."""
    if key == "git":
        return "; ".join(
            f"{g['root']} at {(g['commit'] or 'no commit')[:SHORT]}"
            + (" with changes (code.diff)" if g["dirty"] else "")
            for g in value
        )
    if key == "packages":
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if key == "argv":
        return " ".join(value)
    if key == "seconds":
        return duration(value)
    if key.startswith("peak_memory"):
        return human_bytes(value)
    if key == "tokens":
        return number(value)
    if key == "origin":
        return ", ".join(f"{name} {text}" for name, text in value.items())
    if key == "texts":
        return "; ".join(
            f"{name} {text['path']}"
            + (" (too long to keep)" if text["text"] is None else " (its text: --json)")
            for name, text in value.items()
        )
    return _text(value)


def lineage(
    artifact: io.ArtifactName,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Show what an artifact descends from."""
    place = Store(store)
    ancestors = ancestry.renamed(place, ancestry.lineage(place, place.resolve(artifact)))
    last = ancestors[-1]
    if as_json:
        emit({"target": last.label, **_network(ancestors)})
        return
    # The tree grows towards the beginnings.
    tree = Tree(_node(last, ""), guide_style="dim")
    _grow(tree, last, {ancestor.label: ancestor for ancestor in ancestors}, {last.label})
    console().print(tree)


def _network(ancestors: Sequence[Ancestor]) -> dict[str, Any]:
    nodes = [
        {
            "label": ancestor.label,
            "name": ancestor.record["name"],
            "kind": ancestor.record["kind"],
            "fingerprint": ancestor.record["fingerprint"],
            "created": ancestor.record["created"],
            "in_store": ancestor.artifact is not None,
            "missing": list(ancestor.missing),
        }
        for ancestor in ancestors
    ]
    edges = [
        {"from": source, "to": ancestor.label, "edge": edge}
        for ancestor in ancestors
        for edge, source in ancestor.edges.items()
    ]
    return {"nodes": nodes, "edges": edges}


def _grow(tree: Tree, child: Ancestor, known: Mapping[str, Ancestor], drawn: set[str]) -> None:
    """Add the parents of `child`; one that is drawn already is only named."""
    parents: dict[str, list[str]] = {}
    for edge, label in child.edges.items():
        parents.setdefault(label, []).append(edge)
    for label, edges in parents.items():
        ancestor = known.get(label)
        joined = ", ".join(edges)
        if ancestor is None:
            tree.add(Text.assemble((f"{joined}: ", "dim"), label, (" missing", "bold red")))
            continue
        again = label in drawn
        drawn.add(label)
        branch = tree.add(_node(ancestor, joined, again=again))
        if not again:
            _grow(branch, ancestor, known, drawn)


def _node(ancestor: Ancestor, edge: str, *, again: bool = False) -> Text:
    record = ancestor.record
    text = Text.assemble(
        (f"{edge}: " if edge else "", "dim"),
        (record["name"], "dim" if again else "bold"),
        (f"  {record['kind']}  {record['fingerprint'][:SHORT]}", "dim"),
    )
    if again:
        text.append("  (above)", "dim")
    elif ancestor.artifact is None:
        text.append("  record only, its files are elsewhere", "yellow")
    else:
        text.append(f"  {key_metric(ancestor.artifact)}")
    return text


def diff(
    a: io.ArtifactName,
    b: io.ArtifactName,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Show in which settings, data and ancestors two artifacts differ, and their metrics."""
    place = Store(store)
    old, new = (place.names.current(place.resolve(text)) for text in (a, b))
    found = differences(place, old, new)
    keys = dict.fromkeys([*old.metrics, *new.metrics])
    metrics = {key: {"a": old.metrics.get(key), "b": new.metrics.get(key)} for key in keys}
    if as_json:
        emit({"a": old.label, "b": new.label, "differences": found, "metrics": metrics})
        return
    out = console()
    table = plain_table("", old.label, new.label)
    for pair in found:
        if pair["path"]:
            table.add_row(
                Text(pair["path"], "bold"), Text(pair["a"], "dim"), Text(pair["b"], "dim")
            )
        for row in pair["fields"]:
            name = ("  " if pair["path"] else "") + row["field"].removeprefix("config.")
            table.add_row(Text(name), Text(side(row["a"])), Text(side(row["b"])))
    out.print(table if found else "the same settings, data and ancestors")
    table = plain_table("", old.label, new.label)
    for key, values in metrics.items():
        table.add_row(Text(key), number(values["a"]), number(values["b"]))
    if metrics:
        out.print(Text("\nmetrics", "bold"))
        out.print(table)


def side(value: Any) -> str:
    """A side of a difference for people: a fingerprint by its start, a dash for nothing."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:SHORT]
    return DASH if value is None else str(value)


def differences(store: Store, a: Artifact, b: Artifact) -> list[dict[str, Any]]:
    """Where two artifacts and their ancestries differ, as JSON has it: see `_compare`."""
    return list(_compare(_records(store, a), _records(store, b), a.record, b.record, "", set()))


def _records(store: Store, artifact: Artifact) -> dict[str, Mapping[str, Any]]:
    ancestors = ancestry.renamed(store, ancestry.lineage(store, artifact))
    return {a.record["fingerprint"]: a.record for a in ancestors}


def _compare(
    known_a: Mapping[str, Mapping[str, Any]],
    known_b: Mapping[str, Mapping[str, Any]],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    path: str,
    seen: set[tuple[str, str]],
) -> Iterator[dict[str, Any]]:
    """Pairs of artifacts at the same place of two ancestries that differ by themselves, as JSON has
    them: the pair itself, then its inputs by edge, each pair once.

    `path` has the edges that lead there, such as "start / start", and is "" for the first pair;
    `fields` has dotted names with both values, of the inputs only where one side lacks an edge.
    """
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
        {"field": field, "a": None if x == ABSENT else x, "b": None if y == ABSENT else y}
        for field, x, y in diff_payloads(
            a["payload"], b["payload"], old_config=a["config"], new_config=b["config"]
        )
        if field not in followed
    ]
    if fields:
        yield {"path": path, "a": label_of(a), "b": label_of(b), "fields": fields}
    for edge in deeper:
        yield from _compare(
            known_a,
            known_b,
            known_a[ours[edge]["fingerprint"]],
            known_b[theirs[edge]["fingerprint"]],
            f"{path} / {edge}" if path else edge,
            seen,
        )
