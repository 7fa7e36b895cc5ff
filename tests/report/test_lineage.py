"""The layered drawing: nothing overlaps, edges run downwards, crossings are undone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from posttrain.report.lineage import _spread, layout

MOPD = (
    ["base", "sft", *"abcd", *"ABCD", "student", "evaluation"],
    [
        ("base", "sft"),
        *(("sft", name) for name in "abcd"),
        *((name, name.upper()) for name in "abcd"),
        *((name, "student") for name in "ABCD"),
        *((name, "evaluation") for name in "ABCD"),
        ("sft", "student"),
        ("sft", "evaluation"),
        ("student", "evaluation"),
    ],
    ["base", "sft", "student", "evaluation"],
)
ROUNDS = 5
LADDER = (
    [f"{kind}{n}" for n in range(ROUNDS) for kind in "str"],
    [(f"s{n}", f"t{n}") for n in range(ROUNDS)]
    + [(f"t{n}", f"r{n}") for n in range(ROUNDS)]
    + [(f"r{n}", f"s{n + 1}") for n in range(ROUNDS - 1)]
    + [("s0", f"s{n}") for n in range(1, ROUNDS)],
    [],
)


@pytest.mark.parametrize(("nodes", "edges", "spine"), [MOPD, LADDER])
def test_no_overlap_and_downward_edges(nodes, edges, spine):
    plan = layout(nodes, edges, spine=spine)
    assert set(plan.nodes) == set(nodes)
    by_layer: dict[int, list[float]] = {}
    for x, layer in plan.nodes.values():
        by_layer.setdefault(layer, []).append(x)
    for row in by_layer.values():
        assert all(b - a >= 1 - 1e-9 for a, b in pairwise(sorted(row)))
        assert min(row) >= -1e-9
        assert max(row) <= plan.width + 1e-9
    for (source, target), route in plan.routes.items():
        assert route[0] == plan.nodes[source]
        assert route[-1] == plan.nodes[target]
        assert [layer for _, layer in route] == list(range(route[0][1], route[-1][1] + 1))


def test_long_edges_pass_beside_nodes():
    plan = layout(*MOPD[:2], spine=MOPD[2])
    for x, layer in plan.routes["sft", "evaluation"][1:-1]:
        for name, (other, other_layer) in plan.nodes.items():
            assert other_layer != layer or abs(other - x) > 0.5, name


def test_spine_goes_straight_down_the_left_side():
    plan = layout(*MOPD[:2], spine=MOPD[2])
    assert {plan.nodes[name][0] for name in MOPD[2]} == {0.0}
    assert {x for x, _ in plan.routes["sft", "student"]} == {0.0}
    assert all(plan.nodes[name][0] >= 1 for name in "abcdABCD")


def test_crossings_are_undone():
    """a-Y, b-X, c-Z with X, Y, Z in that order crosses once; sorting by neighbours does not."""
    plan = layout(["a", "b", "c", "X", "Y", "Z"], [("a", "Y"), ("b", "X"), ("c", "Z")])
    x = {name: place for name, (place, _) in plan.nodes.items()}
    assert (x["a"] - x["b"]) * (x["Y"] - x["X"]) > 0
    assert (x["b"] - x["c"]) * (x["X"] - x["Z"]) > 0


def test_a_source_stands_just_above_what_it_feeds():
    plan = layout(["a", "b", "late", "c"], [("a", "b"), ("b", "c"), ("late", "c")])
    assert plan.nodes["late"][1] == plan.nodes["b"][1] == 1


def test_one_node_and_none():
    assert layout(["a"], []).nodes == {"a": (0.0, 0)}
    assert layout([], []).nodes == {}


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([0, 2, 4], [0, 2, 4]),  # room enough
        ([3, 3], [2.5, 3.5]),  # both give way by half
        ([0, 5, 1], [0, 2.5, 3.5]),  # only the two that are in each other's way move
        ([-2, 4], [0, 4]),  # the left edge holds
    ],
)
def test_spread_by_hand(wanted: list[float], places: list[float]):
    assert _spread(wanted, [1.0] * len(wanted)) == pytest.approx(places)
