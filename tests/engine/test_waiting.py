"""A stage that needs a file which somebody has yet to fill in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.engine import ancestry
from posttrain.engine.errors import StageError, Waiting
from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.runner import Event, run
from posttrain.engine.store import Store

MakeGraph = Callable[..., Graph]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "number.txt"


@pytest.fixture
def graph(make_graph: MakeGraph, file: Path) -> Graph:
    """base -> asked -> end, and beside them base -> other -> end."""
    return make_graph(
        Node(name="base", kind="add", config={"value": 1}),
        Node(name="asked", kind="wait", inputs={"start": "base"}, runtime={"file": str(file)}),
        Node(name="other", kind="add", config={"value": 5}, inputs={"start": "base"}),
        Node(name="below", kind="add", config={"value": 2}, inputs={"start": "asked"}),
        Node(name="end", kind="add", inputs={"a": "below", "b": "other"}),
    )


def run_until(graph: Graph, store: Store, toys: str) -> tuple[list[Event], Waiting]:
    events = []
    with pytest.raises(Waiting) as caught:
        for event in run(graph, store, execute=toys):
            events.append(event)
    return events, caught.value


def test_the_run_ends_and_the_same_run_goes_on(
    store: Store, graph: Graph, toys: str, file: Path
) -> None:
    events, error = run_until(graph, store, toys)
    seen = {event.name: (event.kind, event.payload.get("reason")) for event in events}
    assert seen["asked"] == ("needs input", f"write a number into {file}")
    assert seen["other"][0] == "finished"
    assert seen["below"] == ("blocked", "waits for asked (input start)")
    assert seen["end"] == ("blocked", "input a is blocked (below)")
    assert error.exit_code == 3
    assert str(error).splitlines() == [
        f"stage asked waits: write a number into {file}",
        "blocked: below: waits for asked (input start)",
        "blocked: end: input a is blocked (below)",
        "What finished is kept. Once this is filled in, run the same command again.",
    ]
    file.write_text("40")
    finished = [e.name for e in run(graph, store, execute=toys) if e.kind == "finished"]
    assert finished == ["asked", "below", "end"]
    assert store.resolve("end").metrics == {"value": 48.0}
    assert ancestry.verify(store, store.resolve("end")) == []


def test_a_plan_tells_what_waits_until_the_file_changes(
    store: Store, graph: Graph, toys: str, file: Path
) -> None:
    assert {row.action for row in plan(graph, store)} == {"run"}
    run_until(graph, store, toys)
    rows = {row.name: (row.action, row.reason) for row in plan(graph, store)}
    assert rows["other"][0] == "cached"
    assert rows["asked"] == ("needs input", f"write a number into {file}")
    assert rows["below"] == ("needs input", "for asked (input start)")
    assert rows["end"] == ("needs input", "for below (input a)")
    # A run tries again all the same.
    events, _ = run_until(graph, store, toys)
    assert [e.kind for e in events if e.name == "asked"] == ["started", "needs input"]
    file.write_text("40")
    rows = {row.name: (row.action, row.reason) for row in plan(graph, store)}
    assert rows["asked"] == ("run", "the file that it waited for has changed")
    assert rows["end"][0] == "run"


def test_a_failure_beside_it_decides_how_the_run_ends(
    store: Store, make_graph: MakeGraph, toys: str, file: Path
) -> None:
    graph = make_graph(
        Node(name="asked", kind="wait", runtime={"file": str(file)}),
        Node(name="bad", kind="refuse"),
        Node(name="end", kind="add", inputs={"a": "asked", "b": "bad"}),
    )
    with pytest.raises(StageError) as caught:
        list(run(graph, store, execute=toys))
    assert caught.value.exit_code == 2
    assert f"stage asked waits: write a number into {file}" in str(caught.value)


def test_a_twin_of_a_stage_that_waits_is_blocked(
    store: Store, make_graph: MakeGraph, toys: str, file: Path
) -> None:
    runtime = {"file": str(file)}
    graph = make_graph(
        Node(name="asked", kind="wait", runtime=runtime),
        Node(name="again", kind="wait", runtime=runtime),
        Node(name="end", kind="add", inputs={"a": "asked", "b": "again"}),
    )
    events, _ = run_until(graph, store, toys)
    reasons = {e.name: e.payload["reason"] for e in events if e.kind == "blocked"}
    assert reasons["again"] == "waits for asked, which is the same"
    assert [e.name for e in events if e.kind == "started"] == ["asked"]
