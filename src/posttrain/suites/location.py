"""Where a user's table lies, and what identifies it.

    algebra.jsonl   .json   .csv   .tsv   each with .gz   .parquet   .arrow   .feather
    folder of datasets' save_to_disk   folder#split   hub:owner/name[:config]@commit#split

Identity is the sha256 of a local file's bytes; for the Hub it is the reference itself, which
therefore has to name a commit.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.engine.hashes import HashFile
from posttrain.engine.parsing import Unreadable, parse_json_file

_HUB = re.compile(
    r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[^#]*))?(?:#(?P<split>.*))?"
)
_HUB_SPELLING = "hub:owner/name[:config]@commit#split"
CHANGED = (
    "changed since the plan was made, so its rows are not the ones that the artifact's identity "
    "names; run the command again"
)
"""What is said of a file whose bytes are others now."""

TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
"""Kinds that are text, which may be compressed by gzip."""
KINDS = (*TEXT_KINDS, "parquet", "arrow", "feather")
"""Kinds of files, which are also their endings."""
_FORMS = (
    "a .jsonl, .json, .csv or .tsv file (each may end in .gz), a .parquet, .arrow or .feather "
    f"file, a folder written by datasets' save_to_disk, or {_HUB_SPELLING!r}"
)


@dataclass(frozen=True, kw_only=True)
class Location:
    """One table; make it with `parse_location`."""

    text: str
    """As the user wrote it, with an absolute path for a local table."""
    kind: str
    """One of `KINDS`, or folder or hub."""
    gz: bool = False
    """Whether the file is compressed by gzip."""
    path: Path | None = None
    """The file, or the folder that holds state.json; None for the Hub."""
    repo: str = ""
    config: str | None = None
    revision: str = ""
    split: str = ""

    def digest(self, hash_file: HashFile = file_digest) -> str:
        """sha256 of the file; for a folder, of the sha256 of its data files in reading order.

        Raises:
            ConfigError: the table lies on the Hub, where the reference is the identity.
        """
        if self.path is None:
            raise ConfigError(f"{self.text}: a Hub table has no local bytes")
        if self.kind == "folder":
            return digest([hash_file(file) for file in self.arrow_files()])
        return hash_file(self.path)

    def arrow_files(self) -> list[Path]:
        """Data files of a `save_to_disk` folder, in the order in which its rows are read."""
        assert self.path is not None and self.kind == "folder", self
        state = _read_object(self.path / "state.json", self.text)
        files = state.get("_data_files")
        items = files if isinstance(files, list) else []
        found = [item.get("filename") for item in items if isinstance(item, dict)]
        names = [name for name in found if isinstance(name, str)]
        if not names or len(names) < len(items):
            raise ConfigError(
                f"folder {self.text}: its state.json names no data files; write it again with "
                "datasets' save_to_disk"
            )
        missing = next((name for name in names if not (self.path / name).is_file()), None)
        if missing is not None:
            raise ConfigError(
                f"folder {self.text}: the data file {missing!r} that its state.json names is not "
                "there; write the folder again with datasets' save_to_disk"
            )
        return [self.path / name for name in names]


def _read_object(path: Path, folder: str) -> dict[str, Any]:
    """One of the small files of a `save_to_disk` folder."""
    try:
        return parse_json_file(path)
    except (OSError, Unreadable) as error:
        raise ConfigError(f"folder {folder}: {path.name} cannot be read ({error})") from error


def parse_location(text: str, base_dir: Path, *, where: str) -> Location:
    """Reads a location; relative paths are relative to `base_dir`.

    Raises:
        ConfigError: the file does not exist, has another ending, is an unreadable folder, or a Hub
            reference without a commit or split.
    """
    if text.startswith("hub:"):
        return _parse_hub(text, where)
    path = (base_dir / text).absolute()
    folder, mark, split = str(path).rpartition("#")
    if mark and os.path.isdir(folder):
        return _parse_folder(Path(folder), split, where)
    # Unlike Path.is_dir, false also for a name that the system does not take.
    if os.path.isdir(path):
        return _parse_folder(path, "", where)
    kind, gz = _kind(path)
    if kind is None:
        raise ConfigError(f"{where}: {text!r} is not a table that can be read; give {_FORMS}")
    if not os.path.isfile(path):
        _check_link(path, where)
        beside = [file.name for file in path.parent.glob("*") if _kind(file)[0]]
        raise ConfigError(
            f"{where}: file {path} does not exist; "
            f"{choices_text(path.name, beside, label='tables in that directory')}"
        )
    if path.stat().st_size == 0:
        raise ConfigError(f"{where}: file {path} is empty; it needs at least one row per split")
    _check_readable(path, where)
    return Location(text=str(path), kind=kind, gz=gz, path=path)


def _check_link(path: Path, where: str) -> None:
    """Say of what stands there and is no file what it is."""
    if os.path.islink(path):
        raise ConfigError(f"{where}: {path} is a link to {os.readlink(path)}, which is not there")
    if os.path.exists(path):
        raise ConfigError(f"{where}: {path} is no file but a pipe or a device; write it to a file")


def _check_readable(path: Path, where: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{where}: {path} cannot be read: {error.strerror}") from None


def _kind(path: Path) -> tuple[str | None, bool]:
    """The kind of a file by its ending, None where it is none; and whether it is compressed."""
    gz = path.suffix == ".gz"
    kind = (path.with_suffix("") if gz else path).suffix.removeprefix(".")
    return (kind if kind in (TEXT_KINDS if gz else KINDS) else None), gz


def _parse_hub(text: str, where: str) -> Location:
    match = _HUB.fullmatch(text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} has to be written {_HUB_SPELLING!r}")
    revision, split = match["revision"] or "", match["split"] or ""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        given = f"the revision {revision!r} can move" if revision else "the revision is missing"
        raise ConfigError(
            f"{where}: {text!r}: {given}. A table's identity has to be fixed, or the same recipe "
            "would silently train on other rows tomorrow: give the 40-digit commit that stands "
            f"under 'Files and versions' on the dataset's page, as in {_HUB_SPELLING!r}"
        )
    if not split:
        raise ConfigError(f"{where}: {text!r} names no split; write {_HUB_SPELLING!r}")
    return Location(
        text=text,
        kind="hub",
        repo=match["repo"],
        config=match["config"],
        revision=revision,
        split=split,
    )


def _parse_folder(path: Path, split: str, where: str) -> Location:
    splits_file = path / "dataset_dict.json"
    if splits_file.is_file():
        splits = _read_object(splits_file, str(path)).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise ConfigError(f"{where}: folder {path}: its dataset_dict.json names no splits")
        if split not in splits:
            problem = f"has no split {split!r}" if split else "holds several splits; name one"
            example = f"{path.name}#{splits[0]}" if splits else path.name
            raise ConfigError(
                f"{where}: folder {path} {problem}, as in {example!r}; "
                f"{choices_text(split, splits, label='splits')}"
            )
        if not os.path.isfile(path / split / "state.json"):
            raise ConfigError(f"{where}: folder {path} has no state.json for its split {split!r}")
        return Location(text=f"{path}#{split}", kind="folder", path=path / split, split=split)
    if split:
        raise ConfigError(f"{where}: folder {path} holds one table and no split {split!r}")
    if not (path / "state.json").is_file():
        raise ConfigError(
            f"{where}: folder {path} was not written by datasets' save_to_disk (no state.json); "
            f"name a file in it: {_FORMS}"
        )
    return Location(text=str(path), kind="folder", path=path)
