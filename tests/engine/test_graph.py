"""Order, identity and errors of graphs."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError, GraphError
from posttrain.engine.fingerprint import digest
from posttrain.engine.graph import Graph, Node

MakeGraph = Callable[..., Graph]


def diamond(**changes: Any) -> Graph:
    nodes = {
        "base": Node(name="base", kind="load", data={"files": "ab" * 32}),
        "left": Node(name="left", kind="add", config={"n": 1}, inputs={"start": "base"}),
        "right": Node(name="right", kind="add", config={"n": 2}, inputs={"start": "base"}),
        "top": Node(name="top", kind="join", inputs={"a": "left", "b": "right"}),
        "unused": Node(name="unused", kind="add", inputs={"start": "top"}),
    }
    return Graph(nodes=nodes | changes, target="top")


def test_the_order_has_inputs_first_and_only_what_the_target_needs() -> None:
    assert diamond().order() == ["base", "left", "right", "top"]
    nodes = dict(reversed(diamond().nodes.items()))
    assert Graph(nodes=nodes, target="top").order() == ["base", "right", "left", "top"]


def test_several_targets_are_wanted_with_all_they_need() -> None:
    graph = Graph(nodes=diamond().nodes, target="left", also=("unused", "left"))
    assert graph.targets == ("left", "unused")
    assert graph.order() == ["base", "left", "right", "top", "unused"]
    assert Graph(nodes=diamond().nodes, target="left", also=("right",)).order() == [
        "base",
        "left",
        "right",
    ]
    with pytest.raises(GraphError, match=r"unknown target 'topp'; did you mean 'top'\?"):
        Graph(nodes=diamond().nodes, target="top", also=("topp",)).order()


def test_a_fingerprint_is_the_digest_of_the_payload() -> None:
    prints = diamond().fingerprints()
    assert prints["left"] == digest(
        {
            "kind": "add",
            "version": 1,
            "config": {"n": 1},
            "data": {},
            "inputs": {"start": prints["base"]},
        }
    )
    assert diamond().payload("left")["inputs"] == {"start": prints["base"]}


def test_name_and_runtime_are_not_identity() -> None:
    node = Node(
        name="left", kind="add", config={"n": 1}, inputs={"start": "base"}, runtime={"x": 1}
    )
    renamed = Node(name="other", kind="add", config={"n": 1}, inputs={"start": "base"})
    graph = diamond(left=node)
    assert graph.fingerprints() == diamond().fingerprints()
    both = Graph(nodes={**graph.nodes, "other": renamed}, target="other")
    assert both.fingerprints()["other"] == graph.fingerprints()["left"]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"n": 9}},
        {"version": 2},
        {"kind": "sub"},
        {"data": {"x": "cd" * 32}},
        {"inputs": {"begin": "base"}},
        {"inputs": {}},
    ],
)
def test_a_change_reaches_exactly_the_descendants(change: dict[str, Any]) -> None:
    fields = {"name": "left", "kind": "add", "config": {"n": 1}, "inputs": {"start": "base"}}
    old = diamond().fingerprints()
    new = diamond(left=Node(**{**fields, **change})).fingerprints()
    assert {name for name in old if old[name] != new[name]} == {"left", "top"}


def test_width_counts_what_could_run_at_the_same_time() -> None:
    graph = diamond()
    assert [graph.width(name) for name in graph.order()] == [1, 2, 2, 1]


def test_ancestors() -> None:
    assert diamond().ancestors("top") == {"base", "left", "right"}
    assert diamond().ancestors("base") == frozenset()


def test_a_cycle_is_shown(make_graph: MakeGraph) -> None:
    graph = make_graph(
        Node(name="start", kind="k"),
        Node(name="a", kind="k", inputs={"x": "c", "y": "start"}),
        Node(name="b", kind="k", inputs={"x": "a"}),
        Node(name="c", kind="k", inputs={"x": "b"}),
        Node(name="end", kind="k", inputs={"x": "c"}),
    )
    with pytest.raises(GraphError, match="cycle") as caught:
        graph.order()
    shown = str(caught.value).split("cycle: ")[1].split(";")[0].split(" -> ")
    assert shown[0] == shown[-1]
    # Every arrow of the message is an edge of the graph.
    for source, name in itertools.pairwise(shown):
        assert source in graph.nodes[name].inputs.values()


def test_a_stage_that_needs_itself(make_graph: MakeGraph) -> None:
    with pytest.raises(GraphError, match="cycle: a -> a"):
        make_graph(Node(name="a", kind="k", inputs={"x": "a"})).order()


def test_an_unknown_input_names_the_nearest(make_graph: MakeGraph) -> None:
    graph = make_graph(
        Node(name="student", kind="k"), Node(name="end", kind="k", inputs={"start": "studnet"})
    )
    with pytest.raises(GraphError) as caught:
        graph.fingerprints()
    assert str(caught.value) == (
        "input 'start' of stage 'end' is 'studnet', which is not a stage; "
        "did you mean 'student'? known stages: end, student"
    )


def test_an_unknown_target() -> None:
    with pytest.raises(GraphError, match=r"unknown target 'topp'; did you mean 'top'\?"):
        Graph(nodes=diamond().nodes, target="topp").order()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "a\n", "x" * 101, "é"])
def test_a_name_that_is_no_directory_name_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="cannot be a directory name"):
        Node(name=name, kind="k")
    with pytest.raises(GraphError, match="cannot be a directory name"):
        Node(name="ok", kind=name)


def test_an_unstable_config_names_the_stage_and_field(make_graph: MakeGraph) -> None:
    graph = make_graph(Node(name="tune", kind="k", config={"reward": print}))
    with pytest.raises(ConfigError, match=r"stage tune: config\.reward: <built-in function print>"):
        graph.fingerprints()


def test_a_long_chain_needs_no_deep_recursion(make_graph: MakeGraph) -> None:
    nodes = [Node(name="n0", kind="k")]
    nodes += [Node(name=f"n{i}", kind="k", inputs={"x": f"n{i - 1}"}) for i in range(1, 1500)]
    graph = make_graph(*nodes)
    assert len(graph.fingerprints()) == 1500
