"""Whether what a stage is about to read is what its inputs' records say.

A record holds the hash of the records that it was made from, so it vouches for their bytes: a stage
that read others would make a chain that is sound and false. A large file whose size and times are
those at which it was hashed last is not read again (`hashes.py`).
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.engine.errors import StoreError
from posttrain.engine.hashes import FileHashes, HashFile
from posttrain.engine.record import (
    RECORD,
    label_of,
    read_record,
    record_problems,
    record_sha256,
)


def check_inputs(inputs: Mapping[str, str], hashes: Path) -> None:
    """Raise StoreError, by name, for an input (edge -> directory of an artifact) that is not what
    its record says. `hashes` is the file of the store that remembers hashes."""
    memory = FileHashes(hashes)
    for edge, place in inputs.items():
        for problem in input_problems(Path(place), memory.digest):
            raise StoreError(
                f"input {edge}: {problem}; `posttrain verify` tells what else was changed. Remove "
                f"{place} and run again to make it anew"
            )


def input_problems(directory: Path, hash_file: HashFile) -> Iterator[str]:
    """What is not as it was made in the artifact in a directory, the worst first."""
    record = read_record(directory)
    yield from record_problems(record)
    if record_sha256(record) != hash_file(directory / RECORD):
        yield f"{label_of(record)}: {RECORD} was written anew by something else"
    yield from file_problems(directory, record, hash_file)


def file_problems(directory: Path, record: Mapping[str, Any], hash_file: HashFile) -> Iterator[str]:
    """Files of a record that are missing from a directory, cannot be read, or have other bytes."""
    label = label_of(record)
    for name, entry in record["files"].items():
        path = directory / name
        try:
            if not path.is_file():
                yield f"{label}: file {name} {_missing(path)}"
            elif path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
                yield f"{label}: file {name} was changed after it was committed"
        except OSError as error:
            yield f"{label}: file {name} cannot be read ({error.strerror})"


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"is missing (it links to {os.readlink(path)})"
    return "is missing"
