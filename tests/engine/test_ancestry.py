"""Lineage, verification of what was tampered with, garbage collection."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry
from posttrain.engine.errors import StoreError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact, record_bytes, seal
from posttrain.engine.store import Store
from posttrain.engine.work import write_step


def test_lineage_is_in_topological_order(
    store: Store, commit: Callable[..., Artifact], make_graph: Callable[..., Graph]
) -> None:
    graph = make_graph(
        Node(name="base", kind="k"),
        Node(name="left", kind="k", config={"n": 1}, inputs={"start": "base"}),
        Node(name="right", kind="k", config={"n": 2}, inputs={"start": "base", "other": "left"}),
        Node(name="top", kind="k", inputs={"a": "right", "b": "left"}),
    )
    made = {name: commit(graph, name, {}) for name in graph.order()}
    found = ancestry.lineage(store, made["top"])
    assert [ancestor.artifact for ancestor in found] == [
        made[name] for name in ("base", "left", "right", "top")
    ]
    assert found[2].edges == {"start": made["base"].label, "other": made["left"].label}
    assert not any(ancestor.missing for ancestor in found)


def test_a_clean_store_has_no_problems(store: Store, committed: list[Artifact]) -> None:
    for artifact in committed:
        assert ancestry.verify(store, artifact) == []


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    path = artifact.path / "record.json"
    record = json.loads(path.read_bytes())
    change(record)
    path.write_bytes(record_bytes(record))


def test_verify_finds_a_changed_byte(store: Store, committed: list[Artifact]) -> None:
    path = committed[0].path / "value.txt"
    path.write_text(path.read_text().upper())
    assert ancestry.verify(store, committed[2]) == [
        f"{committed[0].label}: file value.txt was changed after it was committed"
    ]


def test_verify_finds_a_missing_and_an_added_file(store: Store, committed: list[Artifact]) -> None:
    (committed[1].path / "value.txt").unlink()
    (committed[1].path / "extra").mkdir()
    (committed[1].path / "extra" / "new.txt").write_text("")
    assert ancestry.verify(store, committed[2]) == [
        f"{committed[1].label}: file value.txt is missing",
        f"{committed[1].label}: file extra/new.txt is not in its record",
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_verify_finds_a_changed_metric(store: Store, committed: list[Artifact], which: int) -> None:
    edit(committed[which], lambda record: record["metrics"].update(score=0.99))
    problems = ancestry.verify(store, store.resolve("third"))
    label = committed[which].label
    assert f"{label}: its record was changed after it was committed" in problems
    chained = f"({label}): its record is not the one this was made from"
    assert any(problem.endswith(chained) for problem in problems) == (which < 2)


def test_verify_finds_a_metric_changed_with_its_digest(
    store: Store, committed: list[Artifact]
) -> None:
    """A record sealed anew is sound on its own; only the chain tells."""
    record = dict(committed[0].record)
    del record["digest"]
    forged = seal({**record, "metrics": {"score": 0.99}})
    (committed[0].path / "record.json").write_bytes(record_bytes(forged))
    assert ancestry.verify(store, committed[2]) == [
        f"{committed[1].label}: input start ({committed[0].label}): "
        f"its record is not the one this was made from"
    ]


def test_verify_finds_a_swapped_ancestor_record(store: Store, committed: list[Artifact]) -> None:
    content = (committed[1].path / "record.json").read_bytes()
    (committed[0].path / "record.json").write_bytes(content)
    problems = ancestry.verify(store, committed[2])
    assert any("its record is not the one this was made from" in problem for problem in problems)
    assert any("It was changed after it was committed" in problem for problem in problems)


def test_verify_finds_an_edited_config(store: Store, committed: list[Artifact]) -> None:
    edit(committed[2], lambda record: record["payload"]["config"].update(value=7))
    problems = ancestry.verify(store, store.load(committed[2].path))
    assert (
        f"{committed[2].label}: the payload in its record does not give its fingerprint" in problems
    )


def test_verify_finds_an_input_pointed_elsewhere(store: Store, committed: list[Artifact]) -> None:
    other = committed[1].fingerprint
    edit(committed[1], lambda record: record["inputs"]["start"].update(fingerprint=other))
    problems = ancestry.verify(store, store.load(committed[1].path))
    assert any("are not those of its payload" in problem for problem in problems)


def test_verify_finds_a_missing_ancestor(store: Store, committed: list[Artifact]) -> None:
    committed[0].path.rename(store.root / "elsewhere")
    assert ancestry.verify(store, committed[2]) == [
        f"{committed[1].label}: input start ({committed[0].label}) is missing from the store"
    ]
    assert [a.missing for a in ancestry.lineage(store, committed[2])] == [["start"], []]


def test_verify_finds_a_missing_ancestor_record(store: Store, committed: list[Artifact]) -> None:
    (committed[0].path / "record.json").unlink()
    problems = ancestry.verify(store, committed[2])
    assert len(problems) == 1
    assert problems[0].endswith("record.json is missing")


def labels(removed: Any) -> list[str]:
    return [item.label for item in removed]


def test_gc_keeps_ancestors(store: Store, committed: list[Artifact]) -> None:
    first, second, third = committed
    size = sum(path.stat().st_size for path in third.path.iterdir())
    removed = ancestry.gc(store, [second.fingerprint], dry_run=True)
    assert [(item.label, item.bytes) for item in removed] == [(third.label, size)]
    assert store.list() == committed
    assert ancestry.gc(store, [second.fingerprint]) == removed
    assert store.list() == [first, second]
    assert ancestry.verify(store, second) == []
    assert labels(ancestry.gc(store, [])) == [second.label, first.label]
    assert store.list() == []


def test_gc_ignores_unknown_fingerprints(store: Store, committed: list[Artifact]) -> None:
    assert labels(ancestry.gc(store, [committed[2].fingerprint, "0" * 64])) == []


def test_gc_removes_work_nobody_keeps(store: Store, chain: Graph) -> None:
    kept, gone, held = chain.fingerprints().values()
    for fingerprint in (kept, gone):
        work = store.begin(fingerprint)
        assert work is not None
        write_step(work.path, 1)
        work.release()
    work = store.begin(held)
    assert work is not None
    assert labels(ancestry.gc(store, [kept])) == [f"work/{gone[:12]}"]
    assert store.work_path(kept).exists()
    assert store.work_path(held).exists()
    work.release()


def test_gc_removes_work_left_behind_after_a_commit(
    store: Store, committed: list[Artifact]
) -> None:
    """A process killed between the rename and the cleaning leaves such a directory."""
    leftover = store.work_path(committed[0].fingerprint)
    leftover.mkdir()
    assert labels(ancestry.gc(store, [a.fingerprint for a in committed])) == [
        f"work/{leftover.name}"
    ]
    assert not leftover.exists()


def test_gc_waits_for_no_run(store: Store, committed: list[Artifact]) -> None:
    with store.in_use(), store.in_use():
        with (
            pytest.raises(StoreError, match=r"a run is using .* wait until it ends or stop it"),
            store.alone(),
        ):
            pass
        assert len(ancestry.gc(store, [], dry_run=True)) == 3
    with store.alone():
        assert len(ancestry.gc(store, [])) == 3


def test_gc_killed_half_way_leaves_no_orphan(
    store: Store, committed: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename
    moved = []

    def rename(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(source)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        ancestry.gc(store, [])
    assert store.list() == committed[:2]
    assert ancestry.verify(store, committed[1]) == []


def test_gc_goes_on_where_a_killed_one_had_begun_to_remove(
    store: Store, committed: list[Artifact]
) -> None:
    """After the kill the same artifact was made again."""
    left = store.root / "work" / f"{committed[2].path.name}.trash"
    left.mkdir(parents=True)
    (left / "value.txt").write_text("half gone")
    removed = ancestry.gc(store, [committed[1].fingerprint])
    assert committed[2].label in labels(removed)
    assert store.list() == committed[:2]
    assert list((store.root / "work").glob("*.trash")) == []


def test_gc_of_no_store(tmp_path: Path) -> None:
    assert ancestry.gc(Store(tmp_path / "none"), []) == []


def test_gc_takes_only_what_was_listed_and_is_still_unneeded(
    store: Store, chain: Graph, committed: list[Artifact], commit: Callable[..., Artifact]
) -> None:
    """A run that ends between the list and the answer keeps what it made."""
    first, second, third = committed
    listed = {item.path for item in ancestry.gc(store, [first.fingerprint], dry_run=True)}
    assert listed == {second.path, third.path}
    node = Node(name="made", kind="add", config={"value": 9}, inputs={"start": "second"})
    graph = Graph(nodes={**chain.nodes, "made": node}, target="made")
    made = commit(graph, "made", {"value.txt": "9"})
    # What came is not taken though nobody keeps it; nor what it descends from, where it is kept.
    with store.alone():
        assert ancestry.gc(store, [made.fingerprint], listed=listed)[0].path == third.path
    assert store.list() == [first, second, made]
    assert labels(ancestry.gc(store, [first.fingerprint], listed=listed)) == [second.label]
    assert made.path.is_dir()


def test_gc_keeps_what_a_damaged_record_names(store: Store, committed: list[Artifact]) -> None:
    path = committed[2].path / "record.json"
    path.write_text(path.read_text()[:-50])
    assert ancestry.gc(store, []) == []
    assert committed[2].path.is_dir()
    assert str(path) in store.faults()[0]


def test_gc_that_may_not_write_says_so(
    store: Store, committed: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(store.root))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StoreError, match="not allowed to write while removing what is not needed"):
        ancestry.gc(store, [])
    assert store.list() == committed


def test_gc_removes_a_link_not_what_it_leads_to(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    """A large artifact that somebody has put on another disk."""
    there = tmp_path / "large"
    shutil.move(committed[2].path, there)
    committed[2].path.symlink_to(there)
    assert store.list() == committed
    assert labels(ancestry.gc(store, [committed[1].fingerprint])) == [committed[2].label]
    assert (there / "value.txt").exists()
    assert list((store.root / "work").iterdir()) == []


def test_a_file_that_may_not_be_read_is_named(
    store: Store, committed: list[Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "value.txt" and self.parent == committed[0].path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert ancestry.verify(store, committed[2]) == [
        f"{committed[0].label}: file value.txt cannot be read (Permission denied)"
    ]
