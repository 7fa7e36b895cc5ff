"""What stages took beside what an estimate had said when their run began."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from posttrain.engine.atomic import human_bytes
from posttrain.engine.record import Recorded
from posttrain.report.tables import plain_table, title
from posttrain.report.wording import DASH, duration, fixed, number

ARROW = "\N{RIGHTWARDS ARROW}"
NEAR = (0.7, 1.3)
"""An estimate is near where what a stage took is between these multiples of it."""
QUANTITIES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "Time": ("seconds", duration),
    "Tokens": ("tokens", number),
    "Peak memory": ("peak_memory", lambda value: human_bytes(round(value))),
    "Disk": ("disk", lambda value: human_bytes(round(value))),
}
"""Title to the name in an estimate and how its values are written."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An estimate beside what came."""

    estimate: float | None
    actual: float | None
    text: str
    """Both, for people."""

    @property
    def ratio(self) -> str:
        """What came over what was expected: "1.12x"; empty without one of them."""
        found = self.value
        return "" if found is None else f"{fixed(found, 2)}x"

    @property
    def value(self) -> float | None:
        """The same as a number."""
        return self.actual / self.estimate if self.actual and self.estimate else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage."""

    name: str
    cells: Mapping[str, Cell]
    """By title of `QUANTITIES`."""
    found: str
    """What its seconds were estimated by."""


def compared(stages: Sequence[tuple[str, Recorded]]) -> list[Row]:
    """A row for each stage, with its name, whose record has an estimate."""
    return [
        Row(
            name=name,
            cells={t: _cell(n, stage, write) for t, (n, write) in QUANTITIES.items()},
            found=_found(_estimate(stage)),
        )
        for name, stage in stages
        if _estimate(stage)
    ]


def _estimate(stage: Recorded) -> Mapping[str, Any]:
    found = stage.provenance.get("estimate")
    return found if isinstance(found, Mapping) else {}


def _found(estimate: Mapping[str, Any]) -> str:
    found = estimate.get("found")
    texts = [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
    return texts[0] if texts else ""


def _cell(name: str, stage: Recorded, write: Callable[[float], str]) -> Cell:
    # What is not known is 0 in the record.
    expected = _number(_estimate(stage).get(name)) or None
    actual = _number(stage.provenance.get(name))
    if name == "disk":
        # What was taken in from outside is linked, which takes nothing.
        actual = None if stage.kind == "model" else float(stage.bytes)
    if not expected and not actual:
        return Cell(estimate=None, actual=None, text="")
    texts = [DASH if value is None else write(value) for value in (expected, actual)]
    return Cell(estimate=expected, actual=actual, text=f" {ARROW} ".join(texts))


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None


def estimates_table(rows: Sequence[Row]) -> RenderableType:
    """The same for a terminal, all stages together in the last row."""
    table: Table = plain_table()
    table.title = title("Estimate and what it took", "as it was estimated when the run began")
    table.title_justify = "left"
    table.add_column("stage", overflow="fold")
    for name in QUANTITIES:
        table.add_column(name.lower(), justify="right", overflow="fold")
    for row in rows:
        cells = [_shown(cell) for cell in row.cells.values()]
        table.add_row(row.name, *cells)
    times = [row.cells["Time"] for row in rows]
    known = [cell for cell in times if cell.value is not None]
    if known:
        expected = sum(cell.estimate or 0.0 for cell in known)
        actual = sum(cell.actual or 0.0 for cell in known)
        text = f"{duration(expected)} {ARROW} {duration(actual)}"
        total = Cell(estimate=expected, actual=actual, text=text)
        table.add_section()
        table.add_row("together", _shown(total))
    return table


def _shown(cell: Cell) -> Text:
    near = cell.value is None or NEAR[0] <= cell.value <= NEAR[1]
    ratio = f" {cell.ratio}" if cell.ratio else ""
    return Text.assemble(cell.text, (ratio, "dim" if near else "yellow"))
