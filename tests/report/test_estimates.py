"""What a stage took beside what an estimate had said."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from posttrain.engine.record import Recorded
from posttrain.report.estimates import compared, estimates_table


def made(name: str, size: int = 1000, **provenance: Any) -> tuple[str, Recorded]:
    files = {"model.safetensors": {"sha256": "0" * 64, "bytes": size}}
    return name, Recorded(
        record={"name": name, "kind": "sft", "files": files, "provenance": provenance}
    )


EXPECTED = {"seconds": 10.0, "tokens": 500, "peak_memory": 2_000_000, "disk": 500, "found": ["x"]}


def test_both_stand_beside_their_ratio() -> None:
    taken = {"seconds": 12.0, "tokens": 400, "peak_memory": 1_000_000}
    (row,) = compared([made("a", estimate=EXPECTED, **taken)])
    assert {name: (cell.text, cell.ratio) for name, cell in row.cells.items()} == {
        "Time": ("10 s → 12 s", "1.20x"),
        "Tokens": ("500 → 400", "0.80x"),
        "Peak memory": ("2 MB → 1 MB", "0.50x"),
        "Disk": ("500 B → 1 kB", "2.00x"),
    }
    assert row.found == "x"


def test_stages_without_an_estimate_are_left_out() -> None:
    assert compared([made("a", seconds=3.0), made("b", seconds=3.0, estimate="soon")]) == []


def test_what_is_not_known_is_a_dash() -> None:
    (row,) = compared([made("a", seconds=3.0, estimate=EXPECTED | {"seconds": None})])
    assert row.cells["Time"].text == "— → 3.0 s" and not row.cells["Time"].ratio
    # Of a model whose size is not known yet.
    (row,) = compared([made("a", peak_memory=5_000_000, estimate=EXPECTED | {"peak_memory": 0})])
    assert row.cells["Peak memory"].text == "— → 5 MB"


def test_the_table_adds_up_times_that_were_estimated() -> None:
    rows = compared(
        [
            made("a", seconds=12.0, estimate=EXPECTED),
            made("b", seconds=18.0, estimate=EXPECTED),
            made("c", seconds=99.0, estimate=EXPECTED | {"seconds": None}),
        ]
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(estimates_table(rows))
    text = console.export_text()
    assert "20 s → 30 s 1.50x" in text and "together" in text
