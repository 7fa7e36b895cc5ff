"""Where the nodes and edges of an acyclic graph go in a drawing made of layers.

After Sugiyama, Tagawa and Toda (1981). Each node goes into the layer of its longest path from a
source; an edge across several layers gets a way-point in each, so that it passes beside the nodes
there. Then the layers are swept up and down: each is sorted and placed by the mean x of what its
points are joined to in the neighbouring layers. One path, the spine, goes straight down the left
side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 24
"""Of the first half each looks one way, which undoes crossings, of the rest both ways."""
WAYPOINT = 0.35
"""Room that a passing edge takes; a node takes 1."""

Edge = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Places in units: one between neighbouring nodes of a layer, one between layers."""

    nodes: Mapping[str, tuple[float, int]]
    """Node -> (x of its middle, 0 at the left; layer, 0 at the top)."""
    routes: Mapping[Edge, Sequence[tuple[float, int]]]
    """Edge -> the points it passes, from its source to its target, one per layer."""
    width: float
    """Largest x of a node or way-point."""
    num_layers: int


def layout(nodes: Sequence[str], edges: Iterable[Edge], *, spine: Sequence[str] = ()) -> Layout:
    """Place the nodes of an acyclic graph; `nodes` come sources first.

    `spine` is a path along edges, from a source on.
    """
    edges = list(dict.fromkeys(edges))
    layer = _layers(nodes, edges)
    # Way-points are named after their edge and layer; \0 occurs in no name of a node.
    routes = {
        (a, b): [a, *(f"{a}\0{b}\0{n}" for n in range(layer[a] + 1, layer[b])), b] for a, b in edges
    }
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for name in nodes:
        rows[layer[name]].append(name)
    for (source, _), route in routes.items():
        for number, point in enumerate(route[1:-1], start=layer[source] + 1):
            rows[number].append(point)
    fixed = set(spine).union(*(routes[edge] for edge in pairwise(spine)))
    room = {
        point: 1.0 if point in layer or point in fixed else WAYPOINT for r in rows for point in r
    }
    x = _places(rows, routes.values(), room, fixed)
    points = {point: (x[point], number) for number, row in enumerate(rows) for point in row}
    return Layout(
        nodes={name: points[name] for name in nodes},
        routes={edge: [points[point] for point in route] for edge, route in routes.items()},
        width=max(x.values(), default=0.0),
        num_layers=len(rows),
    )


def _layers(nodes: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Longest path from a source; then each source moves down to just above what it feeds."""
    layer: dict[str, int] = {}
    for name in nodes:
        layer[name] = max((layer[a] + 1 for a, b in edges if b == name), default=0)
    fed = {b for _, b in edges}
    for name in nodes:
        below = [layer[b] for a, b in edges if a == name]
        if name not in fed and below:
            layer[name] = min(below) - 1
    return layer


def _places(
    rows: Sequence[list[str]],
    routes: Iterable[Sequence[str]],
    room: Mapping[str, float],
    fixed: set[str],
) -> dict[str, float]:
    """x of every point. Sorts the rows; points of `fixed` come first in theirs, at 0."""
    above: dict[str, list[str]] = {point: [] for point in room}
    below: dict[str, list[str]] = {point: [] for point in room}
    for a, b in (pair for route in routes for pair in pairwise(route)):
        below[a].append(b)
        above[b].append(a)
    x = {point: float(number) for row in rows for number, point in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            wanted = {}
            for point in row:
                near = above[point] if down else below[point]
                if sweep >= SWEEPS // 2:
                    near = above[point] + below[point]
                mean = sum(x[other] for other in near) / len(near) if near else x[point]
                wanted[point] = -1.0 if point in fixed else mean
            row.sort(key=lambda point: wanted[point])
            x |= zip(row, _spread([wanted[p] for p in row], [room[p] for p in row]), strict=True)
    return x


def _spread(wanted: Sequence[float], room: Sequence[float]) -> list[float]:
    """Places near the wanted ones, in their order, that do not overlap and begin at 0 or later.

    The middle between pushing everything that overlaps to the right, and to the left.
    """
    gaps = [(a + b) / 2 for a, b in pairwise(room)]
    right, left, packed = [wanted[0]], [wanted[-1]], [(room[0] - 1) / 2]
    for want, gap in zip(wanted[1:], gaps, strict=True):
        right.append(max(want, right[-1] + gap))
        packed.append(packed[-1] + gap)
    for want, gap in zip(wanted[-2::-1], gaps[::-1], strict=True):
        left.append(min(want, left[-1] - gap))
    return [max((a + b) / 2, c) for a, b, c in zip(right, left[::-1], packed, strict=True)]
