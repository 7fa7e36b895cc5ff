"""`ls`, `show` and `lineage`: what is in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from posttrain.commands.find import find_artifact
from posttrain.commands.output import age, console, emit
from posttrain.commands.run import read_evaluation
from posttrain.engine import ancestry
from posttrain.engine.ancestry import Ancestor
from posttrain.engine.record import SHORT, Artifact
from posttrain.engine.store import Store
from posttrain.report.progress import Progress
from posttrain.report.terminal import evaluation_table
from posttrain.report.wording import duration, number, size


def ls(root: Path, *, as_json: bool) -> None:
    """Print all artifacts, newest first."""
    store = Store(root)
    artifacts = store.list()[::-1]
    if as_json:
        emit({"store": str(store.root), "artifacts": [summary(a) for a in artifacts]})
        return
    out = console()
    if not artifacts:
        out.print(Text(f"no artifacts in {store.root}"), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("name", overflow="fold")
    table.add_column("kind")
    table.add_column("fingerprint", min_width=SHORT)
    table.add_column("size", justify="right")
    table.add_column("age", justify="right")
    table.add_column("metric", overflow="fold")
    for artifact in artifacts:
        table.add_row(
            Text(artifact.name),
            artifact.kind,
            Text(artifact.fingerprint[:SHORT], "dim"),
            size(artifact.bytes),
            age(artifact.created),
            Text(headline(artifact)),
        )
    out.print(table)


def summary(artifact: Artifact) -> dict[str, Any]:
    """One artifact as `ls --json` lists it."""
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "fingerprint": artifact.fingerprint,
        "path": str(artifact.path),
        "bytes": artifact.bytes,
        "created": artifact.created,
        "metrics": dict(artifact.metrics),
    }


def headline(artifact: Artifact) -> str:
    """The metric that matters for the kind of an artifact, or else the first that it has."""
    metrics = artifact.metrics
    found = Progress(name=artifact.name, kind=artifact.kind, metrics=metrics).headline
    if found or not metrics:
        return found
    name, value = next(iter(metrics.items()))
    return f"{name} {number(value)}"


def show(root: Path, name: str, *, as_json: bool) -> None:
    """Print the record of an artifact; of an evaluation its table as well."""
    store = Store(root)
    artifact = find_artifact(store, name)
    if as_json:
        emit({"path": str(artifact.path), **artifact.record})
        return
    out = console()
    out.print(
        Text.assemble(
            (artifact.name, "bold"),
            f"  {artifact.kind}, stage version ",
            str(artifact.record["version"]),
        )
    )
    out.print(Text(artifact.fingerprint, "dim"))
    out.print(Text(str(artifact.path), "dim"), soft_wrap=True)
    facts = artifact.provenance
    inputs = {
        edge: f"{s['name']}-{s['fingerprint'][:SHORT]}" for edge, s in artifact.inputs.items()
    }
    files = {file: size(entry["bytes"]) for file, entry in artifact.files.items()}
    sections: dict[str, Mapping[str, Any]] = {
        "inputs": inputs,
        "data": artifact.payload["data"],
        "settings": artifact.config,
        "metrics": {key: number(value) for key, value in artifact.metrics.items()},
        "files": files,
        "provenance": {key: _fact(key, value) for key, value in facts.items()},
        "history": {r["name"]: f"{r['kind']}, {r['created'][:16]}" for r in artifact.history},
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("section", style="bold")
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold")
    for section, rows in sections.items():
        for row, (key, value) in enumerate(rows.items()):
            table.add_row("" if row else section, Text(key, "dim"), Text(_text(value)))
    out.print(table)
    evaluation = read_evaluation(artifact)
    if evaluation is not None:
        out.print(evaluation_table(evaluation))


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
    return _text(value)


def lineage(root: Path, name: str, *, as_json: bool) -> None:
    """Print what an artifact descends from, as a tree that grows towards the beginnings."""
    store = Store(root)
    artifact = find_artifact(store, name)
    ancestors = ancestry.lineage(store, artifact)
    if as_json:
        emit({"target": artifact.label, **_network(ancestors)})
        return
    known = {ancestor.label: ancestor for ancestor in ancestors}
    tree = Tree(_node(known[artifact.label], ""), guide_style="dim")
    _grow(tree, known[artifact.label], known, {artifact.label})
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
        text.append(f"  {headline(ancestor.artifact)}")
    return text
