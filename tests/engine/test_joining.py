"""Several graphs as one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from posttrain.engine.errors import StageError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.joining import Joined, join
from posttrain.engine.planner import plan
from posttrain.engine.runner import Event, run
from posttrain.engine.store import Store

MakeGraph = Callable[..., Graph]


def chain(make_graph: MakeGraph, rate: float, seed: int) -> Graph:
    """first, the same in all; second, by seed; third, by both; a join of all."""
    return make_graph(
        Node(name="first", kind="add", config={"value": 1}),
        Node(name="second", kind="add", config={"value": 10 * seed}, inputs={"start": "first"}),
        Node(name="third", kind="add", config={"value": rate}, inputs={"start": "second"}),
        Node(name="end", kind="add", inputs={"a": "first", "b": "third"}),
    )


@pytest.fixture
def joined(make_graph: MakeGraph) -> Joined:
    values = list(product((0.1, 0.2), (0, 1)))
    return join(
        [chain(make_graph, rate, seed) for rate, seed in values],
        [{"rate": str(rate), "seed": str(seed)} for rate, seed in values],
    )


def test_what_is_shared_is_one_stage_and_what_differs_is_named_by_what_it_depends_on(
    joined: Joined,
) -> None:
    assert joined.graph.order() == [
        "first",
        "second[seed=0]",
        "third[rate=0.1,seed=0]",
        "end[rate=0.1,seed=0]",
        "second[seed=1]",
        "third[rate=0.1,seed=1]",
        "end[rate=0.1,seed=1]",
        "third[rate=0.2,seed=0]",
        "end[rate=0.2,seed=0]",
        "third[rate=0.2,seed=1]",
        "end[rate=0.2,seed=1]",
    ]
    assert joined.graph.targets == tuple(keys["end"] for keys in joined.keys)
    assert joined.graph.nodes["end[rate=0.2,seed=1]"].inputs == {
        "a": "first",
        "b": "third[rate=0.2,seed=1]",
    }


def test_no_fingerprint_changes_and_records_keep_the_plain_name(
    joined: Joined, make_graph: MakeGraph
) -> None:
    prints = joined.graph.fingerprints()
    for (rate, seed), keys in zip(product((0.1, 0.2), (0, 1)), joined.keys, strict=True):
        alone = chain(make_graph, rate, seed).fingerprints()
        assert {name: prints[key] for name, key in keys.items()} == alone
        assert {joined.graph.nodes[key].name for key in keys.values()} == set(alone)


def test_graphs_of_other_stages_can_be_joined(make_graph: MakeGraph) -> None:
    one = make_graph(Node(name="first", kind="add"), Node(name="end", kind="add"))
    other = make_graph(
        Node(name="more", kind="add"), Node(name="end", kind="add", inputs={"a": "more"})
    )
    found = join([one, other, one], [{"which": name} for name in "abc"])
    assert found.graph.order() == ["end[which=a]", "more", "end[which=b]"]
    assert found.keys[2] == found.keys[0] == {"end": "end[which=a]"}


def events_of(graph: Graph, store: Store, toys: str, **options: Any) -> list[Event]:
    return list(run(graph, store, execute=toys, **options))


def test_a_joined_graph_runs_and_each_graph_finds_its_part(
    joined: Joined, make_graph: MakeGraph, store: Store, toys: str
) -> None:
    events = events_of(joined.graph, store, toys, jobs=2)
    assert sorted(e.name for e in events if e.kind == "finished") == sorted(joined.graph.order())
    alone = chain(make_graph, 0.2, 1)
    assert {row.action for row in plan(alone, store)} == {"cached"}
    found = store.find(alone.fingerprints()["end"])
    assert found is not None
    # 1 + (1 + 10 + 0.2)
    assert found.metrics == {"value": pytest.approx(12.2)}
    assert found.name == "end"
    assert [e.kind for e in events_of(joined.graph, store, toys)] == ["cached"] * 11


def test_a_failure_stops_only_the_graphs_that_need_it(
    make_graph: MakeGraph, store: Store, toys: str
) -> None:
    def graph(by: int) -> Graph:
        return make_graph(
            Node(name="first", kind="add"),
            Node(name="half", kind="crash", config={"by": by}, inputs={"start": "first"}),
            Node(name="end", kind="report", inputs={"start": "half"}),
        )

    both = join([graph(0), graph(2)], [{"by": "0"}, {"by": "2"}]).graph
    found = []
    with pytest.raises(StageError, match=r"stage half\[by=0\] failed"):
        for event in run(both, store, execute=toys):
            found.append((event.kind, event.name))
    assert ("blocked", "end[by=0]") in found
    assert ("finished", "end[by=2]") in found


def test_the_plan_compares_with_earlier_stages_of_the_plain_name(
    make_graph: MakeGraph, store: Store, toys: str
) -> None:
    events_of(chain(make_graph, 0.1, 0), store, toys)
    both = join(
        [chain(make_graph, rate, 0) for rate in (0.1, 0.2)], [{"rate": "0.1"}, {"rate": "0.2"}]
    )
    reasons = {row.name: row.reason for row in plan(both.graph, store) if row.action == "run"}
    assert reasons == {
        "third[rate=0.2]": "value: 0.1 -> 0.2",
        "end[rate=0.2]": "input b reruns (third[rate=0.2])",
    }
