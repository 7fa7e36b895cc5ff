"""Several graphs as one: what they share is one stage, what differs between them gets a name of its
own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from posttrain.engine.graph import Graph, Node

Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """One graph made of several, and what it calls the stages of each."""

    graph: Graph
    keys: tuple[Mapping[str, str], ...]
    """For each of the graphs: name of a stage there -> key of that stage in `graph`."""


def join(graphs: Sequence[Graph], labels: Sequence[Labels]) -> Joined:
    """One graph with the targets of all `graphs`, of which there is at least one.

    Stages of one name and one fingerprint are one stage. A name that stands for several stages
    gets what tells them apart behind it, out of the `labels` of each graph, such as
    {"rate": "0.1", "seed": "1"}: `student[rate=0.1,seed=1]`, or `base[seed=1]` where the rate makes
    no difference to `base`. All have labels of the same names, and no two the same labels. No
    fingerprint changes, nor does the name that a record keeps.

    Raises GraphError and ConfigError as `Graph.fingerprints`.
    """
    prints = [graph.fingerprints() for graph in graphs]
    names = dict.fromkeys(name for found in prints for name in found)
    telling = {name: _telling(name, prints, labels) for name in names}
    # Name and fingerprint -> key: the labels of the first graph that has the stage.
    known: dict[tuple[str, str], str] = {}
    nodes: dict[str, Node] = {}
    keys: list[Mapping[str, str]] = []
    for graph, found, label in zip(graphs, prints, labels, strict=True):
        mine: dict[str, str] = {}
        for name in graph.order():
            behind = ",".join(f"{key}={label[key]}" for key in telling[name])
            key = f"{name}[{behind}]" if behind else name
            mine[name] = known.setdefault((name, found[name]), key)
            node = graph.nodes[name]
            inputs = {edge: mine[source] for edge, source in node.inputs.items()}
            nodes.setdefault(mine[name], replace(node, inputs=inputs))
        keys.append(mine)
    targets = [
        mine[target] for graph, mine in zip(graphs, keys, strict=True) for target in graph.targets
    ]
    return Joined(
        graph=Graph(nodes=nodes, target=targets[0], also=tuple(targets[1:])), keys=tuple(keys)
    )


def _telling(
    name: str, prints: Sequence[Mapping[str, str]], labels: Sequence[Labels]
) -> tuple[str, ...]:
    """The labels that a stage's fingerprint depends on: all but those that can be left out."""
    having = [(labels[place], found[name]) for place, found in enumerate(prints) if name in found]
    kept = list(labels[0])
    for key in labels[0]:
        rest = [other for other in kept if other != key]
        pairs = {(tuple(label[one] for one in rest), print_) for label, print_ in having}
        if len({values for values, _ in pairs}) == len(pairs):
            kept = rest
    return tuple(kept)
