"""Artifacts that are links to files outside: when those move, change or are gone."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry, transfer
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.fingerprint import files_digest
from posttrain.engine.graph import Graph, Node
from posttrain.engine.links import check_links
from posttrain.engine.planner import plan
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store

FILES = ["value.txt", "sub/more.txt"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "value.txt").write_text("3")
    (folder / "sub" / "more.txt").write_text("more")
    return folder


@pytest.fixture
def base(store: Store, outside: Path) -> Artifact:
    return adopt(store, outside)


def adopt(store: Store, source: Path, **changes: Any) -> Artifact:
    options: dict[str, Any] = {"name": "base", "kind": "outside", "files": FILES, "link": True}
    options |= {"metrics": {}, "provenance": {}}
    return transfer.adopt(store, source, **{**options, **changes})


def graph_of(base: Artifact, directory: Path | None, value: int = 1) -> Graph:
    """base -> sum, where a recipe says that the files of base are in `directory`."""
    runtime = {} if directory is None else {"directory": str(directory)}
    nodes = [
        Node(name="base", kind="outside", data=base.payload["data"], runtime=runtime),
        Node(name="sum", kind="add", config={"value": value}, inputs={"start": "base"}),
    ]
    return Graph(nodes={node.name: node for node in nodes}, target="sum")


def test_moved_files_are_found_where_the_recipe_says(
    store: Store, base: Artifact, outside: Path, toys: str
) -> None:
    moved = outside.rename(outside.with_name("elsewhere"))
    graph = graph_of(base, moved)
    row, other = plan(graph, store)
    assert (row.action, row.artifact, other.action) == ("cached", base, "run")
    assert row.reason == f"its files have moved, links renewed to {moved}"
    # A plan writes nothing.
    assert not base.file("value.txt").exists()
    events = list(run(graph, store, execute=toys))
    assert [(e.kind, e.name) for e in events if e.kind in ("cached", "finished")] == [
        ("cached", "base"),
        ("finished", "sum"),
    ]
    assert events[0].payload["reason"] == row.reason
    assert store.resolve("sum").metrics == {"value": 4.0}
    assert base.file("value.txt").readlink() == moved / "value.txt"
    assert ancestry.verify(store, store.resolve("sum")) == []
    assert sorted(p.name for p in store.root.iterdir() if p.name.startswith(".")) == []


def test_a_run_that_finds_all_cached_renews_too(
    store: Store, base: Artifact, outside: Path, toys: str
) -> None:
    list(run(graph_of(base, outside), store, execute=toys))
    moved = outside.rename(outside.with_name("elsewhere"))
    kinds = [event.kind for event in run(graph_of(base, moved), store, execute=toys)]
    assert kinds == ["cached", "cached"]
    assert base.file("value.txt").read_text() == "3"


def test_something_else_in_the_old_place(
    store: Store, base: Artifact, outside: Path, toys: str
) -> None:
    """The links lead somewhere, but not to what the record is about."""
    moved = Path(shutil.copytree(outside, outside.with_name("elsewhere")))
    (outside / "value.txt").write_text("5")
    list(run(graph_of(base, moved), store, execute=toys))
    assert store.resolve("sum").metrics == {"value": 4.0}
    assert base.file("value.txt").readlink() == moved / "value.txt"


@pytest.mark.parametrize("directory", [None, "same"])
def test_bytes_that_are_nowhere(
    store: Store, base: Artifact, outside: Path, toys: str, directory: str | None
) -> None:
    graph = graph_of(base, None if directory is None else outside)
    list(run(graph, store, execute=toys))
    shutil.rmtree(outside)
    # What needs them no more goes on.
    row, other = plan(graph, store)
    assert (row.action, other.action) == ("cached", "cached")
    message = (
        f"base: its files are no longer at {outside} (value.txt); let the recipe, or its "
        "parameter, name the directory where they are now, or tell it by posttrain adopt DIR "
        "--name base, or run again when they are back"
    )
    assert row.reason == message
    assert [event.kind for event in run(graph, store, execute=toys)] == ["cached", "cached"]
    longer = graph_of(base, None, value=2)
    assert [row.action for row in plan(longer, store)] == ["blocked", "blocked"]
    with pytest.raises(ConfigError) as refused:
        run(longer, store, execute=toys)
    assert message in str(refused.value)


def test_adopting_the_moved_directory_again_renews(
    store: Store, base: Artifact, outside: Path
) -> None:
    moved = outside.rename(outside.with_name("elsewhere"))
    assert adopt(store, moved) == base
    assert base.file("sub/more.txt").read_text() == "more"
    assert ancestry.verify(store, base) == []


def test_an_export_finds_large_files_and_what_lies_beside_them(
    store: Store, outside: Path, tmp_path: Path
) -> None:
    (outside / "value.txt").write_text("3" * 1_000_000)
    old = 1_600_000_000
    os.utime(outside / "value.txt", (old, old))
    base = adopt(store, outside)
    moved = outside.rename(outside.with_name("elsewhere"))
    with pytest.raises(StoreError, match=f"base: its files are no longer at {outside}"):
        transfer.export(store, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Another use has met them in their new place, more than three seconds after the change.
    store.hashes._known[str(moved / "value.txt")] = (  # as `digest` notes it
        (*_state(moved / "value.txt"),),
        base.files["value.txt"]["sha256"],
    )
    transfer.export(store, base, tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "more.txt").read_text() == "more"
    assert base.file("value.txt").readlink() == moved / "value.txt"


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def test_links_that_lead_somewhere_are_left_alone(
    store: Store, base: Artifact, outside: Path
) -> None:
    before = {name: base.file(name).lstat().st_ino for name in FILES}
    check_links(store.root, base, store.hashes)
    plan(graph_of(base, outside), store)
    assert {name: base.file(name).lstat().st_ino for name in FILES} == before
    assert base.payload["data"] == {"files": files_digest(outside, base.files)}
