"""Remembered hashes: what is read again, what is never remembered, and a damaged memory."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.engine import ancestry, hashes, transfer
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.graph import Graph, Node
from posttrain.engine.hashes import FileHashes
from posttrain.engine.store import Store

LONG_AGO = 1_700_000_000


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were hashed, in order."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(hashes, "file_digest", counted)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is an hour ahead, so that files made just now have long been left alone. (A test
    can set the time of a change of content into the past, but not that of the inode.)"""
    now = time.time_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + 3_600_000_000_000)


def big(path: Path, letter: bytes = b"a") -> Path:
    path.write_bytes(letter * hashes.REMEMBERED_BYTES)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def test_a_file_is_read_once_by_all_processes(
    tmp_path: Path, read: list[str], settled: None
) -> None:
    file, memory = big(tmp_path / "data.bin"), tmp_path / "hashes.json"
    ours, theirs = FileHashes(memory), FileHashes(memory)
    assert ours.digest(file) == theirs.digest(file) == FileHashes(memory).digest(file)
    assert ours.digest(file) == file_digest(file)
    assert read == ["data.bin"]


def test_a_link_is_the_file_that_it_points_at(
    tmp_path: Path, read: list[str], settled: None
) -> None:
    file, link = big(tmp_path / "data.bin"), tmp_path / "link"
    link.symlink_to(file)
    known = FileHashes(tmp_path / "hashes.json")
    assert known.digest(link) == known.digest(file)
    assert read == ["data.bin"]
    link.unlink()
    link.symlink_to(big(tmp_path / "other.bin", b"b"))
    assert known.digest(link) == file_digest(tmp_path / "other.bin")


def test_every_change_that_the_file_system_shows_counts(
    tmp_path: Path, read: list[str], settled: None
) -> None:
    """Other bytes of the same size and the same modification time: the time of the inode, which
    nobody can set, tells them apart. A file moved into the place has another inode."""
    file = big(tmp_path / "data.bin")
    known = FileHashes(tmp_path / "hashes.json")
    first = known.digest(file)
    big(file, b"b")
    assert os.stat(file).st_mtime == LONG_AGO
    assert known.digest(file) == file_digest(file) != first
    os.replace(big(tmp_path / "new.bin", b"c"), file)
    assert known.digest(file) == file_digest(file)
    assert len(read) == 3


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    """It could change again within the same tick of the clock; its times would not show that."""
    file, memory = big(tmp_path / "data.bin"), tmp_path / "hashes.json"
    known = FileHashes(memory)
    assert known.digest(file) == known.digest(file)
    assert read == ["data.bin"] * 2
    assert not memory.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: None
) -> None:
    file, memory = big(tmp_path / "data.bin"), tmp_path / "hashes.json"

    def changing(path: Path) -> str:
        found = file_digest(path)
        big(path, b"b")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "file_digest", changing)
        FileHashes(memory).digest(file)
    assert not memory.exists()
    assert FileHashes(memory).digest(file) == file_digest(file)


def test_small_files_are_read_every_time(tmp_path: Path, read: list[str], settled: None) -> None:
    (tmp_path / "small.txt").write_text("a")
    known = FileHashes(tmp_path / "hashes.json")
    assert known.digest(tmp_path / "small.txt") == known.digest(tmp_path / "small.txt")
    assert len(read) == 2
    assert not (tmp_path / "hashes.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: '{"format": 1, "files": 3}',
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace("[", "").replace("]", ""),
    ],
    ids=["empty", "cut", "list", "no files", "newer", "no lists"],
)
def test_a_damaged_memory_counts_as_empty_and_is_written_anew(
    tmp_path: Path, read: list[str], settled: None, damage: Callable[[str], str]
) -> None:
    file, memory = big(tmp_path / "data.bin"), tmp_path / "hashes.json"
    FileHashes(memory).digest(file)
    whole = memory.read_text()
    memory.write_text(damage(whole))
    assert FileHashes(memory).digest(file) == file_digest(file)
    assert read == ["data.bin"] * 2
    assert memory.read_text() == whole


def test_what_others_wrote_stays_and_files_that_are_gone_leave(
    tmp_path: Path, settled: None
) -> None:
    memory = tmp_path / "hashes.json"
    ours, theirs = FileHashes(memory), FileHashes(memory)
    ours.digest(big(tmp_path / "one"))
    theirs.digest(big(tmp_path / "two"))
    assert set(json.loads(memory.read_text())["files"]) == {
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    }
    (tmp_path / "one").unlink()
    theirs.digest(big(tmp_path / "three"))
    assert set(json.loads(memory.read_text())["files"]) == {
        str(tmp_path / "two"),
        str(tmp_path / "three"),
    }


def test_a_memory_that_cannot_be_written_costs_a_hash_and_no_more(
    tmp_path: Path, read: list[str], settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashes, "write_whole", full)
    file = big(tmp_path / "data.bin")
    for _ in range(2):
        assert FileHashes(tmp_path / "hashes.json").digest(file) == file_digest(file)
    assert read == ["data.bin"] * 2


def test_a_store_writes_it_with_the_first_work_and_links_are_not_read_again(
    store: Store, tmp_path: Path, read: list[str], settled: None
) -> None:
    """A plan makes no directory; what it hashed is kept as soon as there is one, and serves the
    commit of an artifact that links the file."""
    file = big(tmp_path / "data.bin")
    node = Node(name="mine", kind="outside", data={"files": store.hashes.digest(file)})
    assert not store.root.exists()
    work = store.begin(Graph(nodes={"mine": node}, target="mine").fingerprints()["mine"])
    assert work is not None
    assert (store.root / "hashes.json").exists()
    (work.out / "data.bin").symlink_to(file)
    artifact = store.commit(node, work, inputs={}, metrics={}, provenance={})
    assert artifact.files["data.bin"]["sha256"] == file_digest(file)
    assert read == ["data.bin"]


def test_verify_reads_the_bytes_whatever_is_remembered(
    store: Store, tmp_path: Path, settled: None
) -> None:
    file = big(tmp_path / "data.bin")
    artifact = transfer.adopt(store, 
        tmp_path, name="mine", kind="outside", files=["data.bin"], link=True, metrics={},
        provenance={},
    )  # fmt: skip
    assert ancestry.verify(store, artifact) == []
    big(file, b"b")
    # What somebody would write who wants the change not to be seen.
    memory = store.root / "hashes.json"
    content = json.loads(memory.read_text())
    state = os.stat(file)
    content["files"][str(file)][:5] = [
        state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns,
    ]  # fmt: skip
    memory.write_text(json.dumps(content))
    assert Store(store.root).hashes.digest(file) == artifact.files["data.bin"]["sha256"]
    [problem] = ancestry.verify(Store(store.root), artifact)
    assert "data.bin was changed after it was committed" in problem
