"""Content identity: canonical JSON, sha256 digests, and the difference of two payloads field by
field.

A fingerprint must be the same in every process and on every machine, so only values with one
obvious serialisation are accepted. A function, an object or a set is refused with its dotted path
instead of being hashed by its `repr`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from posttrain.engine.errors import ConfigError, shortened

ABSENT: Final = "(absent)"
"""Stands for a missing field in the result of `diff_payloads`."""


def plain(value: Any, *, at: str = "value") -> Any:
    """`value` as plain JSON data: None, bool, int, finite float, str, list, dict with str keys.

    Tuples become lists. `at` is the dotted path used in errors. Raises ConfigError for anything
    else, NaN and infinity included.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # Of a subclass, such as a str enum, the text itself as a plain str.
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(
                f"{at}: {float(value)!r} is not a finite number; give a finite number or None"
            )
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, at=f"{at}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, at): plain(item, at=f"{at}.{key}") for key, item in value.items()}
    raise ConfigError(
        f"{at}: {shortened(repr(value))} has no stable serialisation; use None, bool, int, float, "
        f"str, list, tuple or dict with str keys "
        f'(and name a function as "module:function")'
    )


def _key(key: Any, at: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(
            f"{at}: the key {shortened(repr(key))} is not a str; write it as {str(key)!r}"
        )
    return str.__str__(key)


def canonical_json(value: Any, *, at: str = "value") -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII. Raises ConfigError as `plain`
    does.

    >>> canonical_json({"b": (1, 2.0), "a": None})
    '{"a":null,"b":[1,2.0]}'
    """
    return json.dumps(plain(value, at=at), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, *, at: str = "value") -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value`. Raises ConfigError as `plain`
    does."""
    return hashlib.sha256(canonical_json(value, at=at).encode("ascii")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (64 hex digits) of the bytes of a file; a link is followed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(
    source: Path, files: Iterable[str], hash_file: Callable[[Path], str] = file_digest
) -> str:
    """One digest for several files below `source`: the digest of {relative name: sha256}.

    `hash_file` gives the sha256 of one file; `hashes.FileHashes.digest` need not read it again.
    """
    return digest({name: hash_file(source / name) for name in files})


def diff_payloads(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    old_config: Mapping[str, Any] | None = None,
    new_config: Mapping[str, Any] | None = None,
) -> list[tuple[str, Any, Any]]:
    """Fields in which two payloads differ: (dotted field, old value, new value), ABSENT where one
    has none.

    A payload lacks the settings that are at their default; their values are in the whole configs.

    >>> diff_payloads({"config": {"steps": 80}}, {"config": {"steps": 120}})
    [('config.steps', 80, 120)]
    >>> diff_payloads({"config": {}}, {"config": {"steps": 120}}, old_config={"steps": 100})
    [('config.steps', 100, 120)]
    """
    old, new = plain(old), plain(new)
    ours, theirs = old.get("config", {}), new.get("config", {})
    filled = {"config": _filled(ours, theirs, plain(old_config or {}))} if "config" in old else {}
    other = {"config": _filled(theirs, ours, plain(new_config or {}))} if "config" in new else {}
    return _diff({**old, **filled}, {**new, **other}, "")


def _filled(
    config: Mapping[str, Any], other: Mapping[str, Any], whole: Mapping[str, Any]
) -> dict[str, Any]:
    """`config`, and from `whole` the settings that only `other` names."""
    found = dict(config)
    for key, value in other.items():
        known = whole.get(key, ABSENT)
        if isinstance(value, dict) and isinstance(known, dict):
            here = found.get(key, {})
            found[key] = _filled(here, value, known) if isinstance(here, dict) else here
        elif key not in found and known != ABSENT:
            found[key] = known
    return found


def _diff(old: Any, new: Any, at: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            path = f"{at}.{key}" if at else key
            if key not in old or key not in new:
                found.append((path, old.get(key, ABSENT), new.get(key, ABSENT)))
            else:
                found += _diff(old[key], new[key], path)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [item for index, (a, b) in pairs for item in _diff(a, b, f"{at}[{index}]")]
    # Python calls 1, 1.0 and True equal; their fingerprints differ.
    return [] if canonical_json(old) == canonical_json(new) else [(at, old, new)]
