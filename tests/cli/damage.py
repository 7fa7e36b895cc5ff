"""Files damaged in many ways, the same for the same seed: what disks, editors and strangers do."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
RAW = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "1.5",
    "NaN": "NaN",
    "infinity": "-Infinity",
    "overflow": "1e400",
    "huge integer": "9" * 5000,
    "large integer": str(2**70),
    "empty text": '""',
    "text": '"x"',
    "long text": '"' + "x" * 20_000 + '"',
    "control characters": r'"\u001b]0;OWNED\u0007\u202e\u0000"',
    "half a pair": r'"\ud83d"',
    "path": '"../../../outside"',
    "markup": '"[bold]<script>"',
    "empty list": "[]",
    "list": '["x", 1, null]',
    "empty object": "{}",
    "object": '{"x": {"y": 1}}',
    "deep list": DEEP,
    "deep object": '{"a":' * 3000 + "1" + "}" * 3000,
}
"""What is put in place of a value, as JSON has it."""

TOML = {
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "1.5",
    "NaN": "nan",
    "infinity": "-inf",
    "huge integer": "9" * 5000,
    "empty text": '""',
    "text": '"x"',
    "long text": '"' + "x" * 20_000 + '"',
    "control characters": r'"\u001b]0;OWNED\u0007\u202e"',
    "path": '"../../../outside"',
    "empty list": "[]",
    "list": '["x", 1]',
    "empty table": "{}",
    "deep list": DEEP,
    "deep table": "{a = " * 3000 + "1" + "}" * 3000,
    "date": "2026-01-01",
}

Damage = Callable[[bytes, random.Random], bytes]
_HOLE = "\u2063hole\u2063"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places of a JSON value, itself included."""
    found = [path]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _chosen(value: Any, random: random.Random) -> tuple[Any, ...]:
    """A place; those near the top as often as the many further down."""
    places = _places(value)
    depth = random.choice(sorted({len(path) for path in places}))
    return random.choice([path for path in places if len(path) == depth])


def _replaced(raw: str) -> Damage:
    def damage(content: bytes, random: random.Random) -> bytes:
        value = json.loads(content)
        path = _chosen(value, random)
        if path:
            _at(value, path[:-1])[path[-1]] = _HOLE
        else:
            value = _HOLE
        return json.dumps(value, indent=1).replace(json.dumps(_HOLE), raw).encode()

    return damage


def _key(change: Callable[[dict[str, Any], str], None]) -> Damage:
    def damage(content: bytes, random: random.Random) -> bytes:
        value = json.loads(content)
        objects = [
            path for path in _places(value) if isinstance(found := _at(value, path), dict) and found
        ]
        if not objects:
            return b"{}"
        found = _at(value, random.choice(objects))
        change(found, random.choice(sorted(found)))
        return json.dumps(value, indent=1).encode()

    return damage


def _renamed(found: dict[str, Any], key: str) -> None:
    found[key + "\u001b[31m"] = found.pop(key)


def _outside(found: dict[str, Any], key: str) -> None:
    found["../" + key] = found.pop(key)


def _twice(content: bytes, random: random.Random) -> bytes:
    """One key of the top twice, first with another value."""
    value = json.loads(content)
    if not isinstance(value, dict) or not value:
        return content + content
    key = random.choice(sorted(value))
    return content.replace(b"{", b"{" + json.dumps(key).encode() + b": null,", 1)


def _cut(content: bytes, random: random.Random) -> bytes:
    return content[: random.randrange(max(1, len(content)))]


def _flipped(content: bytes, random: random.Random) -> bytes:
    if not content:
        return b"\xff"
    place = random.randrange(len(content))
    return content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]


def _inserted(new: bytes) -> Damage:
    def damage(content: bytes, random: random.Random) -> bytes:
        place = random.randrange(len(content) + 1)
        return content[:place] + new + content[place:]

    return damage


ANY: dict[str, Damage] = {
    "empty": lambda content, random: b"",
    "cut": _cut,
    "one byte": _flipped,
    "binary": lambda content, random: random.randbytes(300),
    "zeros": lambda content, random: b"\0" * len(content),
    "NUL within": _inserted(b"\0"),
    "latin-1": _inserted("é".encode("latin-1")),
    "escape": _inserted(b"\x1b[31m"),
    "BOM": lambda content, random: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content, random: content.decode().encode("utf-16"),
    "CRLF": lambda content, random: content.replace(b"\n", b"\r\n"),
    "more behind": lambda content, random: content + b"}\n",
    "deep": lambda content, random: DEEP.encode(),
    "cut deep": lambda content, random: DEEP[:100_000].encode(),
    "twice": lambda content, random: content + content,
}
"""What may become of any file."""

OF_JSON: dict[str, Damage] = {
    **ANY,
    **{f"value: {name}": _replaced(raw) for name, raw in RAW.items()},
    "key gone": _key(lambda found, key: found.pop(key)),
    "key renamed": _key(_renamed),
    "key outside": _key(_outside),
    "key empty": _key(lambda found, key: found.update({"": found.pop(key)})),
    "key twice": _twice,
}


def _line(damage: Damage) -> Damage:
    """The damage of one JSON line of many."""

    def of_line(content: bytes, random: random.Random) -> bytes:
        lines = content.splitlines()
        place = random.randrange(len(lines))
        lines[place] = damage(lines[place], random).replace(b"\n", b" ")
        return b"\n".join(lines) + b"\n"

    return of_line


OF_JSONL: dict[str, Damage] = {
    **ANY,
    **{f"line: {name}": _line(damage) for name, damage in OF_JSON.items()},
}


def _value_of_toml(raw: str) -> Damage:
    def damage(content: bytes, random: random.Random) -> bytes:
        lines = content.decode().splitlines()
        place = random.choice([n for n, line in enumerate(lines) if "=" in line])
        lines[place] = f"{lines[place].partition('=')[0]}= {raw}"
        return ("\n".join(lines) + "\n").encode()

    return damage


def _line_of_toml(change: Callable[[str], str]) -> Damage:
    def damage(content: bytes, random: random.Random) -> bytes:
        lines = content.decode().splitlines()
        place = random.choice([n for n, line in enumerate(lines) if line.strip()])
        lines[place] = change(lines[place])
        return ("\n".join(lines) + "\n").encode()

    return damage


OF_TOML: dict[str, Damage] = {
    **ANY,
    **{f"value: {name}": _value_of_toml(raw) for name, raw in TOML.items()},
    "line gone": _line_of_toml(lambda line: ""),
    "line twice": _line_of_toml(lambda line: f"{line}\n{line}"),
    "key renamed": _line_of_toml(lambda line: re.sub(r"\w+", "other", line, count=1)),
    "key outside": _line_of_toml(lambda line: re.sub(r"\w+", '"../x"', line, count=1)),
}


def damages_of(name: str) -> dict[str, Damage]:
    """The ways to damage a file of that name."""
    for end, found in ((".toml", OF_TOML), (".jsonl", OF_JSONL)):
        if name.endswith(end):
            return found
    return OF_JSON
