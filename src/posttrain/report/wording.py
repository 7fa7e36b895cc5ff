"""How numbers and settings are written, the same in the terminal, the page and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.stages.kinds import Kind

DASH = "—"
"""Stands where a value is not given."""
MINUS = "\N{MINUS SIGN}"
RANGE = "\N{EN DASH}"


def fixed(value: float, digits: int) -> str:
    """`value` with `digits` decimals, a real minus sign, and no minus zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", MINUS)


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage without its sign: 0.123 -> "12.3"."""
    return fixed(100 * share, digits)


def signed(share: float, digits: int = 1) -> str:
    """A difference of shares in points with its sign: 0.123 -> "+12.3"."""
    text = percent(share, digits)
    return text if text.startswith(MINUS) else f"+{text}"


def percent_range(value: Mapping[str, float], digits: int = 1) -> str:
    """The interval of an accuracy in per cent: "60.1-68.3" with a long dash."""
    return f"{percent(value['low'], digits)}{RANGE}{percent(value['high'], digits)}"


def between(value: Mapping[str, float], digits: int, scale: float = 1) -> str:
    """An interval of any numbers, times `scale`: "0.4-5.9" with a long dash, "-0.4 to 5.9"."""
    ends = [fixed(scale * value[end], digits) for end in ("low", "high")]
    return _between(ends)


def ratio_range(low: float, high: float) -> str:
    """The interval of a recovery."""
    return _between([fixed(low, 2), fixed(high, 2)])


def _between(ends: Sequence[str]) -> str:
    """A range, in words where a minus would stand behind its dash."""
    return (" to " if any(end.startswith(MINUS) for end in ends) else RANGE).join(ends)


def number(value: Any) -> str:
    """Any logged value in few characters: 1234567 -> "1.23M", 0.01234 -> "0.0123"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999 950 would be written as 1000k.
        if size >= scale * (10 if unit == "k" else 0.9995):
            return f"{value / scale:.3g}{unit}".replace("-", MINUS)
    if isinstance(value, int) or size >= 1000 or (size >= 1 and value == round(value)):
        return f"{value:.0f}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def headline(kind: Kind, metrics: Mapping[str, Any]) -> str:
    """The number that says most about a stage of that kind: "reward 0.62"; empty if it has none."""
    key, word = kind.number
    for name in (key, *kind.headline):
        if metrics.get(name) is not None:
            return f"{word if name == key else name} {number(metrics[name])}"
    return ""


def clock(seconds: float) -> str:
    """A running time as a clock shows it: "0:42", "12:05", "1:02:03"."""
    whole = max(0, int(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """A running time in words: "0.4 s", "42 s", "5 min 12 s", "1 h 2 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names, values as JSON."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{prefix}{key}"] = text
    return found
