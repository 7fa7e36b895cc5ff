"""Adopting outside files, exporting with a history, and both in turn."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry, transfer
from posttrain.engine.ancestry import ADOPTED
from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import files_digest
from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.transfer import read_history


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_text("aaa")
    (folder / "sub" / "b.txt").write_text("bb")
    return folder


def adopt(store: Store, source: Path, **changes: Any) -> Artifact:
    options: dict[str, Any] = {
        "name": "base",
        "kind": "outside",
        "files": ["a.bin", "sub/b.txt"],
        "link": True,
        "metrics": {},
        "provenance": {"source": str(source)},
    }
    return transfer.adopt(store, source, **{**options, **changes})


@pytest.mark.parametrize("link", [True, False])
def test_adopted_files_are_found_by_a_graph(store: Store, outside: Path, link: bool) -> None:
    artifact = adopt(store, outside, link=link)
    assert artifact.file("a.bin").is_symlink() == link
    assert artifact.file("sub/b.txt").read_text() == "bb"
    assert ancestry.verify(store, artifact) == []
    digest = files_digest(outside, artifact.files)
    node = Node(name="any", kind="outside", data={"files": digest}, runtime={"missing": "gone"})
    [row] = plan(Graph(nodes={"any": node}, target="any"), store)
    assert (row.action, row.artifact) == ("cached", artifact)
    assert list((store.root / "work").iterdir()) == []


def test_adopting_twice_gives_the_first(store: Store, outside: Path) -> None:
    assert adopt(store, outside) == adopt(store, outside, name="again")
    assert adopt(store, outside, version=2) != adopt(store, outside)


def test_a_changed_linked_file_is_found(store: Store, outside: Path) -> None:
    artifact = adopt(store, outside)
    (outside / "a.bin").write_text("aba")
    (outside / "sub" / "b.txt").unlink()
    assert ancestry.verify(store, artifact) == [
        f"{artifact.label}: file a.bin was changed after it was committed",
        f"{artifact.label}: file sub/b.txt is missing (it links to {outside}/sub/b.txt)",
    ]


def test_a_full_disk_while_adopting(
    store: Store, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match="disk full while adopting base"):
        adopt(store, outside, link=False)
    assert store.list() == []
    assert list((store.root / "work").iterdir()) == []


def test_an_export_is_real_files_and_a_history(
    store: Store,
    outside: Path,
    make_graph: Callable[..., Graph],
    commit: Callable[..., Artifact],
    tmp_path: Path,
) -> None:
    base = adopt(store, outside)
    graph = make_graph(
        Node(name="base", kind="outside", data=base.payload["data"]),
        Node(name="next", kind="add", inputs={"start": "base"}),
    )
    made = commit(graph, "next", {"deep/w.bin": "w"}, score=1.5)
    target = transfer.export(store, base, tmp_path / "exports" / "base")
    assert not (target / "a.bin").is_symlink()
    assert (target / "a.bin").read_text() == "aaa"
    target = transfer.export(store, made, tmp_path / "exports" / "next")
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == [
        "deep/w.bin",
        "history.json",
    ]
    assert read_history(target) == [base.record, made.record]
    assert sorted(path.name for path in target.parent.iterdir()) == ["base", "next"]


def test_an_export_needs_an_empty_place(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    transfer.export(store, committed[0], target)
    with pytest.raises(StoreError, match="is not an empty directory"):
        transfer.export(store, committed[0], target)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is not an empty directory"):
        transfer.export(store, committed[0], tmp_path / "file")


def test_an_export_has_its_card_or_is_not_there(
    store: Store, committed: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any rename or copy; then the same command goes through."""
    target = tmp_path / "exports" / "third"
    dead = subprocess.Popen(["true"])
    dead.wait()
    litter = target.parent / f".third.{dead.pid}.tmp"
    litter.mkdir(parents=True)
    (litter / "half").write_text("half")
    for number in range(1, 20):
        calls = []

        def count(
            real: Any, *arguments: Any, calls: list[int] = calls, last: int = number, **how: Any
        ) -> Any:
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return real(*arguments, **how)

        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (shutil, "copyfile")):
                patch.setattr(module, name, partial(count, getattr(module, name)))
            try:
                with transfer.exporting(store, committed[2], target) as part:
                    assert (part / "value.txt").read_text() == "third"
                    write_whole(part / "README.md", b"# card")
            except KeyboardInterrupt:
                assert not target.exists()
                assert list(target.parent.iterdir()) == []
                continue
        break
    assert number > 3
    assert (target / "README.md").read_bytes() == b"# card"
    assert sorted(path.name for path in target.parent.iterdir()) == ["third"]


def test_an_unreadable_file_is_named(
    store: Store, committed: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, *_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(StoreError, match=r"third-\w+: value\.txt may not be read"):
        transfer.export(store, committed[2], tmp_path / "out")


def test_adopting_holds_the_store_against_gc(
    store: Store, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Store.commit

    def commit(self: Store, *arguments: Any, **options: Any) -> Artifact:
        with pytest.raises(StoreError, match="a run is using"), store.alone():
            pass
        seen.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Store, "commit", commit)
    adopt(store, outside)
    assert seen == [1]
    with store.alone():
        pass


def test_exporting_holds_the_store_against_gc(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    with (
        transfer.exporting(store, committed[2], tmp_path / "out"),
        pytest.raises(StoreError, match="a run is using"),
        store.alone(),
    ):
        pass
    with store.alone():
        pass


def test_an_export_is_whole_or_not_there(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    (committed[2].path / "value.txt").write_text("changed")
    target = tmp_path / "exports" / "third"
    with pytest.raises(StoreError, match=r"value\.txt differs from its record"):
        transfer.export(store, committed[2], target)
    (committed[2].path / "value.txt").unlink()
    with pytest.raises(StoreError, match=r"value\.txt is missing"):
        transfer.export(store, committed[2], target)
    shutil.rmtree(committed[0].path)
    with pytest.raises(StoreError, match="the store lacks start of second"):
        transfer.export(store, committed[2], target)
    assert list(target.parent.iterdir()) == []


@pytest.fixture
def travelled(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> tuple[Store, Path, Artifact]:
    """The chain exported from one store and adopted in another."""
    target = transfer.export(store, committed[2], tmp_path / "export")
    other = Store(tmp_path / "other")
    return (
        other,
        target,
        adopt(other, target, files=["value.txt"], link=False, history=read_history(target)),
    )


def test_the_history_travels(
    travelled: tuple[Store, Path, Artifact], committed: list[Artifact], tmp_path: Path
) -> None:
    other, _, artifact = travelled
    assert ancestry.verify(other, artifact) == []
    found = ancestry.lineage(other, artifact)
    assert [ancestor.label for ancestor in found] == [
        *(a.label for a in committed),
        artifact.label,
    ]
    assert [ancestor.artifact for ancestor in found] == [None, None, None, artifact]
    assert found[3].edges == {ADOPTED: committed[2].label}
    assert found[2].edges == {"start": committed[1].label}


def test_the_history_travels_twice(
    travelled: tuple[Store, Path, Artifact], tmp_path: Path, committed: list[Artifact]
) -> None:
    other, _, artifact = travelled
    target = transfer.export(other, artifact, tmp_path / "again")
    third = Store(tmp_path / "third")
    final = adopt(
        third, target, name="z", kind="far", files=["value.txt"], history=read_history(target)
    )
    assert ancestry.verify(third, final) == []
    assert [ancestor.label for ancestor in ancestry.lineage(third, final)] == [
        *(a.label for a in committed),
        artifact.label,
        final.label,
    ]


def change_metric(records: list[Any]) -> None:
    records[0]["metrics"]["score"] = 0.9


def drop_ancestor(records: list[Any]) -> None:
    del records[1]


def change_config(records: list[Any]) -> None:
    records[2]["payload"]["config"]["value"] = 5


@pytest.mark.parametrize("spoil", [change_metric, drop_ancestor, change_config])
def test_a_broken_history_is_refused(
    travelled: tuple[Store, Path, Artifact], spoil: Callable[[list[Any]], None], tmp_path: Path
) -> None:
    _, target, _ = travelled
    records = read_history(target)
    spoil(records)
    store = Store(tmp_path / "new")
    with pytest.raises(StoreError, match="with a history that does not fit"):
        adopt(store, target, files=["value.txt"], history=records)
    assert store.list() == []


def test_files_that_the_history_does_not_vouch_for(
    travelled: tuple[Store, Path, Artifact], tmp_path: Path
) -> None:
    _, target, _ = travelled
    (target / "value.txt").write_text("something else")
    store = Store(tmp_path / "new")
    with pytest.raises(StoreError, match=r"value\.txt is not the one that its history .* vouches"):
        adopt(store, target, files=["value.txt"], history=read_history(target))
    assert store.list() == []


def test_history_files(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    (tmp_path / "history.json").write_text(json.dumps({"format": 2, "records": []}))
    with pytest.raises(StoreError, match="written by a newer posttrain"):
        read_history(tmp_path)
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        read_history(tmp_path)
