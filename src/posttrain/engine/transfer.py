"""Files into and out of a store: what a stage left in out/, files adopted from outside, exports
with their history.

An export is a plain directory plus `history.json`: the record of the artifact and of everything it
descends from. Adopting such a directory elsewhere takes the history along, so a checkpoint can
still be verified far from its first store.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from posttrain.engine.ancestry import history_problems, lineage, vouching_problems
from posttrain.engine.atomic import fsync, guarded, part_of, remove_parts, write_whole
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import digest, file_digest, files_digest
from posttrain.engine.form import MAX_HISTORY_BYTES, history_fault
from posttrain.engine.graph import Node, payload
from posttrain.engine.links import astray, check_links, found_again, renew
from posttrain.engine.parsing import Unreadable, read_json
from posttrain.engine.record import FORMAT, Artifact, Record, check_format, record_problems
from posttrain.engine.store import Store

HISTORY: Final = "history.json"


def adopt(
    store: Store,
    source: Path,
    *,
    name: str,
    kind: str,
    files: Sequence[str],
    link: bool,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    history: Sequence[Record] = (),
    version: int = 1,
    inputs: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Commit `files` below `source` as an artifact, without inputs unless some are given.

    The fingerprint follows the same rule as in a graph, so a graph with a node of the same kind,
    version and `data` (default: the digest of the files) finds it. With `link` the artifact
    holds links to the files where they are, else copies. `history` holds the records that came with
    the files (see `read_history`). An artifact with that fingerprint that is there already is
    returned as it is. Raises StoreError: the history is broken or is not that of these files.
    """
    source = source.absolute()
    problems = history_problems(history)
    if history:
        problems += vouching_problems({n: store.hashes.digest(source / n) for n in files}, history)
    if problems:
        raise StoreError(
            f"cannot adopt {source} with a history that does not fit; adopt it without one, "
            f"or mend this:\n  " + "\n  ".join(problems)
        )
    if data is None:
        data = {"files": files_digest(source, files, store.hashes.digest)}
    given = dict(inputs or {})
    edges = {edge: artifact.name for edge, artifact in given.items()}
    node = Node(name=name, kind=kind, version=version, data=data, inputs=edges)
    fingerprint = digest(payload(node, {edge: one.fingerprint for edge, one in given.items()}))
    # Held as by a run: gc must not take what is adopted while it asks.
    with store.in_use():
        work = store.begin(fingerprint)
        assert work is not None  # begin waits
        try:
            present = store.find(fingerprint)
            if present is not None:
                work.discard()
                lost = astray(present, store.hashes)
                renew(store.root, present, found_again(present, lost, [source], store.hashes))
                return present
            with guarded(store.root, f"adopting {node.name}"):
                _place(source, work.out, files, link=link)
            return store.commit(
                node, work, inputs=given, metrics=metrics, provenance=provenance, history=history
            )
        except BaseException:
            work.discard()
            raise


def _place(source: Path, out: Path, files: Sequence[str], *, link: bool) -> None:
    for name in files:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if link:
            target.symlink_to(source / name)
        else:
            shutil.copyfile(source / name, target)


def export(store: Store, artifact: Artifact, target: Path) -> Path:
    """Copy the files of `artifact` to the new directory `target`, see `exporting`."""
    with exporting(store, artifact, target):
        pass
    return target.absolute()


@contextmanager
def exporting(store: Store, artifact: Artifact, target: Path) -> Iterator[Path]:
    """Copy the files of `artifact` to the new directory `target` (links become files), with
    `history.json`. Yields the copy, not in its place yet, for who adds to it or changes it.

    The directory appears at the end, whole or not at all. Raises StoreError: `target` is not empty,
    a file or the record is not what was committed, an ancestor is missing from the store, or the
    disk is full.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} exists and is not an empty directory; export to a new one")
    # Held as by a run: gc must not take what is being copied.
    with store.locked(fcntl.LOCK_SH):
        history = _history_of(store, artifact)
        check_links(store.root, artifact, store.hashes)
        part = part_of(target)
        try:
            with guarded(target.parent, f"exporting {artifact.label}"):
                # What an export that was killed has left beside it.
                remove_parts(target.parent, target.name)
                part.mkdir(parents=True)
                for name, entry in artifact.files.items():
                    _copy_checked(artifact, name, str(entry["sha256"]), part / name)
                content = json.dumps(history, indent=1, sort_keys=True)
                write_whole(part / HISTORY, content.encode("ascii"))
                yield part
                for path in (part, *part.rglob("*")):
                    fsync(path)
                # It replaces an empty directory as well.
                os.rename(part, target)
                fsync(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _history_of(store: Store, artifact: Artifact) -> dict[str, Any]:
    """What `history.json` of an export holds. Raises StoreError where an ancestor is missing, or
    the record of the artifact was changed."""
    ancestors = lineage(store, artifact)
    missing = [f"{edge} of {a.label}" for a in ancestors for edge in a.missing]
    if missing:
        raise StoreError(
            f"cannot export {artifact.label}: the store lacks {', '.join(missing)}, or cannot "
            "read it"
        )
    problems = record_problems(artifact.record)
    if problems:
        raise StoreError(f"cannot export {problems[0]}; `posttrain verify` says more")
    return {"format": FORMAT, "records": [dict(a.record) for a in ancestors]}


def _copy_checked(artifact: Artifact, name: str, sha256: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = artifact.path / name
    if not source.is_file():
        raise StoreError(f"{artifact.label}: {name} is missing from {artifact.path}")
    try:
        shutil.copyfile(source, target)
    except PermissionError as error:
        if error.filename == str(source):
            raise StoreError(
                f"{artifact.label}: {name} may not be read ({source}); ask its owner, or "
                "`chmod a+r` it"
            ) from error
        raise
    # The copy, not the source: what was read and what was written are checked at once.
    if file_digest(target) != sha256:
        raise StoreError(
            f"{artifact.label}: {name} differs from its record; `posttrain verify` says more"
        )


def read_history(directory: Path) -> list[Record]:
    """The records in the `history.json` of an export, ancestors first, its own last; [] without
    that file.

    Raises StoreError when it is damaged or of a newer format.
    """
    path = directory / HISTORY
    try:
        content = read_json(path, MAX_HISTORY_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, Unreadable) as error:
        raise StoreError(
            f"{path} is damaged ({error}); remove it to adopt without a history"
        ) from error
    check_format(content, path)
    fault = history_fault(content.get("records"))
    if fault:
        raise StoreError(
            f"{path} is not as posttrain writes it ({fault}); remove it to adopt without a history"
        )
    return list(content["records"])
