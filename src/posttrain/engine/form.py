"""The form of a record: what is checked before anything else reads one.

Records come from strangers: a copied store, the `history.json` of a checkpoint from the net, a file
that somebody edited. What has passed `form_fault` can be read without looking again: fields are
there and of their types, names stay inside their directory, nothing is deeper or longer than
limits that no honest record comes near. Whether contents are true is another question
(`record.record_problems`).
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias

from posttrain.engine.graph import is_stage_name

MAX_DEPTH: Final = 60
"""Levels of objects and lists in each other."""
MAX_RECORD_BYTES: Final = 100_000_000
MAX_HISTORY_BYTES: Final = 400_000_000
MAX_RECORDS: Final = 10_000
MAX_FILES: Final = 100_000
_MAX_TEXT: Final = 1000
"""Characters of a label or a file's name."""
_HEX: Final = re.compile(r"[0-9a-f]{64}")

Check: TypeAlias = Callable[[Any], bool]


def form_fault(record: Any) -> str:
    """What is not as it has to be in a record, by name; "" where all is. Contents are not looked
    at, see `record_problems`."""
    if not isinstance(record, dict):
        return "no object"
    if not _is_bounded(record):
        return f"deeper than {MAX_DEPTH} levels, or a number that is not finite"
    return _record_fault(record)


def history_fault(records: Any) -> str:
    """The same for a list of records, ancestors first; none of them may be there twice."""
    if not isinstance(records, list):
        return "records"
    if len(records) > MAX_RECORDS:
        return f"{len(records)} records, more than {MAX_RECORDS}"
    seen = set()
    for number, record in enumerate(records):
        fault = form_fault(record)
        if fault:
            return f"record {number}: {fault}"
        if record["fingerprint"] in seen:
            return f"record {number}: {record['name']} is there twice"
        seen.add(record["fingerprint"])
    return ""


def is_inside(name: Any) -> bool:
    """Whether a text names a file below a directory, in one way: relative, no "..", no ".", no
    empty part, nothing that a terminal or another system takes for something else."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_TEXT
        and "\\" not in name
        and all(part not in ("", ".", "..") and len(part) <= 255 for part in name.split("/"))
        and not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name)
        and _is_unicode(name)
    )


def _record_fault(record: Mapping[str, Any]) -> str:
    for name, good in _FIELDS.items():
        if name not in record or not good(record[name]):
            return name
    if not _all_texts(record.get("warnings", [])):
        return "warnings"
    for name, good in _PAYLOAD.items():
        if name not in record["payload"] or not good(record["payload"][name]):
            return f"payload.{name}"
    for edge, source in record["inputs"].items():
        if not _is_text(edge) or not _is_reference(source):
            return f"inputs.{edge[:80]}"
    for name, entry in record["files"].items():
        if not is_inside(name):
            return f"files: {name[:80]!r} is no name of a file inside its directory"
        if not _is_file(entry):
            return f"files.{name}"
    parts = [name.split("/") for name in record["files"]]
    folders = {"/".join(part[:end]) for part in parts for end in range(1, len(part))}
    both = folders & record["files"].keys()
    if both:
        return f"files: {min(both)} is a file and a directory"
    for name, good in _PROVENANCE.items():
        if name in record["provenance"] and not good(record["provenance"][name]):
            return f"provenance.{name}"
    fault = history_fault(record["history"])
    return f"history, {fault}" if fault else ""


def _is_bounded(value: Any) -> bool:
    """Level by level, so that no depth is too much for it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += one.values()
            elif isinstance(one, list):
                deeper += one
            elif isinstance(one, float) and not math.isfinite(one):
                return False
        if not deeper:
            return True
        level = deeper
    return False


def _is_unicode(text: str) -> bool:
    """Half a character, which JSON can write, can be neither printed nor a file's name."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def is_hash(value: Any) -> bool:
    """Whether it is a sha256 in 64 hex digits."""
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_reference(source: Any) -> bool:
    return (
        isinstance(source, dict)
        and is_stage_name(source.get("name"))
        and is_stage_name(source.get("kind"))
        and is_hash(source.get("fingerprint"))
        and is_hash(source.get("record_sha256"))
    )


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict) and is_hash(entry.get("sha256")) and _is_count(entry.get("bytes"))
    )


def _is_object_of_files(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_FILES


def is_object_of_texts(value: Any) -> bool:
    """Whether it is an object whose values are all texts."""
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_object_of_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_any_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: Final[Mapping[str, Check]] = {
    "format": _is_count,
    "name": is_stage_name,
    "kind": is_stage_name,
    "version": _is_count,
    "fingerprint": is_hash,
    "created": _is_date,
    "payload": _is_object,
    "config": _is_object,
    "inputs": _is_object,
    "files": _is_object_of_files,
    "metrics": _is_object,
    "provenance": _is_object,
    "history": _is_list,
    "digest": is_hash,
}
"""What every record has."""
_PAYLOAD: Final[Mapping[str, Check]] = {
    "kind": is_stage_name,
    "version": _is_count,
    "config": _is_object,
    "data": is_object_of_texts,
    "inputs": is_object_of_texts,
}
_PROVENANCE: Final[Mapping[str, Check]] = {
    "seconds": _is_number,
    "source": _is_any_text,
    "origin": is_object_of_texts,
    "stage": is_object_of_texts,
    "packages": is_object_of_texts,
    "texts": _is_object_of_objects,
    "git": _is_list_of_objects,
}
"""Facts that somebody reads by name; each may be absent."""
