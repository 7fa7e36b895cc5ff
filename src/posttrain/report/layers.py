"""A layered drawing of a directed acyclic graph: where every node and edge goes.

The usual three steps (Sugiyama, Tagawa and Toda, 1981): nodes into layers by their longest path
from a source, long edges cut by way-points so that they join neighbouring layers, layers ordered by
the mean place of their neighbours to save crossings, and x coordinates that pull nodes under their
neighbours without overlapping. One path, the spine, goes straight down the left side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

ORDER_SWEEPS = 12
PLACE_SWEEPS = 60
WAYPOINT = 0.35
"""Room that a passing edge takes, as a share of a node's."""

Edge = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Places in units: one between neighbouring nodes of a layer, one between layers."""

    nodes: dict[str, tuple[float, int]]
    """Node -> (x of its middle, layer)."""
    routes: dict[Edge, list[tuple[float, int]]]
    """Edge -> the points it passes, from its source to its target, one per layer."""
    width: float
    num_layers: int


def layout(nodes: Sequence[str], edges: Iterable[Edge], *, spine: Sequence[str] = ()) -> Layout:
    """Place the nodes of an acyclic graph; `nodes` come sources first.

    `spine` is a path along edges, from a source on.
    """
    edges = list(dict.fromkeys(edges))
    layer = _layers(nodes, edges)
    chains = {edge: _chain(edge, layer) for edge in edges}
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for name in nodes:
        rows[layer[name]].append(name)
    for edge, chain in chains.items():
        for number, point in enumerate(chain[1:-1]):
            rows[layer[edge[0]] + 1 + number].append(point)
    links = [pair for chain in chains.values() for pair in pairwise(chain)]
    first = {point for pair in pairwise(spine) for point in chains[pair]} | set(spine)
    _order(rows, links, first)
    x = _place(rows, links, size=dict.fromkeys((*nodes, *first), 1.0), first=first)
    at = {name: (x[name], number) for number, row in enumerate(rows) for name in row}
    return Layout(
        nodes={name: at[name] for name in nodes},
        routes={edge: [at[point] for point in chain] for edge, chain in chains.items()},
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


def _chain(edge: Edge, layer: Mapping[str, int]) -> list[str]:
    source, target = edge
    passed = range(layer[source] + 1, layer[target])
    return [source, *(f"{source}\0{target}\0{number}" for number in passed), target]


def _order(rows: list[list[str]], links: Sequence[Edge], first: Set[str]) -> None:
    """Sort each layer by the mean place of its neighbours above, then below, and so on."""
    for row in rows:
        row.sort(key=lambda name: name not in first)
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for a, b in links:
        above.setdefault(b, []).append(a)
        below.setdefault(a, []).append(b)
    best, fewest = [list(row) for row in rows], _crossings(rows, links)
    for sweep in range(ORDER_SWEEPS):
        near = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place = {name: p for other in rows for p, name in enumerate(other)}
            mean = {n: _mean([place[m] for m in near.get(n, [n])]) for n in row}
            row[:] = sorted(row, key=lambda n: (n not in first, mean[n]))
        count = _crossings(rows, links)
        if count < fewest:
            best, fewest = [list(row) for row in rows], count
    rows[:] = best


def _crossings(rows: Sequence[Sequence[str]], links: Sequence[Edge]) -> int:
    place = {name: p for row in rows for p, name in enumerate(row)}
    layer = {name: number for number, row in enumerate(rows) for name in row}
    count = 0
    for number in range(len(rows)):
        pairs = [(place[a], place[b]) for a, b in links if layer[a] == number]
        count += sum(
            (a - c) * (b - d) < 0 for i, (a, b) in enumerate(pairs) for c, d in pairs[i + 1 :]
        )
    return count


def _place(
    rows: Sequence[Sequence[str]],
    links: Sequence[Edge],
    *,
    size: Mapping[str, float],
    first: Set[str],
) -> dict[str, float]:
    """x of everything: under the mean of its neighbours, in order, with room in between."""
    sizes = [[size.get(name, WAYPOINT) for name in row] for row in rows]
    near: dict[str, list[str]] = {}
    for a, b in links:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    x: dict[str, float] = {}
    for row, room in zip(rows, sizes, strict=True):
        x |= dict(zip(row, _spread([0.0] * len(row), room), strict=True))
    for sweep in range(PLACE_SWEEPS):
        for number in range(len(rows)) if sweep % 2 else reversed(range(len(rows))):
            row, room = rows[number], sizes[number]
            wanted = [
                0.0 if name in first else _mean([x[m] for m in near.get(name, [name])])
                for name in row
            ]
            x |= dict(zip(row, _spread(wanted, room), strict=True))
    left = min(
        (
            x[n] - width / 2
            for r, s in zip(rows, sizes, strict=True)
            for n, width in zip(r, s, strict=True)
        ),
        default=0.0,
    )
    return {name: value - left - 0.5 for name, value in x.items()}


def _spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep the order, do not overlap and
    leave the first one's left edge at or right of -0.5.

    Pool adjacent violators: without the room in between, places only have to be in order, and
    neighbours that are not share their mean. Bounds are kept by clipping the result.
    """
    offset = [0.0]
    for a, b in pairwise(sizes):
        offset.append(offset[-1] + (a + b) / 2)
    pools: list[list[float]] = []
    for want, before in zip(wanted, offset, strict=True):
        pools.append([want - before])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    bound = sizes[0] / 2 - 0.5
    level = [max(_mean(pool), bound) for pool in pools for _ in pool]
    return [value + before for value, before in zip(level, offset, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
