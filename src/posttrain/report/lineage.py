"""The lineage of an artifact as an inline SVG: one card per stage, from the top down.

Domains are not drawn as nodes: nearly every stage reads several, and their edges would hide the
rest. A card shows them as dots in their colours instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from posttrain.engine.edges import role_of
from posttrain.report.gather import StageFacts
from posttrain.report.layers import Layout, layout
from posttrain.report.wording import headline

CARD_WIDTH = 176
CARD_HEIGHT = 74
COLUMN = CARD_WIDTH + 16
ROW = CARD_HEIGHT + 50
NAME_LENGTH = 19
"""Characters of a name that fit into a card."""
SPINE = ("start", "student", "data", "rollouts")
"""Edges along which the left side of the drawing goes back."""


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
        found = [edges[edge] for edge in SPINE if edges.get(edge) in shown]
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
