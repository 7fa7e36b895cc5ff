"""JSON and TOML of others, read once: whatever is wrong with a text is one error in words.

The standard library has an error of its own for each of broken syntax, another encoding, numbers of
too many digits and too many levels inside each other; the last two are not even syntax errors.
"""

import json
import math
import tomllib
from pathlib import Path
from typing import Any, Final, NoReturn

LEVELS: Final = 100
"""Levels of objects and lists inside each other that a text may have: what reads it later goes
through them by recursion."""


class Unreadable(ValueError):
    """A text that is no JSON or no TOML; the message says why, with line and column."""


def parse_json(content: bytes | str, *, finite: bool = False, unique: bool = False) -> Any:
    """What a JSON text says. With `finite`, NaN, Infinity and numbers beyond the range of a float
    are refused, as the standard has it; with `unique`, a key that an object has twice. Raises
    Unreadable."""
    how: dict[str, Any] = {"object_pairs_hook": _unique} if unique else {}
    if finite:
        how |= {"parse_constant": _refused, "parse_float": _finite}
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, **how)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON ({error})") from None
    except RecursionError:
        raise Unreadable(f"JSON {_TOO_DEEP}") from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"holds a number that cannot be read ({_shortly(error)})") from None
    if text.count("[") + text.count("{") > LEVELS:
        _check_levels(value, "JSON")
    return value


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes, whose objects have each key once. Raises
    Unreadable for a longer one and as `parse_json` does, and OSError."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"more than {limit // 1_000_000} MB")
    # A record is one text: what two readers could read otherwise is none.
    return parse_json(content, unique=True)


def parse_json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises Unreadable for another value and as `parse_json` does, and
    OSError."""
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise Unreadable(f"holds a {type(value).__name__} where an object is needed")
    return value


def parse_toml(content: bytes) -> dict[str, Any]:
    """What a TOML text says. Raises Unreadable."""
    try:
        value = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(str(error)) from None
    except RecursionError:
        raise Unreadable(f"TOML {_TOO_DEEP}") from None
    except ValueError as error:
        raise Unreadable(f"holds a number that cannot be read ({_shortly(error)})") from None
    _check_levels(value, "TOML")
    return value


def _shortly(error: ValueError) -> str:
    # What follows the colon is Python's advice for programs: to lift the limit.
    return str(error).partition(":")[0]


_TOO_DEEP: Final = f"of too many levels inside each other (more than {LEVELS})"


def _check_levels(value: Any, what: str) -> None:
    """Level by level, so that no depth is too much for it."""
    level = [value]
    for _ in range(LEVELS + 1):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for items in inside for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise Unreadable(f"{what} {_TOO_DEEP}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Unreadable(f"holds an object with the key {twice!r} twice")
    return found


def _refused(text: str) -> NoReturn:
    raise Unreadable(f"holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unreadable(f"holds {text}, which no float can hold")
    return value
