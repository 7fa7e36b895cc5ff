"""The lineage of an artifact as an inline SVG: one card per stage, from the top down.

Domains are not drawn as nodes: nearly every stage reads several, and their edges would hide the
rest. A card shows them as dots in their colours instead.

The cards lie in layers, after Sugiyama, Tagawa and Toda (1981). Each goes into the layer of its
longest path from a source; an edge across several layers gets a way-point in each, so that it
passes beside the cards there. Then the layers are swept up and down: each is sorted and placed by
the mean x of what its points are joined to in the neighbouring layers. One path, the spine, goes
straight down the left side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from posttrain.engine.graph import role_of
from posttrain.report.gather import StageFacts
from posttrain.report.wording import headline

CARD_WIDTH = 176
CARD_HEIGHT = 74
COLUMN = CARD_WIDTH + 16
ROW = CARD_HEIGHT + 50
NAME_LENGTH = 19
"""Characters of a name that fit into a card."""
SPINE = ("start", "student", "data", "rollouts")
"""Edges along which the left side of the drawing goes back."""
SWEEPS = 24
"""Of the first half each looks one way, which undoes crossings, of the rest both ways."""
WAYPOINT = 0.35
"""Room that a passing edge takes; a node takes 1."""

Edge = tuple[str, str]


def lineage_svg(stages: Sequence[StageFacts], colours: Mapping[str, int]) -> str:
    """The drawing, as wide and high in pixels as it needs to be."""
    shown = {stage.label: stage for stage in stages if "problems" not in stage.kind_row.makes}
    shown = shown or {stage.label: stage for stage in stages}
    edges: dict[tuple[str, str], list[str]] = {}
    for stage in shown.values():
        for edge, source in stage.edges.items():
            if source in shown and role_of(edge) != "domains":
                edges.setdefault((source, stage.label), []).append(edge)
    plan = layout(list(shown), edges, spine=_spine(shown))
    width = (plan.width + 1) * COLUMN
    height = plan.num_layers * ROW - (ROW - CARD_HEIGHT) + 2
    parts = [_edge(plan, pair, roles, shown, colours) for pair, roles in edges.items()]
    parts += [_card(stage, *_corner(plan, label), colours) for label, stage in shown.items()]
    names = ", ".join(stage.name for stage in shown.values())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lineage" role="img" '
        f'aria-label="Lineage: {escape(names)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _spine(shown: Mapping[str, StageFacts]) -> list[str]:
    """From the last stage back along what each is made from, source first."""
    path = [list(shown)[-1]] if shown else []
    while path:
        edges = shown[path[-1]].edges
        # Of several students the first.
        wanted = (*SPINE, *(edge for edge in edges if role_of(edge) == "students"))
        found = [edges[edge] for edge in wanted if edges.get(edge) in shown]
        if not found:
            break
        path.append(found[0])
    return path[::-1]


def _corner(plan: Layout, label: str) -> tuple[float, float]:
    x, layer = plan.nodes[label]
    return x * COLUMN + (COLUMN - CARD_WIDTH) / 2, layer * ROW + 1


def _edge(
    plan: Layout,
    pair: tuple[str, str],
    roles: Sequence[str],
    shown: Mapping[str, StageFacts],
    colours: Mapping[str, int],
) -> str:
    """A curve from the bottom of one card to the top of another, upright in between."""
    points = [((x + 0.5) * COLUMN, layer * ROW + 1) for x, layer in plan.routes[pair]]
    (x, y), *rest = points
    y += CARD_HEIGHT
    path = f"M{x:.1f} {y:.1f}"
    for place, (to_x, to_y) in enumerate(rest):
        middle = (y + to_y) / 2
        path += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
        if place < len(rest) - 1:
            y = to_y + CARD_HEIGHT
            path += f"V{y:.1f}"
    families = {role_of(role) for role in roles}
    style = next((role for role in ("start", "teachers") if role in families), "reads")
    said = f"{shown[pair[0]].name} is {' and '.join(roles)} of {shown[pair[1]].name}"
    domain = shown[pair[0]].domain
    paint = ""
    if style == "teachers" and domain is not None:
        paint = f' style="stroke:var(--c{colours[domain]})"'
    return f'<path class="edge {style}" d="{path}"{paint}><title>{escape(said)}</title></path>'


def _card(stage: StageFacts, x: float, y: float, colours: Mapping[str, int]) -> str:
    name = stage.name
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH - 9]}…{name[-8:]}"
    dots = "".join(
        f'<circle cx="{CARD_WIDTH - 14 - 11 * place}" cy="16" r="4" '
        f'style="fill:var(--c{colours[domain]})"><title>{escape(domain)}</title></circle>'
        for place, domain in enumerate(sorted(stage.domains, reverse=True)[:8])
    )
    key = headline(stage.kind_row, stage.metrics)
    return (
        f'<g class="card {escape(stage.kind)}" transform="translate({x:.1f} {y:.1f})">'
        f"<title>{escape(stage.label)}</title>"
        f'<rect width="{CARD_WIDTH}" height="{CARD_HEIGHT}" rx="6"/>'
        f'<text class="kind" x="12" y="20">{escape(stage.kind)}</text>{dots}'
        f'<text class="name" x="12" y="41">{escape(name)}</text>'
        f'<text class="print" x="12" y="61">{escape(stage.fingerprint[:8])}</text>'
        f'<text class="key" x="{CARD_WIDTH - 10}" y="61">{escape(key)}</text></g>'
    )


# -- the places of the cards -----------------------------------------------------------------------


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
