"""One line of the result: what was measured, against whom, and whether it is enough."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Sense = Literal[">=", "<="]


@dataclass(frozen=True, kw_only=True)
class Row:
    """`ours` and `peer` are medians in `unit`; `ratio` is what `target` is held against."""

    path: str
    """What was measured, with its size: unique in a result."""
    unit: str
    ours: float | None = None
    """None where it was not measured; `note` then says why."""
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    """`ours / peer`; where there is no peer, what the target is about (see `note`), or None."""
    sense: Sense = ">="
    target: float | None = None
    """None for a row that only informs."""
    repetitions: int | None = None
    ours_range: tuple[float, float] | None = None
    peer_range: tuple[float, float] | None = None
    ratio_range: tuple[float, float] | None = None
    """Least and greatest ratio of one repetition of ours to the peer's beside it."""
    limit_share: float | None = None
    """Share of what the machine's measured arithmetic and bandwidth would allow."""
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target, False where nothing is measured."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        if value is None:
            return False
        return value >= self.target if self.sense == ">=" else value <= self.target

    def as_json(self) -> dict[str, Any]:
        """The row for the JSON file, numbers rounded to four digits."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        head = ("path", "ours", "peer", "unit", "ratio", "sense", "target")
        ordered = {name: rounded(values.pop(name)) for name in head} | {"met": self.met}
        return ordered | {name: rounded(value) for name, value in values.items()}


def rounded(value: Any) -> Any:
    """Floats to four significant digits, also within tuples, lists and mappings."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def compared(
    path: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    peer_name: str,
    sense: Sense = ">=",
    target: float | None = None,
    **more: Any,
) -> Row:
    """A row of two interleaved series: medians, and the ratio of the medians."""
    middle, other = statistics.median(ours), statistics.median(peer)
    ratios = [mine / theirs for mine, theirs in zip(ours, peer, strict=False)]
    return Row(
        path=path,
        unit=unit,
        ours=middle,
        peer=other,
        peer_name=peer_name,
        ratio=middle / other,
        sense=sense,
        target=target,
        repetitions=len(ours),
        ours_range=(min(ours), max(ours)),
        peer_range=(min(peer), max(peer)),
        ratio_range=(min(ratios), max(ratios)),
        **more,
    )


def alone(
    path: str,
    unit: str,
    ours: Sequence[float],
    *,
    sense: Sense = "<=",
    target: float | None = None,
    **more: Any,
) -> Row:
    """A row of one series with no peer: the target, if any, is held against its median."""
    return Row(
        path=path,
        unit=unit,
        ours=statistics.median(ours),
        sense=sense,
        target=target,
        repetitions=len(ours),
        ours_range=(min(ours), max(ours)),
        **more,
    )


def not_measured(
    path: str, unit: str, why: str, *, sense: Sense = ">=", target: float | None = None
) -> Row:
    """A row that says that there is no number, and why."""
    return Row(path=path, unit=unit, sense=sense, target=target, note=f"not measured: {why}")
