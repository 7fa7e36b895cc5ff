"""Records of strangers: the form that each must have before anything reads it."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry, transfer
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import digest
from posttrain.engine.form import MAX_DEPTH, MAX_RECORDS, form_fault, history_fault, is_inside
from posttrain.engine.graph import Node
from posttrain.engine.record import Artifact, record_sha256, seal
from posttrain.engine.store import Store
from posttrain.engine.transfer import read_history


def spoilt(artifact: Artifact, path: str, value: Any) -> dict[str, Any]:
    """A copy of its record with the value at a dotted path replaced, None: taken out."""
    record = copy.deepcopy(dict(artifact.record))
    *parents, last = path.split("/")
    place = record
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return record


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HASH = "a" * 64
ENTRY = {"sha256": HASH, "bytes": 1}
SPOILS: list[tuple[str, Any, str]] = [
    ("name", "../x", "name"),
    ("name", "a\nb", "name"),
    ("kind", "a/b", "kind"),
    ("kind", 3, "kind"),
    ("version", "1", "version"),
    ("fingerprint", "f" * 63, "fingerprint"),
    ("fingerprint", "F" * 64, "fingerprint"),
    ("created", "2026-01-01", "created"),
    ("created", 3, "created"),
    ("digest", None, "digest"),
    ("format", None, "format"),
    ("payload", None, "payload"),
    ("payload/data", [], "payload.data"),
    ("payload/data", {"files": 3}, "payload.data"),
    ("payload/inputs", None, "payload.inputs"),
    ("payload/config", "x", "payload.config"),
    ("inputs", [], "inputs"),
    ("inputs/start/name", "../up", "inputs.start"),
    ("inputs/start/kind", None, "inputs.start"),
    ("inputs/start/fingerprint", "x" * 64, "inputs.start"),
    ("inputs/start/record_sha256", 3, "inputs.start"),
    ("files", [], "files"),
    ("files", {"../up": ENTRY}, "files: '../up' is no name of a file inside its directory"),
    ("files", {"/etc/x": ENTRY}, "files: '/etc/x' is no name of a file inside its directory"),
    ("files", {"a": {"sha256": "x", "bytes": 1}}, "files.a"),
    ("files", {"a": {"sha256": HASH, "bytes": -1}}, "files.a"),
    ("files", {"a": {"sha256": HASH, "bytes": True}}, "files.a"),
    ("files", {"a": ENTRY, "a/b": ENTRY}, "files: a is a file and a directory"),
    ("metrics", 3, "metrics"),
    ("metrics", {"loss": float("inf")}, "deeper than 60 levels, or a number that is not finite"),
    ("metrics", {"x": nested(MAX_DEPTH)}, "deeper than 60 levels, or a number that is not finite"),
    ("metrics", {"x": nested(50_000)}, "deeper than 60 levels, or a number that is not finite"),
    ("provenance/seconds", "long", "provenance.seconds"),
    ("provenance/origin", {"hub": 3}, "provenance.origin"),
    ("provenance/stage", "x", "provenance.stage"),
    ("provenance/git", [3], "provenance.git"),
    ("warnings", [3], "warnings"),
    ("history", "none", "history"),
    ("history", [{}], "history, record 0: format"),
]


@pytest.mark.parametrize(("path", "value", "fault"), SPOILS, ids=range(len(SPOILS)))
def test_what_is_not_as_it_has_to_be(
    committed: list[Artifact], path: str, value: Any, fault: str
) -> None:
    assert form_fault(committed[1].record) == ""
    assert form_fault(spoilt(committed[1], path, value)) == fault


OUTSIDE: list[Any] = ["", ".", "..", "../a", "a/../../b", "/a", "a//b", "a/", "./a", "a\\b"]
OUTSIDE += ["a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 256, "/".join(["x"] * 600), 3, None]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_names_that_leave_their_directory(name: Any) -> None:
    assert not is_inside(name)


def test_names_that_stay() -> None:
    for name in ("a", "a/b.txt", "..a", "a..", ".hidden", "größe é.txt", "a b", "x" * 255):
        assert is_inside(name)


DAMAGED = ["", "[]", "3", "{", '{"format": 1}', '{"format": "1"}', '{"format": NaN}', "\xff"]
DAMAGED += [
    "[" * 100_000,
    f'{{"format": 1, "x": {"[" * 900}{"]" * 900}}}',
    f'{{"format": 1{"0" * 5000}}}',
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_named_and_the_rest_goes_on(
    store: Store, committed: list[Artifact], content: str
) -> None:
    path = committed[0].path / "record.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StoreError, match=r"record\.json"):
        store.load(committed[0].path)
    assert store.list() == committed[1:]
    (fault,) = store.faults()
    assert str(path) in fault
    assert store.resolve("third") == committed[2]
    with pytest.raises(StoreError, match=r"record\.json"):
        store.resolve("first")
    found = ancestry.lineage(store, committed[2])
    assert [(a.label, list(a.missing)) for a in found] == [
        (committed[1].label, ["start"]),
        (committed[2].label, []),
    ]
    assert any(committed[0].label in problem for problem in ancestry.verify(store, committed[2]))


def forge(artifact: Artifact, files: dict[str, Any]) -> None:
    """Other files in its record, its digest made anew, as a stranger can."""
    fields = {k: v for k, v in artifact.record.items() if k not in ("digest", "format")}
    record = seal({**fields, "files": files})
    (artifact.path / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", ["../../../authorized_keys", "/tmp/posttrain-absolute"])
def test_names_of_a_stranger_leave_nothing(
    store: Store, committed: list[Artifact], tmp_path: Path, name: str
) -> None:
    """`export` would have written it outside of the target, and `verify` said ok."""
    (store.root / "authorized_keys").write_text("key")
    entry = dict(committed[2].files["value.txt"])
    forge(committed[2], {name: entry})
    with pytest.raises(StoreError, match="is no name of a file inside its directory"):
        store.load(committed[2].path)
    (fault,) = store.faults()
    assert "is no name of a file inside its directory" in fault
    with pytest.raises(StoreError, match="is no name of a file inside its directory"):
        transfer.export(store, store.resolve("third"), tmp_path / "victim" / "a" / "out")
    assert not (tmp_path / "victim").exists()


def history(directory: Path, records: Any) -> Path:
    (directory / "history.json").write_text(json.dumps({"format": 1, "records": records}))
    return directory


@pytest.mark.parametrize(
    "records",
    [None, "text", 3, [3], [{}], [[]], {"a": 1}],
    ids=str,
)
def test_a_history_without_records(tmp_path: Path, records: Any) -> None:
    with pytest.raises(StoreError, match=r"history\.json is not as posttrain writes it"):
        read_history(history(tmp_path, records))


def test_twenty_thousand_equal_records_are_refused_at_once(
    committed: list[Artifact], tmp_path: Path
) -> None:
    began = time.monotonic()
    records = [dict(committed[0].record)] * 20_000
    assert history_fault(records) == f"20000 records, more than {MAX_RECORDS}"
    assert history_fault(records[:MAX_RECORDS]) == "record 1: first is there twice"
    with pytest.raises(StoreError, match="is there twice"):
        read_history(history(tmp_path, records[:5000]))
    assert time.monotonic() - began < 5


def test_a_reversed_history_is_refused(
    store: Store, committed: list[Artifact], tmp_path: Path
) -> None:
    target = transfer.export(store, committed[2], tmp_path / "out")
    records = read_history(target)
    assert ancestry.history_problems(records) == []
    problems = ancestry.history_problems(records[::-1])
    assert len(problems) == 2
    assert all("is missing from the history before it" in problem for problem in problems)


def linked(artifact: Artifact, number: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """A record that descends from the one before it, like one of `artifact` otherwise."""
    inputs = {}
    if before is not None:
        source = {key: before[key] for key in ("name", "kind", "fingerprint")}
        inputs["start"] = source | {"record_sha256": record_sha256(before)}
    prints = {edge: source["fingerprint"] for edge, source in inputs.items()}
    payload = {"kind": "add", "version": 1, "config": {"n": number}, "data": {}, "inputs": prints}
    fields = {k: v for k, v in artifact.record.items() if k not in ("digest", "format")}
    own = {"payload": payload, "fingerprint": digest(payload), "inputs": inputs}
    return seal({**fields, **own})


def test_a_long_history_takes_linear_time(committed: list[Artifact]) -> None:
    chain: list[dict[str, Any]] = []
    for number in range(1000):
        chain.append(linked(committed[0], number, chain[-1] if chain else None))
    began = time.monotonic()
    assert history_fault(chain) == ""
    assert ancestry.history_problems(chain) == []
    assert time.monotonic() - began < 3


def test_records_that_descend_from_themselves(store: Store, committed: list[Artifact]) -> None:
    """Such records cannot be made, only forged; nothing may go round for ever."""
    first, second, _ = committed
    record = dict(first.record)
    reference = {k: second.record[k] for k in ("name", "kind", "fingerprint")}
    record["inputs"] = {"start": reference | {"record_sha256": HASH}}
    (first.path / "record.json").write_text(json.dumps(record))
    with pytest.raises(StoreError, match="descend from themselves"):
        ancestry.lineage(store, store.resolve("third"))
    with pytest.raises(StoreError, match="descend from themselves"):
        ancestry.gc(store, [], dry_run=True)
    assert ancestry.verify(store, store.resolve("third")) != []


def test_a_record_cannot_be_made_that_cannot_be_read(
    store: Store, make_graph: Callable[..., Any], commit: Callable[..., Artifact]
) -> None:
    graph = make_graph(Node(name="a", kind="add", config={"x": nested(MAX_DEPTH)}))
    with pytest.raises(StoreError, match="has no place in a record"):
        commit(graph, "a", {"value.txt": "1"})
    assert store.list() == []
