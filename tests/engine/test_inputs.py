"""A stage reads what its inputs' records say, or does not start."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import transfer
from posttrain.engine.errors import StageError, StoreError
from posttrain.engine.graph import Graph
from posttrain.engine.inputs import check_inputs
from posttrain.engine.record import Artifact
from posttrain.engine.runner import Event, run
from posttrain.engine.store import Store


def change_file(artifact: Artifact) -> None:
    (artifact.path / "value.txt").write_text("7")


def same_size(artifact: Artifact) -> None:
    """One bit, the size and the time of change as before."""
    path = artifact.path / "value.txt"
    found = path.stat()
    path.write_text(path.read_text().replace("1", "2"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def remove_file(artifact: Artifact) -> None:
    (artifact.path / "value.txt").unlink()


def edit(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact.path / "record.json"
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def edit_metric(artifact: Artifact) -> None:
    edit(artifact, lambda record: record["metrics"].update(value=9.0))


def edit_name(artifact: Artifact) -> None:
    edit(artifact, lambda record: record.update(name="other"))


def edit_payload(artifact: Artifact) -> None:
    edit(artifact, lambda record: record["payload"]["config"].update(value=8))


def write_anew(artifact: Artifact) -> None:
    path = artifact.path / "record.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())))


CHANGES: list[tuple[Callable[[Artifact], None], str]] = [
    (change_file, "{label}: file value.txt was changed after it was committed"),
    (same_size, "{label}: file value.txt was changed after it was committed"),
    (remove_file, "{label}: file value.txt is missing"),
    (edit_metric, "{label}: its record was changed after it was committed"),
    (edit_name, "its record was changed after it was committed"),
    (edit_payload, "{label}: the payload in its record does not give its fingerprint"),
    (write_anew, "{label}: record.json was written anew by something else"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda c: getattr(c, "__name__", ""))
def test_an_altered_input_is_refused_by_name(
    store: Store,
    chain: Graph,
    run_all: Callable[..., list[Event]],
    toys: str,
    change: Callable[[Artifact], None],
    message: str,
) -> None:
    run_all(Graph(nodes=chain.nodes, target="first"))
    first = store.resolve("first")
    change(first)
    with pytest.raises(StageError) as refused:
        run_all(chain)
    said = str(refused.value)
    assert "stage second failed: input start: " in said
    assert message.format(label=first.label) in said
    assert f"Remove {first.path} and run again" in said
    assert "Traceback" not in said
    assert refused.value.exit_code == 2
    assert store.index().keys() == {first.fingerprint[:12]}
    # As it says: removed and made again, the chain is whole.
    for path in first.path.iterdir():
        path.unlink()
    first.path.rmdir()
    assert [event.name for event in run_all(chain) if event.kind == "finished"] == list(
        chain.order()
    )


def test_an_export_of_an_edited_record_is_refused(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    edit_metric(committed[2])
    with pytest.raises(StoreError, match="its record was changed after it was committed"):
        transfer.export(store, store.resolve("third"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_file_is_read_again_only_where_it_changed(
    store: Store, chain: Graph, commit: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = commit(chain, "first", {"value.txt": "x" * 2_000_000, "small.txt": "y"})
    hashes = store.root / "hashes.json"
    monkeypatch.setattr("posttrain.engine.hashes.SETTLED_NS", -1_000_000_000)
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        import hashlib

        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("posttrain.engine.hashes.file_digest", counted)
    check_inputs({"start": str(first.path)}, hashes)
    assert sorted(read) == ["record.json", "small.txt", "value.txt"]
    read.clear()
    check_inputs({"start": str(first.path)}, hashes)
    assert sorted(read) == ["record.json", "small.txt"]
    (first.path / "value.txt").write_text("z" * 2_000_000)
    with pytest.raises(StoreError, match=r"input start: .* file value\.txt was changed"):
        check_inputs({"start": str(first.path)}, hashes)


def test_inputs_are_whole_while_they_are_looked_at(
    store: Store, chain: Graph, committed: list[Artifact], toys: str
) -> None:
    check_inputs({"a": str(committed[0].path), "b": str(committed[1].path)}, store.root / "h")
    assert [event.kind for event in run(chain, store, execute=toys)] == ["cached"] * 3
