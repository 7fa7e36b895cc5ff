"""The store: a directory of committed artifacts and of work in progress.

    store.json                                  {"format": 1}; also the lock between runs and gc
    hashes.json                                 hashes of large files from outside (hashes.py)
    names.json                                  what later runs call artifacts (names.py)
    cache/                                      what was found in tables from outside, by content
    trackers/                                   what other tools were told of runs; theirs
    artifacts/<kind>/<name>-<fp[:12]>/          record.json and files; committed, never changed
    work/<fp[:12]>/                             out/ being filled, step checkpoints, log.txt, ...
    work/<fp[:12]>.lock                         held by whoever works on it

A commit is one `os.rename` of a complete, synced directory. A process killed at any moment leaves
either nothing or a whole artifact in `artifacts/`; its work directory stays and is picked up by the
next run.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import (
    ONE_FILE_SYSTEM,
    fsync,
    guarded,
    remove_parts,
    write_whole,
)
from posttrain.engine.errors import StoreError, choices_text
from posttrain.engine.fingerprint import digest, file_digest, plain
from posttrain.engine.form import form_fault
from posttrain.engine.graph import Node, payload
from posttrain.engine.hashes import HASHES, FileHashes
from posttrain.engine.names import NAMES, Names
from posttrain.engine.record import (
    FORMAT,
    RECORD,
    SHORT,
    Artifact,
    Record,
    check_format,
    label_of,
    read_record,
    record_bytes,
    seal,
)
from posttrain.engine.work import CODE_DIFF, METRICS, Work, open_work, read_warnings

CACHE = "cache"
"""The directory with what can be had again at the cost of some time."""
ARTIFACTS = "artifacts"
"""The directory of what was committed."""
_COMMITTED = re.compile(rf".+-[0-9a-f]{{{SHORT}}}")


class Store:
    """A store at `root`. Making one writes nothing; the directory appears with the first work
    begun.

    Raises StoreError when `root` is a directory with other things in it, or of a newer format.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.hashes = FileHashes(self.root / HASHES)
        self.names = Names(self.root / NAMES)
        self._check()

    @property
    def cache(self) -> Path | None:
        """Where what can be had again is remembered; None before the store is there."""
        return self.root / CACHE if (self.root / "store.json").is_file() else None

    # -- reading ---------------------------------------------------------------------------------

    def find(self, fingerprint: str) -> Artifact | None:
        """The artifact with this fingerprint, or None. Lists directories, reads one record, hashes
        nothing.

        Raises StoreError when the record in the directory of that fingerprint is damaged.
        """
        path = self.index().get(fingerprint[:SHORT])
        return None if path is None else self.load(path, fingerprint)

    def index(self) -> dict[str, Path]:
        """First 12 hex digits of a fingerprint -> committed directory, for everything in the
        store."""
        return {path.name[-SHORT:]: path for path in self._directories()}

    def load(self, path: Path, fingerprint: str | None = None) -> Artifact:
        """The artifact in a committed directory. Raises StoreError when its record is damaged."""
        record = read_record(path)
        expected = path.name[-SHORT:] if fingerprint is None else fingerprint
        if not record["fingerprint"].startswith(expected):
            raise StoreError(
                f"{path / RECORD} has fingerprint {record['fingerprint'][:SHORT]}, its directory "
                f"{expected[:SHORT]}. It was changed after it was committed; remove the "
                f"directory and run the recipe again to make it anew"
            )
        return Artifact(path=path, record=record)

    def list(self) -> list[Artifact]:
        """All artifacts that can be read, oldest first; `faults` tells of the others."""
        found, _ = _load_each(self, self._directories())
        return sorted(found, key=lambda artifact: (artifact.created, artifact.label))

    def faults(self) -> Sequence[str]:
        """What in `artifacts/` is no artifact or a damaged one, in words, each with its path."""
        _, damaged = _load_each(self, self._directories())
        return [*self._strays(), *map(str, damaged)]

    def named(self, kind: str, name: str) -> Sequence[Artifact]:
        """The artifacts of that kind and name that can be read, oldest first. Reads only their
        records."""
        paths = [path for path in self._directories(kind) if path.name[: -SHORT - 1] == name]
        found, _ = _load_each(self, paths)
        return sorted(found, key=lambda artifact: artifact.created)

    def resolve(self, text: str) -> Artifact:
        """The one artifact meant by a name, by the start of `name-fingerprint`, or of a fingerprint
        (4 digits or more), or by the path of its directory.

        A name is what the newest run calls it, or else one that it had before.

        Raises StoreError: nothing fits (nearest names), or more than one does (the choices).
        """
        directory = Path(text).absolute()
        if directory.parent.parent == self.root / ARTIFACTS:
            text = directory.name
        paths = {path.name: path for path in self._directories()}
        names = {label: self.names.all_of(label[-SHORT:], label[: -SHORT - 1]) for label in paths}
        by_name = [label for label in paths if names[label][-1] == text]
        by_name = by_name or [label for label in paths if text in names[label]]
        # Longer than the name, or the start of any name would do.
        by_label = [
            label
            for label in paths
            for name in names[label]
            if f"{name}-{label[-SHORT:]}".startswith(text) and len(text) > len(name)
        ]
        by_fingerprint = [
            label for label in paths if len(text) >= 4 and label[-SHORT:].startswith(text[:SHORT])
        ]
        meant = [paths[label] for label in by_name or by_label or by_fingerprint]
        found, damaged = _load_each(self, meant)
        if damaged and not found:
            raise damaged[0]
        if not by_name and not by_label:
            # Beyond the digits in the label the record has to agree.
            found = [artifact for artifact in found if artifact.fingerprint.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            found.sort(key=lambda artifact: artifact.created)
            shown = map(self.names.current, found)
            choices = "\n".join(f"  {a.label}  ({a.kind}, {a.created[:16]})" for a in shown)
            raise StoreError(f"{text!r} could be {len(found)} artifacts; give one of:\n{choices}")
        known = choices_text(text, [n[-1] for n in names.values()], label="it has")
        raise StoreError(f"no artifact {text!r} in {self.root}; {known}")

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the store against gc while a run uses it; any number of runs may."""
        self._create()
        self._check_places()
        with self.locked(fcntl.LOCK_SH):
            for directory in (self.root, self.root / CACHE):
                remove_parts(directory)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the store while nothing else uses it. Raises StoreError while a run does."""
        try:
            with self.locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                remove_parts(self.root)
                yield
        except BlockingIOError:
            raise StoreError(
                f"a run is using {self.root}; wait until it ends or stop it, then run gc again"
            ) from None

    def used(self) -> bool:
        """Whether a run is using it now."""
        try:
            with self.locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False

    @contextmanager
    def locked(self, how: int) -> Iterator[None]:
        """Hold the lock between runs and gc. Raises BlockingIOError where that is asked for."""
        handle = os.open(self.root / "store.json", os.O_RDONLY)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def work_path(self, fingerprint: str) -> Path:
        """Where work on a fingerprint happens, whether or not there is any yet."""
        return self.root / "work" / fingerprint[:SHORT]

    def begin(self, fingerprint: str, *, wait: bool = True) -> Work | None:
        """Take the work directory of a fingerprint, so that no other process works on it.

        When somebody else has it: waits, or returns None if `wait` is False. Look with `find`
        afterwards: the other one may have finished. Without a step checkpoint (step.json) what an
        earlier attempt left in out/ is cleared away. Raises StoreError for a full disk.
        """
        with guarded(self.root, "starting work"):
            self._create()
            self._check_places()
            return open_work(self.work_path(fingerprint), wait=wait)

    def commit(
        self,
        node: Node,
        work: Work,
        *,
        inputs: Mapping[str, Artifact],
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
        diff: str = "",
        history: Sequence[Record] = (),
    ) -> Artifact:
        """Make what is in `work.out` an artifact, remove the work directory, release it.

        Hashes the files (through links), adds metrics.jsonl and code.diff (`diff`, when not empty),
        writes the record last, syncs everything, renames once. Raises StoreError when the disk is
        full, the output is not plain files, or the artifact is there already; the store is then as
        it was, and `work` still held.
        """
        body = payload(node, {edge: source.fingerprint for edge, source in inputs.items()})
        fingerprint = digest(body)
        if work.path != self.work_path(fingerprint):
            raise StoreError(
                f"{node.name}: the work directory {work.path} is not that of fingerprint "
                f"{fingerprint[:SHORT]}; begin the work with the fingerprint of the same graph"
            )
        with guarded(self.root, f"committing {node.name}"):
            _add_reports(work, diff)
            warnings = read_warnings(work.path)
            record = seal(
                {
                    "name": node.name,
                    "kind": node.kind,
                    "version": node.version,
                    "fingerprint": fingerprint,
                    "payload": body,
                    "config": plain(node.config, at=f"stage {node.name}: config"),
                    "inputs": {edge: _reference(source) for edge, source in inputs.items()},
                    "files": _describe_files(work.out, self.root / "work", self.hashes.digest),
                    "metrics": metrics,
                    "provenance": provenance,
                    "history": history,
                    "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                    **({"warnings": warnings} if warnings else {}),
                }
            )
            fault = form_fault(record)
            if fault:
                raise StoreError(
                    f"{node.name}: what the stage made has no place in a record ({fault})"
                )
            target = self.root / ARTIFACTS / node.kind / label_of(record)
            _move_into_place(work, record, target)
        work.discard()
        return Artifact(path=target, record=record)

    # -- inside ----------------------------------------------------------------------------------

    def _directories(self, kind: str | None = None) -> Iterator[Path]:
        """Committed directories, all or those of one kind."""
        for folder in self._kinds():
            if kind in (None, folder.name):
                with suppress(StoreError):  # `faults` tells of a folder that may not be read
                    yield from filter(_is_committed, _entries(folder))

    def _strays(self) -> Iterator[str]:
        """What lies where only artifacts belong. Hidden files are the system's own."""
        for folder in _entries(self.root / ARTIFACTS):
            if not folder.is_dir():
                yield f"{folder} is no artifact; move it out of the store"
                continue
            try:
                found = _entries(folder)
            except StoreError as error:
                yield str(error)
                continue
            strays = [path for path in found if not _is_committed(path)]
            yield from (f"{path} is no artifact; move it out of the store" for path in strays)

    def _kinds(self) -> Sequence[Path]:
        return [path for path in _entries(self.root / ARTIFACTS) if path.is_dir()]

    def _check(self) -> None:
        marker = self.root / "store.json"
        try:
            content = marker.read_bytes()
        except FileNotFoundError:
            # Another process may be writing the marker now, or have done so since the look above.
            others = [p for p in self.root.glob("*") if not p.name.startswith(".store.json.")]
            if others and not marker.exists():
                raise StoreError(
                    f"{self.root} is not a store (no store.json) and not empty; name an empty "
                    f"or new directory"
                ) from None
            return
        except NotADirectoryError:
            raise StoreError(f"{self.root} is not a directory; name an empty or new one") from None
        except OSError as error:
            raise StoreError(
                f"{marker} cannot be read ({error.strerror}); check its owner, or name another "
                "store directory"
            ) from None
        try:
            check_format(json.loads(content), marker)
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f'{marker} is damaged ({error}); write {{"format": 1}} into it'
            ) from error

    def _create(self) -> None:
        marker = self.root / "store.json"
        if not marker.exists():
            with guarded(self.root, "making the store"):
                self.root.mkdir(parents=True, exist_ok=True)
                write_whole(marker, json.dumps({"format": FORMAT}).encode("ascii") + b"\n")
            # What was hashed before there was a store to keep it.
            self.hashes.write()

    def _check_places(self) -> None:
        """Refuse before any work what a commit, which is a rename, could not do at its end."""
        work, artifacts = self.root / "work", self.root / ARTIFACTS
        # What is not there yet will be made in the root.
        device = os.stat(work if work.exists() else self.root).st_dev
        for path in (artifacts if artifacts.exists() else self.root, *self._kinds()):
            if os.stat(path).st_dev != device:
                raise StoreError(f"{path} is on another file system than {work}; {ONE_FILE_SYSTEM}")


def _load_each(store: Store, paths: Iterable[Path]) -> tuple[list[Artifact], list[StoreError]]:
    """Those artifacts that can be read, and why the others cannot."""
    found: list[Artifact] = []
    damaged: list[StoreError] = []
    for path in paths:
        try:
            found.append(store.load(path))
        except StoreError as error:
            damaged.append(error)
    return found, damaged


def _is_committed(path: Path) -> bool:
    return _COMMITTED.fullmatch(path.name) is not None and path.is_dir()


def _entries(directory: Path) -> list[Path]:
    """What is in a directory of the store, hidden files left out; nothing where it is not made yet.

    Raises StoreError for a file in its place, a link to nowhere (a disk that is not mounted must
    not pass for an empty store) and a directory that may not be read.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        if directory.is_symlink():
            raise StoreError(
                f"{directory} links to {os.readlink(directory)}, which is not there; mount it, or "
                "remove the link"
            ) from None
        return []
    except OSError as error:
        raise StoreError(
            f"{directory} is no directory that can be read ({error.strerror}); the store needs one "
            "there"
        ) from None
    return [directory / name for name in sorted(names) if not name.startswith(".")]


# -- the steps of a commit: describe what a stage left in out/, write the record, rename -----------


def _describe_files(
    out: Path, forbidden: Path, hash_linked: Callable[[Path], str]
) -> dict[str, dict[str, Any]]:
    """Relative name -> {"sha256", "bytes"} for every file below `out`, links followed.

    What a link points at is hashed by `hash_linked`; files that the stage wrote are always read.
    Raises StoreError for a link to a directory, a broken or relative link, or one into `forbidden`
    (work in progress goes away after the commit).
    """
    found = {}
    for path in sorted(out.rglob("*")):
        linked = path.is_symlink()
        if path.is_dir() and not linked:
            continue
        if linked:
            _check_link(path, forbidden)
        found[path.relative_to(out).as_posix()] = {
            "sha256": hash_linked(path) if linked else file_digest(path),
            "bytes": path.stat().st_size,
        }
    return found


def _check_link(path: Path, forbidden: Path) -> None:
    aim = path.readlink()
    if not aim.is_absolute():
        raise StoreError(
            f"{path} is a relative link and would break when it is moved; link to {path.resolve()}"
        )
    if not path.is_file():
        raise StoreError(
            f"{path} links to {aim}, which is not a file; link single files that exist"
        )
    if aim.is_relative_to(forbidden) or path.resolve().is_relative_to(forbidden.resolve()):
        raise StoreError(
            f"{path} links into {forbidden}, which does not last; move or copy the file"
        )


def _reference(source: Artifact) -> dict[str, str]:
    """What a record says about one input, the link of the hash chain included."""
    return {
        "name": source.name,
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "record_sha256": file_digest(source.path / RECORD),
    }


def _add_reports(work: Work, diff: str) -> None:
    """Put metrics.jsonl and code.diff beside the files of the stage. Raises StoreError for a
    record.json of its own."""
    if (work.out / RECORD).exists():
        raise StoreError(
            f"the stage wrote {RECORD} into its output; that name belongs to the store"
        )
    if (work.path / METRICS).exists():
        shutil.copyfile(work.path / METRICS, work.out / METRICS)
    if diff:
        (work.out / CODE_DIFF).write_text(diff, encoding="utf-8")


def _move_into_place(work: Work, record: Record, target: Path) -> None:
    """Write the record and rename; on an error nothing of it stays."""
    new_kind = not target.parent.exists()
    try:
        # As the umask has it: some libraries write files that only their owner may read.
        readable = work.out.stat().st_mode & 0o666
        for path in [work.out / name for name in record["files"]]:
            # The target of a link is not ours, and was on the disk before.
            if not path.is_symlink():
                if path.stat().st_nlink == 1:
                    path.chmod(readable)
                fsync(path)
        for folder in [path for path in work.out.rglob("*") if path.is_dir()]:
            fsync(folder)
        # After the files that it describes are on the disk.
        write_whole(work.out / RECORD, record_bytes(record))
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work.out, target)
    except BaseException as error:
        # Else a second commit would take it for a file of the stage.
        (work.out / RECORD).unlink(missing_ok=True)
        if new_kind:
            with suppress(OSError):  # another run may have used it in the meantime
                target.parent.rmdir()
        there = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
        if isinstance(error, OSError) and error.errno in there and target.exists():
            raise StoreError(f"{target} is there already; artifacts never change") from error
        raise
    # A rename is on the disk when the directory that it changed is.
    fsync(target.parent)
    if new_kind:
        fsync(target.parent.parent)
