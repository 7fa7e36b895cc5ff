"""The store on real systems: modes, strays, other file systems, what kills leave behind."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import StoreError
from posttrain.engine.graph import Graph
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.unfinished import Unfinished
from posttrain.engine.work import Work, write_step


def begin(store: Store, graph: Graph, name: str) -> Work:
    work = store.begin(graph.fingerprints()[name])
    assert work is not None
    return work


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_committed_files_are_as_readable_as_the_umask_says(
    store: Store, chain: Graph, umask: int
) -> None:
    """Weights are written by a library that lets only their owner read them."""
    before = os.umask(umask)
    try:
        work = begin(store, chain, "first")
        (work.out / "deep").mkdir()
        for name in ("weights", "deep/weights"):
            (work.out / name).write_text("w")
            (work.out / name).chmod(0o600)
        made = store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in made.path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_the_file_behind_a_link_keeps_its_mode(store: Store, chain: Graph, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.write_text("x")
    target.chmod(0o600)
    work = begin(store, chain, "first")
    (work.out / "link").symlink_to(target)
    store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    assert target.stat().st_mode & 0o777 == 0o600


def test_strays_are_named_and_nothing_else_minds(store: Store, committed: list[Artifact]) -> None:
    artifacts = store.root / "artifacts"
    for hidden in (artifacts / ".DS_Store", artifacts / "add" / ".nfs0000"):
        hidden.write_text("x")
    assert store.faults() == []
    (artifacts / "notes.txt").write_text("x")
    (artifacts / "broken").symlink_to("/nowhere")
    (artifacts / "add" / "notes.txt").write_text("x")
    (artifacts / "add" / "backup").mkdir()
    (artifacts / "add" / f"x-{'a' * 12}").symlink_to("/nowhere")
    (artifacts / "add" / f"empty-{'b' * 12}").mkdir()
    assert store.list() == committed
    assert store.resolve("third") == committed[2]
    assert store.find(committed[0].fingerprint) == committed[0]
    *strays, damaged = store.faults()
    assert damaged.startswith(str(artifacts / "add" / f"empty-{'b' * 12}" / "record.json"))
    assert sorted(strays) == sorted(
        f"{path} is no artifact; move it out of the store"
        for path in (
            artifacts / "notes.txt",
            artifacts / "broken",
            artifacts / "add" / "notes.txt",
            artifacts / "add" / "backup",
            artifacts / "add" / f"x-{'a' * 12}",
        )
    )


def test_a_file_in_the_place_of_artifacts(store: Store, chain: Graph) -> None:
    with store.in_use():
        pass
    (store.root / "artifacts").write_text("x")
    for look in (store.list, store.index, lambda: store.begin("a" * 64)):
        with pytest.raises(StoreError, match="artifacts is no directory that can be read"):
            look()


def test_a_link_to_a_disk_that_is_not_there_is_no_empty_store(store: Store) -> None:
    with store.in_use():
        pass
    (store.root / "artifacts").symlink_to("/nowhere/at/all")
    with pytest.raises(StoreError, match="links to /nowhere/at/all, which is not there; mount it"):
        store.list()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
@pytest.mark.parametrize("part", ["artifacts", "work", "artifacts/add"])
def test_a_store_on_two_file_systems_is_refused_before_any_work(
    store: Store, chain: Graph, part: str
) -> None:
    with store.in_use():
        pass
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm"))
    if elsewhere.stat().st_dev == store.root.stat().st_dev:
        elsewhere.rmdir()
        pytest.skip("one file system")
    try:
        (store.root / part).parent.mkdir(exist_ok=True)
        (store.root / part).symlink_to(elsewhere)
        for use in (lambda: store.in_use().__enter__(), lambda: store.begin("a" * 64)):
            with pytest.raises(StoreError, match=r"is on another file system than .* one rename"):
                use()
        assert list(elsewhere.iterdir()) == []
        # Reading goes on.
        assert store.list() == []
    finally:
        shutil.rmtree(elsewhere)


def test_what_the_dead_left_in_a_store_goes(store: Store, chain: Graph) -> None:
    with store.in_use():
        pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = [store.root / f".{name}.{dead.pid}.tmp" for name in ("store.json", "hashes.json")]
    alive = store.root / f".names.json.{os.getpid()}.tmp"
    for path in (*left, alive):
        path.write_text("half")
    with store.in_use():
        pass
    assert [path.exists() for path in (*left, alive)] == [False, False, True]
    left[0].write_text("half")
    with store.alone():
        pass
    assert not left[0].exists()


@pytest.mark.parametrize("step", [None, 3])
def test_a_record_half_written_by_the_dead_is_no_file_of_the_artifact(
    store: Store, chain: Graph, step: int | None
) -> None:
    work = begin(store, chain, "first")
    if step is not None:
        write_step(work.path, step)
    (work.out / "deep").mkdir()
    for name in (".record.json.9099.tmp", "deep/.config.json.9099.tmp"):
        (work.out / name).write_text("half")
    work.release()
    work = begin(store, chain, "first")
    (work.out / "value.txt").write_text("1")
    made = store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    assert set(made.files) == {"value.txt"}
    assert sorted(path.name for path in made.path.rglob("*") if path.is_file()) == [
        "record.json",
        "value.txt",
    ]


def test_releasing_twice_closes_nothing_of_others(store: Store, chain: Graph) -> None:
    """An interrupt may come after a commit and before the runner has noted it."""
    work = begin(store, chain, "first")
    (work.out / "value.txt").write_text("1")
    store.commit(chain.nodes["first"], work, inputs={}, metrics={}, provenance={})
    other = os.open(os.devnull, os.O_RDONLY)  # gets the number that the lock had
    work.release()
    work.discard()
    assert os.fstat(other).st_rdev == os.stat(os.devnull).st_rdev
    os.close(other)


@pytest.mark.parametrize("damage", [{"metrics": "x"}, {"directory": 3}, {"tokens": "many"}])
def test_a_step_checkpoint_of_another_form_is_told(tmp_path: Path, damage: dict[str, Any]) -> None:
    stage = {"name": "a", "kind": "k", "fingerprint": "0" * 64}
    (tmp_path / "step.json").write_text(json.dumps({"step": 3} | damage))
    found = Unfinished(path=tmp_path, stage=stage, step=3)
    with pytest.raises(StoreError, match=rf"step\.json has .* as its {next(iter(damage))}"):
        found.checkpoint()
