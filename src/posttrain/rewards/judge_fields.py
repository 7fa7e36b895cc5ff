"""Types of the fields of judges, and what is said where a field does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, ValidationError

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.schedules import AnySchedule, is_schedule, parse_schedule

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
Url = Annotated[
    str, _begins("http://", "https://", what="a url that begins with http:// or https://")
]
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


def no_judge_hint(value: object) -> str:
    """What to write where a judge is wanted and something else is given."""
    if isinstance(value, int | float):
        return "a number is written judges.constant(...)"
    if hasattr(value, "kind"):
        return "a reward model is asked by judges.scalar(stage), a language model by compare(stage)"
    return 'it takes what posttrain.judges makes, or JSON of the form {"judge": kind, ...}'


def explain(error: ValidationError, at: str, fields: Iterable[str] = ()) -> str:
    """The first mistake in words: "judge whitened.of.oracle: noise = -1; it has to be ...".

    `at` is what was checked, which has these `fields`.
    """
    # A misspelt field may be the reason why another one is missing.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    value, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    *before, name = [str(place) for place in problem["loc"]] or [""]
    outer = ".".join([at, *before])
    whole = f"{outer}.{name}" if name else outer
    said = str(context.get("error", problem["msg"])).replace("Input should be", "it has to be")
    if said.startswith(f"judge {name}") and isinstance(context.get("error"), ConfigError):
        # A judge inside has said it already.
        return whole + said.removeprefix(f"judge {name}")
    if kind == "union_tag_invalid":
        known = re.findall(r"'(\w+)'", context["expected_tags"])
        tag = str(context["tag"])
        return f"{whole}.{tag}: unknown judge {tag!r}; {choices_text(tag, known)}"
    if kind in ("union_tag_not_found", "model_attributes_type"):
        return f"{whole}: {value!r} is no judge; {no_judge_hint(value)}"
    if kind == "model_type":
        return f"{whole}: {value!r} is no term; it has the form {{weight, of}}"
    if kind == "missing":
        return f"{outer}: {name} is needed"
    if kind == "extra_forbidden":
        return f"{outer}: it reads no {name!r}; {choices_text(name, fields)}"
    if kind == "too_short":
        said = f"it takes {context['min_length']} or more"
    return f"{outer}: {name} = {value!r}; {said}" if name else f"{outer}: {said}"
