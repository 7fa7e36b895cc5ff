"""The store: commits, finding, errors that help, a full disk."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry, atomic
from posttrain.engine import store as store_module
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.record import Artifact, read_record, record_bytes, record_sha256
from posttrain.engine.store import Store
from posttrain.engine.work import Work, write_step

Commit = Callable[..., Artifact]


def begin(store: Store, graph: Graph, name: str) -> Work:
    work = store.begin(graph.fingerprints()[name])
    assert work is not None
    return work


def tree(store: Store) -> dict[str, bytes]:
    """Everything under artifacts/, directories included."""
    root = store.root / "artifacts"
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"directory"
        for path in root.rglob("*")
    }


def test_a_commit_holds_everything(store: Store, chain: Graph, commit: Commit) -> None:
    first = commit(chain, "first", {"value.txt": "1", "deep/er.txt": "xyz"}, loss=0.25)
    second = commit(chain, "second", {"value.txt": "3"})
    fingerprint = chain.fingerprints()["first"]
    assert first.path == store.root / "artifacts" / "add" / f"first-{fingerprint[:12]}"
    assert first.label == f"first-{fingerprint[:12]}"
    assert first.payload == chain.payload("first")
    assert first.metrics == {"loss": 0.25}
    assert {name: entry["bytes"] for name, entry in first.files.items()} == {
        "value.txt": 1,
        "deep/er.txt": 3,
    }
    assert first.bytes == 4
    assert first.file("deep/er.txt").read_text() == "xyz"
    assert second.inputs == {
        "start": {
            "name": "first",
            "kind": "add",
            "fingerprint": fingerprint,
            "record_sha256": record_sha256(first.record),
        }
    }
    assert not (store.root / "work" / fingerprint[:12]).exists()
    assert list((store.root / "work").iterdir()) == []


def test_a_record_is_reproduced_byte_by_byte(committed: list[Artifact]) -> None:
    for artifact in committed:
        content = (artifact.path / "record.json").read_bytes()
        assert record_bytes(json.loads(content)) == content
        assert read_record(artifact.path) == artifact.record


def test_an_unknown_file_lists_the_known(committed: list[Artifact]) -> None:
    with pytest.raises(StoreError, match=r"has no file 'x'; it has value\.txt"):
        committed[0].file("x")


def test_find_and_list(store: Store, chain: Graph, committed: list[Artifact]) -> None:
    for artifact in committed:
        assert store.find(artifact.fingerprint) == artifact
    assert store.find("0" * 64) is None
    assert [artifact.name for artifact in store.list()] == ["first", "second", "third"]


def test_making_a_store_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    assert store.list() == []
    assert store.find("0" * 64) is None
    assert not store.root.exists()


def test_resolve(
    store: Store, committed: list[Artifact], commit: Commit, make_graph: Callable[..., Graph]
) -> None:
    first = committed[0]
    for text in (
        "first",
        first.label,
        first.label[:-5],
        first.fingerprint,
        first.fingerprint[:20],
        first.fingerprint[:6],
    ):
        assert store.resolve(text) == first
    with pytest.raises(StoreError, match=r"did you mean 'first'\? it has: first, second, third"):
        store.resolve("frist")
    with pytest.raises(StoreError, match="no artifact"):
        store.resolve(first.fingerprint[:20] + "0" * 5)
    other = commit(make_graph(Node(name="first", kind="add", config={"value": 9})), "first", {})
    with pytest.raises(StoreError) as caught:
        store.resolve("first")
    message = str(caught.value)
    assert message.startswith("'first' could be 2 artifacts; give one of:")
    assert message.index(first.label) < message.index(other.label)
    assert store.resolve(other.label) == other


def test_a_name_that_is_the_start_of_another_is_not_ambiguous(
    store: Store, commit: Commit, make_graph: Callable[..., Graph]
) -> None:
    short = commit(make_graph(Node(name="sft", kind="add")), "sft", {})
    commit(make_graph(Node(name="sft-long", kind="add", config={"a": 1})), "sft-long", {})
    assert store.resolve("sft") == short


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 2}')
    with pytest.raises(StoreError, match=r"written by a newer posttrain \(format 2; .* up to 1\)"):
        Store(tmp_path)


def test_a_newer_record_is_refused(store: Store, committed: list[Artifact]) -> None:
    path = committed[0].path / "record.json"
    path.write_text(json.dumps({**committed[0].record, "format": 2}))
    with pytest.raises(StoreError, match="written by a newer posttrain"):
        store.find(committed[0].fingerprint)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("[]", "no format number"), ('{"format": "1"}', "no format number")],
)
def test_a_damaged_marker(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        Store(tmp_path)


def test_a_directory_with_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="is not a store"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="is not a directory"):
        Store(tmp_path / "thesis.tex")


def test_a_damaged_record_says_what_to_do(store: Store, committed: list[Artifact]) -> None:
    (committed[0].path / "record.json").write_text("{")
    with pytest.raises(StoreError, match=r"cannot be read .* remove .*run the recipe again"):
        store.find(committed[0].fingerprint)


def test_begin_keeps_out_only_beside_a_step_checkpoint(store: Store, chain: Graph) -> None:
    for checkpoint in (False, True):
        work = begin(store, chain, "first")
        (work.out / "half.txt").write_text("half")
        (work.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
        (work.path / "result.json").write_text("{}")
        if checkpoint:
            write_step(work.path, 2)
        work.release()
        again = begin(store, chain, "first")
        assert (again.out / "half.txt").exists() == checkpoint
        assert not (again.path / "result.json").exists()
        if checkpoint:
            lines = (again.path / "metrics.jsonl").read_text()
            assert lines == '{"step": 1}\n{"step": 2}\n'
        else:
            assert not (again.path / "metrics.jsonl").exists()
        again.release()


def test_a_damaged_step_file_says_what_to_do(store: Store, chain: Graph) -> None:
    work = begin(store, chain, "first")
    (work.path / "step.json").write_text('{"step"')
    work.release()
    with pytest.raises(
        StoreError, match=r"step\.json is not .* remove .* to start that stage anew"
    ):
        store.begin(chain.fingerprints()["first"])


def test_only_one_holds_the_work_of_a_stage(store: Store, chain: Graph) -> None:
    fingerprint = chain.fingerprints()["first"]
    work = begin(store, chain, "first")
    assert store.begin(fingerprint, wait=False) is None
    work.release()
    again = store.begin(fingerprint, wait=False)
    assert again is not None
    again.discard()
    assert list((store.root / "work").iterdir()) == []


def test_who_waited_for_the_work_holds_it_alone(store: Store, chain: Graph) -> None:
    """The lock file goes away with its holder; a lock on the removed file would guard nothing."""
    fingerprint = chain.fingerprints()["first"]
    first = begin(store, chain, "first")
    got: list[Work | None] = []
    waiter = threading.Thread(target=lambda: got.append(store.begin(fingerprint)))
    waiter.start()
    waiter.join(0.3)
    assert got == []
    first.release()
    waiter.join(20)
    [second] = got
    assert second is not None
    assert store.begin(fingerprint, wait=False) is None
    second.release()


def test_metrics_and_diff_join_the_files(store: Store, chain: Graph) -> None:
    work = begin(store, chain, "first")
    (work.path / "metrics.jsonl").write_text('{"step": 1}\n')
    artifact = store.commit(
        chain.nodes["first"], work, inputs={}, metrics={}, provenance={}, diff="--- a\n"
    )
    assert set(artifact.files) == {"metrics.jsonl", "code.diff"}
    assert artifact.file("code.diff").read_text() == "--- a\n"
    assert ancestry.verify(store, artifact) == []


def test_links_are_hashed_through(store: Store, chain: Graph, tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_text("big")
    work = begin(store, chain, "first")
    (work.out / "big.bin").symlink_to(tmp_path / "big.bin")
    artifact = store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    assert artifact.files["big.bin"]["bytes"] == 3
    (tmp_path / "big.bin").write_text("bag")
    assert ancestry.verify(store, artifact) == [
        f"{artifact.label}: file big.bin was changed after it was committed"
    ]


def link_relative(work: Work, tmp_path: Path) -> None:
    (work.out / "a").write_text("a")
    (work.out / "x").symlink_to("a")


def link_broken(work: Work, tmp_path: Path) -> None:
    (work.out / "x").symlink_to(tmp_path / "nowhere")


def link_directory(work: Work, tmp_path: Path) -> None:
    (work.out / "x").symlink_to(tmp_path)


def link_work(work: Work, tmp_path: Path) -> None:
    (work.path / "checkpoint").write_text("a")
    (work.out / "x").symlink_to(work.path / "checkpoint")


def own_record(work: Work, tmp_path: Path) -> None:
    (work.out / "record.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (link_relative, "is a relative link"),
        (link_broken, "is not a file"),
        (link_directory, "is not a file"),
        (link_work, "which does not last"),
        (own_record, "that name belongs to the store"),
    ],
)
def test_output_that_cannot_last_is_refused(
    store: Store, chain: Graph, tmp_path: Path, spoil: Callable[..., None], message: str
) -> None:
    work = begin(store, chain, "first")
    spoil(work, tmp_path)
    with pytest.raises(StoreError, match=message):
        store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    assert store.list() == []
    work.release()


def test_metrics_that_are_no_json_are_refused(store: Store, chain: Graph) -> None:
    work = begin(store, chain, "first")
    with pytest.raises(ConfigError, match=r"record of first\.metrics\.loss: nan is not a finite"):
        store.commit(
            chain.nodes["first"], work, inputs={}, metrics={"loss": float("nan")}, provenance={}
        )
    assert store.list() == []
    work.release()


def test_a_commit_under_another_fingerprint_is_refused(store: Store, chain: Graph) -> None:
    work = begin(store, chain, "second")
    with pytest.raises(StoreError, match="is not that of fingerprint"):
        store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    work.release()


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """A file that takes no byte more."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[:10])
        return int(full())


def fill_record(patch: pytest.MonkeyPatch) -> None:
    """The disk fills while the record is being written: some bytes of it are on the disk."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = real(self, mode, *rest, **options)
        return FullFile(file) if mode == "wb" and "record.json" in self.name else file

    patch.setattr(Path, "open", opened)


def fill_replace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic.os, "replace", full)


def fill_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store_module.os, "rename", full)


def fill_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", full)


def fill_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store_module.shutil, "copyfile", full)


@pytest.mark.parametrize(
    "fill", [fill_record, fill_replace, fill_rename, fill_sync, fill_copy], ids=lambda f: f.__name__
)
def test_a_full_disk_leaves_the_store_as_it_was(
    store: Store, chain: Graph, commit: Commit, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    commit(chain, "first", {"value.txt": "1"})
    before = tree(store)
    second = Graph(
        nodes={**chain.nodes, "second": Node(name="second", kind="new", inputs={"start": "first"})},
        target="second",
    )
    work = begin(store, second, "second")
    (work.out / "value.txt").write_text("2")
    (work.path / "metrics.jsonl").write_text('{"step": 1}\n')
    inputs = {"start": store.resolve("first")}
    with pytest.MonkeyPatch.context() as patch:
        fill(patch)
        with pytest.raises(StoreError, match=r"disk full while committing second: .* free where"):
            store.commit(second.nodes["second"], work, inputs=inputs, metrics={}, provenance={})
    assert tree(store) == before
    assert sorted(path.name for path in work.out.rglob("*")) in (
        ["value.txt"],
        ["metrics.jsonl", "value.txt"],
    )
    # With space again, the same work can be committed.
    artifact = store.commit(second.nodes["second"], work, inputs=inputs, metrics={}, provenance={})
    assert ancestry.verify(store, artifact) == []


def test_a_full_disk_at_the_start(
    store: Store, chain: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(StoreError, match="disk full while making the store"):
        store.begin(chain.fingerprints()["first"])
    assert not store.root.exists()


def test_no_permission_is_a_message(
    store: Store, chain: Graph, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/there")

    monkeypatch.setattr(store_module.os, "rename", denied)
    with pytest.raises(StoreError, match=r"not allowed to write while committing first: /there"):
        commit(chain, "first", {})


def test_an_artifact_is_never_replaced(store: Store, chain: Graph, commit: Commit) -> None:
    artifact = commit(chain, "first", {"value.txt": "1"})
    before = tree(store)
    with pytest.raises(StoreError, match="is there already; artifacts never change"):
        commit(chain, "first", {"value.txt": "other"})
    assert tree(store) == before
    assert ancestry.verify(store, artifact) == []
