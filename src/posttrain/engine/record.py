"""The one record file of an artifact, and the artifact as people handle it.

`record.json` is written in one deterministic text, so its sha256 can be recomputed from the parsed
object. Every record holds the sha256 of the records of its inputs: a hash chain over the whole
ancestry. `digest` covers the record itself, so that an edit of the last record of a chain shows as
well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from posttrain.engine.errors import StoreError
from posttrain.engine.fingerprint import digest, plain
from posttrain.engine.form import MAX_RECORD_BYTES, form_fault
from posttrain.engine.parsing import Unreadable, read_json

FORMAT: Final = 1
"""Format of the store and its records."""
RECORD: Final = "record.json"
SHORT: Final = 12
"""How many hex digits of a fingerprint stand in directory names."""

Record: TypeAlias = dict[str, Any]
"""A parsed record: format, name, kind, version, fingerprint, payload, config, inputs, files,
metrics, provenance, history, created (UTC, ISO 8601), digest; warnings where there are some."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Something that has a record, and the fields of its record."""

    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the stage that made it."""
        return str(self.record["name"])

    @property
    def kind(self) -> str:
        """Kind of that stage."""
        return str(self.record["kind"])

    @property
    def fingerprint(self) -> str:
        """Its identity: sha256 of the payload, 64 hex digits."""
        return str(self.record["fingerprint"])

    @property
    def label(self) -> str:
        """`name-fingerprint[:12]`: how people point at exactly this artifact."""
        return label_of(self.record)

    @property
    def payload(self) -> Mapping[str, Any]:
        """What the fingerprint is the digest of: kind, version, config (without the settings that
        are at their default), data, inputs."""
        payload: Mapping[str, Any] = self.record["payload"]
        return payload

    @property
    def config(self) -> Mapping[str, Any]:
        """All its settings, those at their default included."""
        config: Mapping[str, Any] = self.record["config"]
        return config

    @property
    def inputs(self) -> Mapping[str, Mapping[str, str]]:
        """Edge label -> {"name", "kind", "fingerprint", "record_sha256"}."""
        inputs: Mapping[str, Mapping[str, str]] = self.record["inputs"]
        return inputs

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Relative name -> {"sha256", "bytes"}."""
        files: Mapping[str, Mapping[str, Any]] = self.record["files"]
        return files

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Summary numbers the stage returned; None for one that was not finite."""
        metrics: Mapping[str, Any] = self.record["metrics"]
        return metrics

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Facts about the run that made it (see `provenance.capture`), with seconds, threads,
        resumed_at_step."""
        provenance: Mapping[str, Any] = self.record["provenance"]
        return provenance

    @property
    def warnings(self) -> Sequence[str]:
        """What the stage had to tell the user, one sentence each."""
        warnings: Sequence[str] = self.record.get("warnings", [])
        return warnings

    @property
    def history(self) -> Sequence[Record]:
        """Records of ancestors that came along when outside files were adopted, ancestors first."""
        history: Sequence[Record] = self.record["history"]
        return history

    @property
    def created(self) -> str:
        """When it was committed: UTC, ISO 8601."""
        return str(self.record["created"])

    @property
    def bytes(self) -> int:
        """Size of its files, the targets of links included."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Artifact(Recorded):
    """A committed result: a directory with files and its record. It never changes."""

    path: Path

    def file(self, name: str) -> Path:
        """Path of one of its files. Raises StoreError, listing the files, when there is no such
        one."""
        if name not in self.files:
            raise StoreError(
                f"{self.label} has no file {name!r}; it has {', '.join(self.files) or 'none'}"
            )
        return self.path / name

    def content(self, name: str) -> bytes:
        """What one of its files holds, checked against its record: for small files that people are
        shown. Raises StoreError where it is gone or was changed."""
        path = self.file(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(_changed(path, f"cannot be read ({error.strerror})")) from error
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise StoreError(_changed(path, "is not what was made"))
        return content


def label_of(record: Mapping[str, Any]) -> str:
    """`name-fingerprint[:12]` of a record."""
    return f"{record['name']}-{record['fingerprint'][:SHORT]}"


def seal(fields: Mapping[str, Any]) -> Record:
    """A record from all fields but `format` and `digest`. Raises ConfigError for a value that is
    not JSON data."""
    record: Record = plain({**fields, "format": FORMAT}, at=f"record of {fields['name']}")
    return {**record, "digest": _own_digest(record)}


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """The one text of a record."""
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode("ascii") + b"\n"


def record_sha256(record: Mapping[str, Any]) -> str:
    """sha256 of the bytes of the record file of `record`."""
    return hashlib.sha256(record_bytes(record)).hexdigest()


def read_record(directory: Path) -> Record:
    """The record in a committed directory. Raises StoreError when it is missing, damaged, of a
    newer format, or has not the form of one."""
    path = directory / RECORD
    try:
        record = read_json(path, MAX_RECORD_BYTES)
    except PermissionError as error:
        raise StoreError(
            f"{path} may not be read ({error.strerror}); ask its owner to make it readable"
        ) from error
    except (OSError, Unreadable) as error:
        raise StoreError(_changed(path, f"cannot be read ({error})")) from error
    check_format(record, path)
    fault = form_fault(record)
    if fault:
        raise StoreError(_changed(path, f"is not as posttrain writes it ({fault})"))
    return dict(record)


def _changed(path: Path, what: str) -> str:
    return (
        f"{path} {what}. It was changed after it was committed; remove {path.parent} and run the "
        "recipe again to make it anew"
    )


def check_format(content: Any, path: Path) -> None:
    """Raise StoreError unless parsed JSON `content` of file `path` has a format that this version
    reads."""
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int):
        raise StoreError(
            f"{path} has no format number; it was not written by posttrain, or was damaged"
        )
    if found > FORMAT:
        raise StoreError(
            f"{path} was written by a newer posttrain (format {found}; this version reads up to "
            f"{FORMAT}); upgrade posttrain, or use another store directory"
        )


def record_problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a record on its own: an edited field, a payload that does not give the
    fingerprint."""
    problems = []
    if digest(record["payload"]) != record["fingerprint"]:
        problems.append(
            f"{label_of(record)}: the payload in its record does not give its fingerprint"
        )
    if _own_digest(record) != record.get("digest"):
        problems.append(f"{label_of(record)}: its record was changed after it was committed")
    for field in ("kind", "version"):
        if record["payload"][field] != record[field]:
            problems.append(
                f"{label_of(record)}: the {field} in its record is not that of its payload"
            )
    named = {edge: source["fingerprint"] for edge, source in record["inputs"].items()}
    if named != record["payload"]["inputs"]:
        problems.append(
            f"{label_of(record)}: the inputs in its record are not those of its payload"
        )
    return problems


def _own_digest(record: Mapping[str, Any]) -> str:
    return digest({key: value for key, value in record.items() if key != "digest"})
