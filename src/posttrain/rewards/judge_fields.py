"""The plain fields of every kind of judge, and what their values have to be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.schedules import is_schedule, parse_schedule

EDGE = "judges."
"""What the edges of a judge's stages begin with."""

Check = Callable[[Any], str]
"""Returns what a value has to be, or nothing where it is."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> str:
    return "" if _number(value) else "a number"


def _not_negative(value: Any) -> str:
    return "" if _number(value) and value >= 0 else "a number >= 0"


def _positive(value: Any) -> str:
    return "" if _number(value) and value > 0 else "a number > 0"


def _count(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and value > 0 else "a whole number > 0"


def scheduled(value: Any) -> str:
    """A check of a number, or of a schedule that only takes numbers."""
    if not is_schedule(value):
        return "" if _number(value) else "a number or a schedule"
    return (
        ""
        if all(map(_number, parse_schedule(value).possible_values()))
        else "a schedule of numbers"
    )


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value else "a text"


def _edge(value: Any) -> str:
    fits = isinstance(value, str) and value.startswith(EDGE)
    return "" if fits else f"the edge of a stage, {EDGE}NAME; pass the stage in the recipe"


def _url(value: Any) -> str:
    fits = isinstance(value, str) and value.startswith(("http://", "https://"))
    return "" if fits else "a url that begins with http:// or https://"


def _regex(value: Any) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        return f"a regular expression ({error})"
    return ""


def _rubric(value: Any) -> str:
    fits = value is True or (isinstance(value, str) and value)
    return "" if fits else "a text, or true to read each row's rubric"


def _optional(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


def _one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else f"one of {', '.join(choices)}"


def _template(*fields: str, needs: tuple[str, ...]) -> Check:
    """A text for the values of `fields`; all of `needs` stand in it."""

    def check(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            return "a text"
        found = set(re.findall(r"\{(\w+)\}", value))
        if found <= set(fields) and set(needs) <= found:
            return ""
        may, must = (", ".join(f"{{{name}}}" for name in names) for names in (fields, needs))
        return f"a text with {must}; it may hold {may}"

    return check


SHAPES: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"budget"}),
    "budget": frozenset({"budget"}),
    "soft_overlong": frozenset({"budget", "cache"}),
    "concave": frozenset({"budget", "k", "q"}),
    "pass_rate": frozenset({"budget", "of"}),
    "group_relative": frozenset(),
}
"""Shape of a length penalty -> the fields that it has besides."""

_UNIT = _one_of("word", "character")
_PAIRWISE: dict[str, Check] = {
    "pairing": _one_of("all", "circular"),
    "swap": _flag,
    "template": _template("prompt", "a", "b", "answer", needs=("a", "b")),
}
_ENDPOINT: dict[str, Check] = {"url": _url, "model": _text, "key": _optional(_text)}

FIELDS: Mapping[str, Mapping[str, Check]] = {
    "verifier": {},
    "scalar": {"model": _edge, "squash": _flag},
    "oracle": {"noise": _not_negative},
    "constant": {"value": _finite},
    "length": {
        "shape": _one_of(*SHAPES), "budget": _count, "cache": _count, "k": _positive,
        "q": _not_negative,
    },
    "language": {"regex": _regex, "unit": _UNIT},
    "format": {"pattern": _regex},
    "repetition": {"n": _count, "unit": _UNIT},
    "finished": {},
    "llm": {
        **_ENDPOINT, "reference": _flag, "rubric": _optional(_rubric), "best": _positive,
        "template": _template(
            "prompt", "response", "answer", "rubric", needs=("prompt", "response")
        ),
    },
    "compare": {"model": _edge, **_PAIRWISE},
    "compare_endpoint": {**_ENDPOINT, **_PAIRWISE},
    "itself": _PAIRWISE,
    "human": {"file": _optional(_text), "pairing": _one_of("all", "circular")},
    "sum": {},
    "gate": {"below": scheduled},
    "lexicographic": {},
    "normalised": {},
    "whitened": {},
    "by_domain": {},
}  # fmt: skip
"""Kind -> its plain fields and their checks."""
