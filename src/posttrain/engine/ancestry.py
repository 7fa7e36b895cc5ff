"""What an artifact descends from: lineage, verification of the hash chain, garbage collection."""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

from posttrain.engine.atomic import guarded
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.inputs import file_problems
from posttrain.engine.record import (
    RECORD,
    SHORT,
    Artifact,
    Record,
    Recorded,
    label_of,
    record_problems,
    record_sha256,
)
from posttrain.engine.store import Store
from posttrain.engine.work import take_lock

ADOPTED: Final = "adopted from"
"""Edge from an adopted artifact to the last record of the history that came with it."""
_TRASH: Final = ".trash"
"""What the name of a directory ends with that is being removed."""


@dataclass(frozen=True, kw_only=True)
class Ancestor(Recorded):
    """One step of a lineage."""

    artifact: Artifact | None
    """None when only the record is known: it came with an adopted history."""
    edges: Mapping[str, str]
    """Edge label -> label (`name-fingerprint[:12]`) of what it descends from directly."""
    missing: Sequence[str] = ()
    """Edges whose source is neither in the store, with a record that can be read, nor in a
    history."""


def lineage(store: Store, artifact: Artifact) -> list[Ancestor]:
    """Everything `artifact` descends from in topological order, ancestors first, itself last.

    Raises StoreError where records say that one descends from itself.
    """
    index = store.index()
    loaded: dict[str, Artifact] = {}
    found: dict[str, Ancestor] = {}
    begun: dict[str, Artifact] = {}
    stack: list[tuple[Artifact, bool]] = [(artifact, False)]
    while stack:
        current, expanded = stack.pop()
        if current.fingerprint in found:
            continue
        if not expanded and current.fingerprint in begun:
            raise StoreError(_circle([*begun.values(), current]))
        sources = {}
        for edge, source in current.inputs.items():
            fingerprint = source["fingerprint"]
            if fingerprint not in loaded and fingerprint[:SHORT] in index:
                with suppress(StoreError):  # a damaged one is missing
                    loaded[fingerprint] = store.load(index[fingerprint[:SHORT]], fingerprint)
            if fingerprint in loaded:
                sources[edge] = loaded[fingerprint]
        # Each is on the stack twice: first to put its sources above it, then to follow them.
        if not expanded:
            begun[current.fingerprint] = current
            stack.append((current, True))
            stack += [(source, False) for source in reversed(sources.values())]
            continue
        del begun[current.fingerprint]
        edges = {edge: label_of(source) for edge, source in current.inputs.items()}
        if current.history:
            found |= _from_history(current.history, known=found)
            edges[ADOPTED] = label_of(current.history[-1])
        found[current.fingerprint] = Ancestor(
            record=current.record,
            artifact=current,
            edges=edges,
            missing=[edge for edge in current.inputs if edge not in sources],
        )
    return list(found.values())


def renamed(store: Store, ancestors: Sequence[Ancestor]) -> list[Ancestor]:
    """A lineage to be shown: with the names that the newest run has for its artifacts."""
    found = []
    for ancestor in ancestors:
        shown = store.names.current(ancestor)
        edges = {edge: label_of(source) for edge, source in shown.inputs.items()}
        if ADOPTED in ancestor.edges:
            edges[ADOPTED] = label_of(shown.history[-1])
        artifact = shown.artifact and store.names.current(shown.artifact)
        found.append(replace(shown, artifact=artifact, edges=edges))
    return found


def _from_history(history: Sequence[Record], *, known: Mapping[str, Any]) -> dict[str, Ancestor]:
    found: dict[str, Ancestor] = {}
    for record in history:
        if record["fingerprint"] in known or record["fingerprint"] in found:
            continue
        edges = {edge: label_of(source) for edge, source in record["inputs"].items()}
        if record["history"]:
            edges[ADOPTED] = label_of(record["history"][-1])
        found[record["fingerprint"]] = Ancestor(record=record, artifact=None, edges=edges)
    return found


def verify(
    store: Store, artifact: Artifact, checked: dict[str, Artifact] | None = None
) -> list[str]:
    """Problems along the whole ancestry of `artifact`; [] when it is sound.

    Recomputes the hash of every file and record and the fingerprint of every payload, follows the
    hash chain to the records of the inputs, and checks a history that came with adopted files in
    the same way. What is in `checked` (fingerprint -> artifact) is not looked at again; what was
    looked at is added to it.
    """
    index = store.index()
    problems: list[str] = []
    checked = {} if checked is None else checked
    frontier = [artifact]
    while frontier:
        current = frontier.pop()
        if current.fingerprint in checked:
            continue
        checked[current.fingerprint] = current
        problems += record_problems(current.record) + list(_file_problems(current))
        problems += history_problems(current.history)
        hashes = {name: entry["sha256"] for name, entry in current.files.items()}
        found = vouching_problems(hashes, current.history)
        problems += [f"{current.label}: {problem}" for problem in found]
        for edge, source in current.inputs.items():
            path = index.get(source["fingerprint"][:SHORT])
            where = f"{current.label}: input {edge} ({label_of(source)})"
            if path is None:
                problems.append(f"{where} is missing from the store")
            elif not (path / RECORD).is_file():
                problems.append(f"{where}: {path / RECORD} is missing")
            else:
                try:
                    # Before the record is read: another one may stand in its place.
                    if file_digest(path / RECORD) != source["record_sha256"]:
                        problems.append(f"{where}: its record is not the one this was made from")
                    frontier.append(store.load(path, source["fingerprint"]))
                except (StoreError, OSError) as error:
                    problems.append(f"{where}: {error}")
    return problems


def _file_problems(artifact: Artifact) -> Iterator[str]:
    yield from file_problems(artifact.path, artifact.record, file_digest)
    present = {
        Path(folder, name).relative_to(artifact.path).as_posix()
        for folder, _, names in os.walk(artifact.path)
        for name in names
    }
    for name in sorted(present - artifact.files.keys() - {RECORD}):
        yield f"{artifact.label}: file {name} is not in its record"


def history_problems(history: Sequence[Record]) -> list[str]:
    """What is wrong with records that came with adopted files: each on its own, and the chain
    between them."""
    problems = []
    hashes: dict[str, str] = {}
    for record in history:
        problems += record_problems(record)
        for edge, source in record["inputs"].items():
            known = hashes.get(source["fingerprint"])
            where = f"{label_of(record)} (history): input {edge} ({label_of(source)})"
            if known is None:
                problems.append(f"{where} is missing from the history before it")
            elif known != source["record_sha256"]:
                problems.append(f"{where}: its record is not the one this was made from")
        hashes[record["fingerprint"]] = record_sha256(record)
    return problems


def vouching_problems(hashes: Mapping[str, str], history: Sequence[Record]) -> list[str]:
    """Adopted files (name -> sha256) that are not the ones the last record of their history is
    about."""
    if not history:
        return []
    origin = history[-1]
    return [
        f"file {name} is not the one that its history ({label_of(origin)}) vouches for"
        for name, found in hashes.items()
        if found != origin["files"].get(name, {"sha256": found})["sha256"]
    ]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Something `gc` removed, or would remove in a dry run."""

    label: str
    path: Path
    bytes: int


def gc(
    store: Store,
    keep: Collection[str],
    *,
    dry_run: bool = False,
    listed: Collection[Path] | None = None,
) -> list[Removed]:
    """Remove artifacts whose fingerprint is not in `keep` and which no kept artifact descends from.

    Work in progress of a fingerprint outside `keep`, or left behind after a commit, goes as well.
    With `listed`, only what is in it: paths that somebody has seen and agreed to. Descendants go
    before their ancestors, so being killed half-way leaves no artifact without its ancestors.

    The caller holds the store (`Store.alone`) from before it found out what to keep, or what is
    made in between is taken for unneeded. A dry run needs no lock.
    """
    if not (store.root / "store.json").exists():
        return []
    with guarded(store.root, "removing what is not needed"):
        removed = [
            item
            for item in _unkept(store, keep) + _stale_work(store, keep)
            if listed is None or item.path in listed
        ]
        if not dry_run:
            for item in removed:
                _remove(store, item.path)
            store.names.keep(store.index().keys())
    return removed


def _remove(store: Store, path: Path) -> None:
    # One rename first: a directory that is half gone is never seen under artifacts/.
    if path.name.endswith(_TRASH):
        _delete(path)
        return
    trash = store.root / "work" / f"{path.name}{_TRASH}"
    trash.parent.mkdir(exist_ok=True)
    # What a gc that was killed left of the same, which was made again since.
    _delete(trash)
    os.rename(path, trash)
    _delete(trash)


def _delete(trash: Path) -> None:
    if trash.is_symlink():
        trash.unlink()
    elif trash.exists():
        shutil.rmtree(trash)


def _unkept(store: Store, keep: Collection[str]) -> list[Removed]:
    artifacts = {artifact.fingerprint: artifact for artifact in store.list()}
    needed: set[str] = set()
    named = _named_by_damaged(store, artifacts)
    frontier = [fingerprint for fingerprint in (*keep, *named) if fingerprint in artifacts]
    while frontier:
        fingerprint = frontier.pop()
        if fingerprint in needed or fingerprint not in artifacts:
            continue
        needed.add(fingerprint)
        frontier += [source["fingerprint"] for source in artifacts[fingerprint].inputs.values()]
    sources = {
        fingerprint: [source["fingerprint"] for source in artifact.inputs.values()]
        for fingerprint, artifact in artifacts.items()
    }
    try:
        every = list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        raise StoreError(_circle(artifacts[name] for name in error.args[1])) from None
    order = [name for name in every if name in artifacts]
    unkept = [artifacts[name] for name in reversed(order) if name not in needed]
    return [
        Removed(label=artifact.label, path=artifact.path, bytes=_own_bytes(artifact.path))
        for artifact in unkept
    ]


def _circle(artifacts: Iterable[Artifact]) -> str:
    names = " -> ".join(artifact.label for artifact in artifacts)
    return f"artifacts descend from themselves: {names}; their records were forged, remove them"


def _named_by_damaged(store: Store, artifacts: Mapping[str, Artifact]) -> set[str]:
    """What records that cannot be read still name: it is no time to remove what they need."""
    loaded = {artifact.path for artifact in artifacts.values()}
    found: set[str] = set()
    for path in store.index().values():
        if path not in loaded:
            with suppress(OSError):
                found |= set(re.findall(r"[0-9a-f]{64}", (path / RECORD).read_text("latin-1")))
    return found


def _stale_work(store: Store, keep: Collection[str]) -> list[Removed]:
    kept = {fingerprint[:SHORT] for fingerprint in keep} - store.index().keys()
    found = []
    for path in sorted((store.root / "work").glob("*")):
        if path.is_dir() and path.name not in kept:
            lock = take_lock(path, wait=False)
            if lock is not None:
                found.append(Removed(label=f"work/{path.name}", path=path, bytes=_own_bytes(path)))
                path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
                os.close(lock)
    return found


def _own_bytes(path: Path) -> int:
    """Bytes that removing a directory frees: links count as nothing."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(0 if file.is_symlink() else file.stat().st_size for file in files)
