"""The steps of a commit: describe what a stage left in out/, write the record, rename the directory
into the store."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import fsync, write_whole
from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.record import RECORD, Artifact, Record, record_bytes
from posttrain.engine.work import CODE_DIFF, METRICS, Work


def describe_files(
    out: Path, forbidden: Path, hash_linked: Callable[[Path], str]
) -> dict[str, dict[str, Any]]:
    """Relative name -> {"sha256", "bytes"} for every file below `out`, links followed.

    What a link points at is hashed by `hash_linked`; files that the stage wrote are always read.
    Raises StoreError for a link to a directory, a broken or relative link, or one into `forbidden`
    (work in progress goes away after the commit).
    """
    found = {}
    for path in _walk(out):
        linked = path.is_symlink()
        if linked:
            _check_link(path, forbidden)
        found[path.relative_to(out).as_posix()] = {
            "sha256": hash_linked(path) if linked else file_digest(path),
            "bytes": path.stat().st_size,
        }
    return found


def _walk(directory: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


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


def reference(source: Artifact) -> dict[str, str]:
    """What a record says about one input, the link of the hash chain included."""
    return {
        "name": source.name,
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "record_sha256": file_digest(source.path / RECORD),
    }


def add_reports(work: Work, diff: str) -> None:
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


def move_into_place(work: Work, record: Record, target: Path) -> None:
    """Write the record and rename; on an error nothing of it stays."""
    new_kind = not target.parent.exists()
    try:
        for path in [work.out / name for name in record["files"]]:
            if not path.is_symlink():
                fsync(path)
        write_whole(work.out / RECORD, record_bytes(record))
        fsync(work.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work.out, target)
    except BaseException as error:
        (work.out / RECORD).unlink(missing_ok=True)
        if new_kind:
            with suppress(OSError):  # another run may have used it in the meantime
                target.parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise StoreError(f"{target} is there already; artifacts never change") from error
        raise
    fsync(target.parent)
