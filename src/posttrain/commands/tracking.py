"""What a run tells trackers about itself: its name, its settings, its stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.engine.fingerprint import digest, plain
from posttrain.engine.graph import Graph
from posttrain.engine.record import SHORT
from posttrain.engine.store import Store
from posttrain.trackers.base import About, Stage, TrackerKind, directory_of
from posttrain.trackers.sink import Sinks

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded


def sinks_of(loaded: Loaded, store: Store, trackers: Sequence[TrackerKind]) -> Sinks:
    """The trackers of a run, to be entered with `with`."""
    return Sinks(trackers, about(loaded, store) if trackers else None)


def about(loaded: Loaded, store: Store) -> About:
    """What trackers are told at first."""
    graph = loaded.graph
    prints = graph.fingerprints()
    project = re.sub(r"[^\w.-]+", "-", loaded.name)
    stages = {
        name: {
            "kind": graph.nodes[name].kind,
            "fingerprint": prints[name],
            "settings": plain(graph.nodes[name].config),
        }
        for name in graph.order()
    }
    config = {"recipe": loaded.name, "suite": loaded.suite, "seed": loaded.seed, "stages": stages}
    return About(
        project=project,
        name=f"{project}-{identity(graph)}",
        config=config,
        directory=str(directory_of(store.root)),
        stages=[_stage(graph, name, prints) for name in stages],
    )


def identity(graph: Graph) -> str:
    """The same for the same targets, whatever has been made of them: the start of a fingerprint."""
    prints = graph.fingerprints()
    targets = [prints[name] for name in graph.targets]
    return (targets[0] if len(targets) == 1 else digest(targets))[:SHORT]


def _stage(graph: Graph, name: str, prints: dict[str, str]) -> Stage:
    node = graph.nodes[name]
    return Stage(
        name=name,
        kind=node.kind,
        version=node.version,
        fingerprint=prints[name],
        inputs={edge: f"{of}-{prints[of][:SHORT]}" for edge, of in node.inputs.items()},
    )
