"""What a run would do, stage by stage, and why. Lists directories and reads records; runs nothing,
and hashes nothing but what links of artifacts lead to (`links.py`)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from posttrain.engine.fingerprint import ABSENT, diff_payloads
from posttrain.engine.graph import Graph
from posttrain.engine.links import astray, found_again, lost_text
from posttrain.engine.record import SHORT, Artifact
from posttrain.engine.store import Store
from posttrain.engine.work import read_step, read_wait

Action: TypeAlias = Literal["cached", "run", "blocked", "needs input"]

_SHOWN: Final = 3
"""Differences named in a reason; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What happens to one stage. One that needs input, a file to be filled in, is tried again by a
    run: the file may be filled in by then."""

    name: str
    kind: str
    fingerprint: str
    action: Action
    reason: str
    """Why it runs, needs input or is blocked: "new", "resumes at step 120", "steps: 80 -> 120";
    empty when cached."""
    artifact: Artifact | None
    """The artifact of a cached stage, else None."""
    moved: Mapping[str, Path] = field(default_factory=dict)
    """Files of that artifact which are links and lead to other bytes now, or nowhere: where the
    bytes of its record are. A run points the links there."""
    lost: str = ""
    """Why the artifact is not whole: links whose bytes are nowhere. Nothing can be made from it."""


def plan(graph: Graph, store: Store) -> list[PlanRow]:
    """One row per stage of `graph.order()`.

    Raises GraphError or ConfigError for a graph that cannot run, StoreError for a damaged record.
    """
    fingerprints = graph.fingerprints()
    index = store.index()
    rows: dict[str, PlanRow] = {}
    first: dict[str, str] = {}
    for name in graph.order():
        fingerprint = fingerprints[name]
        path = index.get(fingerprint[:SHORT])
        artifact = None if path is None else store.load(path, fingerprint)
        action: Action = "cached"
        reason = ""
        moved: dict[str, Path] = {}
        lost = ""
        if artifact is None:
            action, reason = _decide(graph, store, name, fingerprint, rows, first)
        else:
            moved, lost = _links(graph, store, name, artifact)
            reason = lost or _renewed(moved)
        rows[name] = PlanRow(
            name=name,
            kind=graph.nodes[name].kind,
            fingerprint=fingerprint,
            action=action,
            reason=reason,
            artifact=artifact,
            moved=moved,
            lost=lost,
        )
        first.setdefault(fingerprint, name)
        if artifact is None and action != "blocked":
            _block_on_lost(graph, rows, name)
    return list(rows.values())


def _links(
    graph: Graph, store: Store, name: str, artifact: Artifact
) -> tuple[dict[str, Path], str]:
    """Where the files of links that lead astray are now, and what to say where one is nowhere."""
    names = astray(artifact, store.hashes)
    if not names:
        return {}, ""
    # Its own first; what was made of a link is a link to the same place.
    nodes = [graph.nodes[name], *graph.nodes.values()]
    places = [Path(n.runtime["directory"]) for n in nodes if "directory" in n.runtime]
    moved = found_again(artifact, names, places, store.hashes)
    left = [file for file in names if file not in moved]
    return moved, lost_text(artifact, left, name) if left else ""


def _renewed(moved: Mapping[str, Path]) -> str:
    if not moved:
        return ""
    place = os.path.commonpath([path.parent for path in moved.values()])
    return f"its files have moved, links renewed to {place}"


def _block_on_lost(graph: Graph, rows: dict[str, PlanRow], name: str) -> None:
    """A stage that is to run reads its inputs: one whose bytes are nowhere blocks it."""
    for edge, source in graph.nodes[name].inputs.items():
        if rows[source].lost:
            rows[source] = replace(rows[source], action="blocked", artifact=None)
            rows[name] = replace(
                rows[name], action="blocked", reason=f"input {edge} is blocked ({source})"
            )
            return


def _decide(
    graph: Graph,
    store: Store,
    name: str,
    fingerprint: str,
    rows: Mapping[str, PlanRow],
    first: Mapping[str, str],
) -> tuple[Action, str]:
    """Action and reason for a stage that is not in the store."""
    node = graph.nodes[name]
    if node.runtime.get("missing"):
        return "blocked", str(node.runtime["missing"])
    # Before what waits: with a blocked input, filling in a file would not help.
    for edge, source in node.inputs.items():
        if rows[source].action == "blocked":
            return "blocked", f"input {edge} is blocked ({source})"
    for edge, source in node.inputs.items():
        if rows[source].action == "needs input":
            return "needs input", f"for {source} (input {edge})"
    if fingerprint in first:
        return "run", f"same as {first[fingerprint]}, made once"
    waited = read_wait(store.work_path(fingerprint))
    if waited is not None:
        reason, changed = waited
        return (
            ("run", "the file that it waited for has changed")
            if changed
            else ("needs input", reason)
        )
    step = read_step(store.work_path(fingerprint))
    if step is not None:
        return "run", f"resumes at step {step}"
    earlier = store.named(node.kind, node.name)
    if not earlier:
        return "run", "new"
    found = [
        _describe(field, old, new, node.inputs, rows)
        for field, old, new in diff_payloads(
            earlier[-1].payload,
            graph.payload(name),
            old_config=earlier[-1].config,
            new_config=node.config,
        )
    ]
    shown = found[:_SHOWN] + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
    return "run", "; ".join(shown)


def _describe(
    field: str, old: Any, new: Any, inputs: Mapping[str, str], rows: Mapping[str, PlanRow]
) -> str:
    part, _, rest = field.partition(".")
    if part == "inputs":
        if new == ABSENT:
            return f"input {rest} removed"
        source = inputs[rest]
        if old == ABSENT:
            return f"input {rest} added ({source})"
        return f"input {rest} {'changed' if rows[source].artifact else 'reruns'} ({source})"
    if part == "data":
        return (
            f"data {rest} {'added' if old == ABSENT else 'removed' if new == ABSENT else 'changed'}"
        )
    label = "stage version" if part == "version" else rest or field
    return f"{label}: {_value(old)} -> {_value(new)}"


def _value(value: Any, limit: int = 40) -> str:
    text = ABSENT if value == ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
