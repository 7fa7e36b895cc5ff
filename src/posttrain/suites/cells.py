"""Single values of a table: what is missing, what is a text, and what a verifier can be handed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from posttrain.engine.errors import ConfigError, shortened
from posttrain.engine.parsing import Unreadable, parse_json


def is_missing(value: Any) -> bool:
    """None and NaN, which is how tables say that there is no value."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def text_of(value: Any) -> str:
    """A text, a number or a date as a text; a whole number that became a float is whole again.

    Raises ConfigError for anything else, for infinities, and where the value is missing.
    """
    if is_missing(value):
        what = "no value" if value is None else "no value (NaN)"
        raise ConfigError(f"holds {what}; it has to be a text or a number")
    if isinstance(value, str):
        return _checked(value)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _number(value)
    if isinstance(value, date | time):
        return value.isoformat()
    raise ConfigError(f"holds {shown(value)}; it has to be a text or a number")


def shown(value: Any) -> str:
    """A value and its type, as messages name them."""
    return f"{shortened(str(value), 60)!r} ({type(value).__name__})"


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"holds half of a character at position {error.start + 1} ({text[error.start]!r}), "
            "which no file can store; write the whole character or leave it out"
        ) from None
    return text


def _number(value: float | Decimal) -> str:
    if not isinstance(value, int) and not math.isfinite(value):
        raise ConfigError(f"holds {value}, which is no number to be answered; remove the row")
    if isinstance(value, Decimal):
        return format(value.to_integral_value() if value == value.to_integral_value() else value)
    # A column of whole numbers with a missing value is a column of floats: 3 became 3.0.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return json.dumps(value)


def spread(lengths: Iterable[int]) -> dict[str, int]:
    """The longest and the median of the lengths of some rows, of which there is one at least."""
    ordered = sorted(lengths)
    return {"longest": ordered[-1], "median": ordered[(len(ordered) - 1) // 2]}


def plain_value(value: Any) -> tuple[Any, int]:
    """The value as JSON data, and how many values inside had no JSON form and became None.

    Dates become their ISO text, decimals numbers; bytes, NaN and infinities have no form.
    """
    if isinstance(value, str):
        try:
            return _checked(value), 0
        except ConfigError:
            return None, 1
    if value is None or isinstance(value, bool | int):
        return value, 0
    if isinstance(value, float | Decimal):
        return (_as_number(value), 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, date | time):
        return value.isoformat(), 0
    if isinstance(value, timedelta):
        return value.total_seconds(), 0
    if isinstance(value, Mapping):
        # A key without a form takes its value along.
        kept = {str(key): item for key, item in value.items() if not plain_value(str(key))[1]}
        found = {key: plain_value(item) for key, item in kept.items()}
        left_out = len(value) - len(kept) + sum(count for _, count in found.values())
        return {key: item for key, (item, _) in found.items()}, left_out
    if isinstance(value, list | tuple):
        items = [plain_value(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    return None, 1


def _as_number(value: float | Decimal) -> float | int:
    if isinstance(value, float):
        return value
    return int(value) if value == value.to_integral_value() else float(value)


def loaded_json(text: str | bytes, *, hint: str) -> Any:
    """What a JSON text says. Raises ConfigError for one that is broken, too deep, or that has a
    number of too many digits; `hint` says what it has to be."""
    try:
        return parse_json(text)
    except Unreadable as error:
        shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        raise ConfigError(f"{error}: {shown[:80].strip()!r}; {hint}") from None
