"""What would run, and the reason for it."""

from collections.abc import Callable
from typing import Any

import pytest

from posttrain.engine import store as store_module
from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.engine.work import write_step


def change(graph: Graph, name: str, **fields: Any) -> Graph:
    old = graph.nodes[name]
    node = Node(**{**{f: getattr(old, f) for f in old.__dataclass_fields__}, **fields})
    return Graph(nodes={**graph.nodes, name: node}, target=graph.target)


def reasons(graph: Graph, store: Store) -> dict[str, str]:
    return {row.name: f"{row.action}: {row.reason}".rstrip(": ") for row in plan(graph, store)}


def test_everything_is_new(store: Store, chain: Graph) -> None:
    assert set(reasons(chain, store).values()) == {"run: new"}
    assert not store.root.exists()


def test_everything_is_cached(store: Store, chain: Graph, committed: list[Artifact]) -> None:
    assert [row.artifact for row in plan(chain, store)] == committed
    assert set(reasons(chain, store).values()) == {"cached"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"config": {"value": 7}}, "value: 2 -> 7"),
        ({"config": {"value": 2, "extra": "x"}}, 'extra: (absent) -> "x"'),
        ({"config": {}}, "value: 2 -> (absent)"),
        ({"version": 3}, "stage version: 1 -> 3"),
        ({"data": {"prompts": "ab"}}, "data prompts added"),
        ({"inputs": {"start": "first", "other": "first"}}, "input other added (first)"),
        (
            {"config": {"value": "x" * 100, "a": 1, "b": 2, "c": 3}},
            "a: (absent) -> 1; b: (absent) -> 2; c: (absent) -> 3; and 1 more",
        ),
    ],
)
def test_an_edit_is_named_and_reaches_the_descendants(
    store: Store,
    chain: Graph,
    committed: list[Artifact],
    fields: dict[str, Any],
    reason: str,
) -> None:
    assert reasons(change(chain, "second", **fields), store) == {
        "first": "cached",
        "second": f"run: {reason}",
        "third": "run: input start reruns (second)",
    }


def test_a_removed_input_is_named(store: Store, chain: Graph, committed: list[Artifact]) -> None:
    graph = change(chain, "third", inputs={})
    assert reasons(graph, store) == {"third": "run: input start removed"}


def test_changed_data_is_named(
    store: Store, commit: Callable[..., Artifact], make_graph: Callable[..., Graph]
) -> None:
    commit(make_graph(Node(name="a", kind="k", data={"prompts": "00"})), "a", {})
    graph = make_graph(Node(name="a", kind="k", data={"prompts": "11"}))
    assert reasons(graph, store) == {"a": "run: data prompts changed"}


def test_an_input_that_is_cached_but_another_one(
    store: Store, chain: Graph, committed: list[Artifact]
) -> None:
    graph = change(chain, "third", inputs={"start": "first"})
    assert reasons(graph, store) == {"first": "cached", "third": "run: input start changed (first)"}


def test_the_most_recent_artifact_is_compared(
    store: Store, chain: Graph, committed: list[Artifact], commit: Callable[..., Artifact]
) -> None:
    newer = change(chain, "first", config={"value": 50})
    commit(newer, "first", {})
    graph = change(chain, "first", config={"value": 51})
    assert reasons(graph, store)["first"] == "run: value: 50 -> 51"


def test_work_in_progress_resumes(store: Store, chain: Graph) -> None:
    work = store.begin(chain.fingerprints()["first"])
    assert work is not None
    assert reasons(chain, store)["first"] == "run: new"
    write_step(work.path, 120)
    work.release()
    assert reasons(chain, store)["first"] == "run: resumes at step 120"


def test_a_missing_outside_file_blocks(store: Store, chain: Graph) -> None:
    graph = change(chain, "first", runtime={"missing": "there is no file prompts.jsonl"})
    assert reasons(graph, store) == {
        "first": "blocked: there is no file prompts.jsonl",
        "second": "blocked: input start is blocked (first)",
        "third": "blocked: input start is blocked (second)",
    }


def test_a_missing_outside_file_of_a_cached_stage_does_not(
    store: Store, chain: Graph, committed: list[Artifact]
) -> None:
    graph = change(chain, "first", runtime={"missing": "there is no file prompts.jsonl"})
    assert set(reasons(graph, store).values()) == {"cached"}


def test_two_nodes_of_one_fingerprint(store: Store, make_graph: Callable[..., Graph]) -> None:
    graph = make_graph(
        Node(name="a", kind="add", config={"value": 1}),
        Node(name="b", kind="add", config={"value": 1}),
        Node(name="sum", kind="add", inputs={"x": "a", "y": "b"}),
    )
    assert reasons(graph, store)["b"] == "run: same as a, made once"


def test_a_cached_run_hashes_no_file(
    store: Store, chain: Graph, committed: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> str:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(store_module, "file_digest", refuse)
    monkeypatch.setattr("hashlib.file_digest", refuse)
    events = list(run(chain, store_module.Store(store.root), execute="nowhere:nothing"))
    assert [(event.kind, event.name) for event in events] == [
        ("cached", "first"),
        ("cached", "second"),
        ("cached", "third"),
    ]
