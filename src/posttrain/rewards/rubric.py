"""The criteria of a problem row, by which `judges.llm(rubric=True)` grades responses to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.engine.errors import ConfigError

FORM = '{"criterion": text, "weight": number above 0}'


def checked_rubric(value: Any) -> list[dict[str, Any]]:
    """The value if it is a list of criteria; weight 1 where it is absent. Raises ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{value!r} is no rubric; it takes a list of {FORM}")
    return [_criterion(entry) for entry in value]


def _criterion(entry: Any) -> dict[str, Any]:
    given = entry if isinstance(entry, Mapping) else {}
    text, weight = given.get("criterion"), given.get("weight")
    # Parquet has a null where a row leaves the weight out.
    weight = 1.0 if weight is None else weight
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not isinstance(text, str) or not text.strip() or not number or not 0 < weight < float("inf"):
        raise ConfigError(f"{entry!r} in the rubric is no criterion; it takes {FORM}")
    return {"criterion": text, "weight": float(weight)}
