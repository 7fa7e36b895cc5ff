"""The types of the fields of judges: what a value has to be, and what is said where it is not.

A value that may hold a secret, such as a url with a password, is refused without being repeated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt
from pydantic_core import PydanticCustomError

from posttrain.schedules import AnySchedule, is_schedule, parse_schedule

MAX_TOKENS = 1024
"""Longest reply of a model behind an endpoint, where the judge says nothing else."""
HIDDEN = "hidden"
"""The type of an error about a value that no message repeats."""
EDGE = "judges."
"""What the edges of a judge's stages begin with."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> Any:
    if not _is_number(value):
        raise ValueError("it has to be a number")
    return value


def _weight(value: Any) -> Any:
    schedule = parse_schedule(value) if is_schedule(value) else None
    if not all(map(_is_number, [value] if schedule is None else schedule.possible_values())):
        raise ValueError("it has to be a number or a schedule of numbers")
    return value if schedule is None else schedule


def _rubric(value: Any) -> Any:
    if value is None or value is True or (isinstance(value, str) and value):
        return value
    raise ValueError("it has to be a text, or true to read each row's rubric")


def _url(value: str) -> str:
    """A url that can be asked, without a password in it. Raises ValueError, and `_hidden` where the
    url may hold a secret, which no message repeats."""
    if "@" in value or "?" in value or "#" in value:
        raise _hidden(
            "url: it holds a user, a password or a query, which would stand in every record; give "
            "the API's base alone, as http://localhost:8000/v1, put the key into an environment "
            "variable and name that in key"
        )
    if not value.startswith(("http://", "https://")):
        raise ValueError("it has to be a url that begins with http:// or https://")
    try:
        parts = urlsplit(value)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"it is no url that can be asked: {error}") from None
    if not named:
        raise ValueError("it has to name a host, as in http://localhost:8000/v1")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", parts.hostname or ""):
        raise ValueError(
            "its host may hold the characters A-Z, a-z, 0-9, '.', '_' and '-'; another script is "
            "written in punycode, as xn--..."
        )
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("it may hold no blanks, and other characters only as %XX")
    return value


_NAME_OF_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BEGINS_A_KEY = re.compile(r"(?:sk|rk|pk|hf|gsk|xai|ghp|nvapi)_(?=\w*\d)\w{6,}")


def _variable(value: str) -> str:
    """The name of an environment variable. Raises `_hidden` for what may be a key itself."""
    # Keys have digits all over and small letters; names of variables are words.
    random = len(value) >= 20 and sum(map(str.isdigit, value)) >= 3
    random = random and (value.upper() != value or "_" not in value)
    if not _NAME_OF_VARIABLE.fullmatch(value) or random or _BEGINS_A_KEY.match(value):
        raise _hidden(
            "key: it takes the name of the environment variable that holds the API key, such as "
            "JUDGE_KEY, not the key itself, which would stand in every record (what was given is "
            "not shown)"
        )
    return value


def _hidden(message: str) -> PydanticCustomError:
    """An error whose message leaves out the value."""
    return PydanticCustomError(HIDDEN, "{said}", {"said": message})


def _begins(*starts: str, what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not value.startswith(starts):
            raise ValueError(f"it has to be {what}")
        return value

    return AfterValidator(check)


def _template(*fields: str, needs: Sequence[str]) -> AfterValidator:
    """A text for the values of `fields`; all of `needs` stand in it."""

    def check(value: str | None) -> str | None:
        found = set(needs) if value is None else set(re.findall(r"\{(\w+)\}", value))
        if not set(needs) <= found <= set(fields):
            may, must = (", ".join(f"{{{name}}}" for name in names) for names in (fields, needs))
            raise ValueError(f"it has to be a text with {must}; it may hold {may}")
        return value

    return AfterValidator(check)


Number = Annotated[int | float, BeforeValidator(_number)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Count = Annotated[StrictInt, Field(gt=0)]
Weight = Annotated[int | float | AnySchedule, BeforeValidator(_weight)]
Text = Annotated[str, Field(min_length=1)]
Url = Annotated[str, AfterValidator(_url)]
Variable = Annotated[str, AfterValidator(_variable)]
Edge = Annotated[
    str, _begins(EDGE, what=f"the edge of a stage, {EDGE}NAME; pass the stage in the recipe")
]
Unit = Literal["word", "character"]
Pairing = Literal["all", "circular"]
Rubric = Annotated[bool | str | None, BeforeValidator(_rubric)]
GradeTemplate = Annotated[
    str | None, _template("prompt", "response", "answer", "rubric", needs=("prompt", "response"))
]
PairTemplate = Annotated[str | None, _template("prompt", "a", "b", "answer", needs=("a", "b"))]
