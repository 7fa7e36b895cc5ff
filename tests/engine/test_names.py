"""Names of artifacts that a later run calls otherwise."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.engine import ancestry
from posttrain.engine.errors import StoreError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.names import NAMES
from posttrain.engine.record import Artifact, seal
from posttrain.engine.store import Store

MakeGraph = Callable[..., Graph]


def called(store: Store, artifact: Artifact, *names: str) -> None:
    """A run that has these names for an artifact."""
    store.names.remember([(artifact.fingerprint, artifact.name, name) for name in names])


def test_the_newest_name_wins_and_all_find_it(store: Store, committed: list[Artifact]) -> None:
    first = committed[0]
    called(store, first, "general")
    called(store, first, "better")
    called(store, first, "general")
    again = Store(store.root)  # as another process reads it
    assert again.names.all_of(first.fingerprint, "first") == ["first", "better", "general"]
    for text in ("general", "first", "better", f"better-{first.fingerprint[:6]}", first.label):
        assert again.resolve(text).fingerprint == first.fingerprint
    assert again.resolve("general").record == first.record
    assert again.names.current(first).label == f"general-{first.fingerprint[:12]}"


def test_a_run_that_calls_it_as_it_was_made_leaves_nothing(
    store: Store, committed: list[Artifact]
) -> None:
    called(store, committed[0], "first")
    assert not (store.root / NAMES).exists()


def test_of_two_names_in_one_run_the_known_one_stays(
    store: Store, committed: list[Artifact]
) -> None:
    called(store, committed[0], "first", "twin")
    assert store.names.now(committed[0].fingerprint, "first") == "first"
    assert store.resolve("twin").name == "first"


def test_the_one_that_is_called_so_now_comes_before_one_that_was(
    store: Store, committed: list[Artifact]
) -> None:
    first, second, _ = committed
    called(store, first, "general")
    called(store, second, "first")
    assert store.resolve("first").fingerprint == second.fingerprint
    called(store, second, "other")
    with pytest.raises(StoreError, match="'first' could be 2 artifacts") as caught:
        store.resolve("first")
    assert f"general-{first.fingerprint[:12]}" in str(caught.value)
    assert f"other-{second.fingerprint[:12]}" in str(caught.value)


def test_a_lineage_is_shown_under_one_set_of_names(store: Store, committed: list[Artifact]) -> None:
    first, second, third = committed
    called(store, first, "general")
    found = ancestry.renamed(store, ancestry.lineage(store, third))
    labels = [ancestor.label for ancestor in found]
    assert labels == [f"general-{first.fingerprint[:12]}", second.label, third.label]
    assert found[1].edges == {"start": labels[0]}
    # What is recorded does not change.
    assert ancestry.verify(store, third) == []


def test_gc_forgets_the_names_of_what_it_removes(store: Store, committed: list[Artifact]) -> None:
    called(store, committed[0], "general")
    called(store, committed[2], "last")
    ancestry.gc(store, {committed[0].fingerprint})
    content = json.loads((store.root / NAMES).read_text())
    assert content["names"] == {committed[0].fingerprint: ["first", "general"]}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "names": 3}', '{"format": 2}'])
def test_a_damaged_file_counts_as_empty(store: Store, committed: list[Artifact], text: str) -> None:
    (store.root / NAMES).write_text(text)
    assert store.resolve("first").name == "first"
    called(store, committed[0], "general")
    assert store.resolve("general").name == "first"


def test_a_store_that_cannot_be_written_to_is_no_error(
    store: Store, committed: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("posttrain.engine.names.write_whole", refuse)
    called(store, committed[0], "general")
    assert store.names.now(committed[0].fingerprint, "first") == "first"


def test_records_of_a_history_are_renamed(store: Store, make_graph: MakeGraph) -> None:
    graph = make_graph(Node(name="a", kind="add"))
    work = store.begin(graph.fingerprints()["a"])
    assert work is not None
    fields: dict[str, Any] = {"name": "old", "kind": "add", "version": 1, "fingerprint": "f" * 64}
    payload = {"kind": "add", "version": 1, "config": {}, "data": {}, "inputs": {}}
    empty = {key: {} for key in ("config", "inputs", "files", "metrics", "provenance")}  # type: ignore[var-annotated]
    created = "2026-01-01T00:00:00+00:00"
    old = seal({**fields, **empty, "payload": payload, "history": [], "created": created})
    made = store.commit(graph.nodes["a"], work, inputs={}, metrics={}, provenance={}, history=[old])
    store.names.remember([("f" * 64, "old", "new")])
    assert store.names.current(made).history[0]["name"] == "new"
