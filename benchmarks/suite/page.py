"""The result as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def page(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> str:
    """One table of the rows with a target, one of those that inform, then notes."""
    judged = [row for row in rows if row["target"] is not None]
    informing = [row for row in rows if row["target"] is None]
    met = sum(row["met"] for row in judged)
    return "\n".join(
        [
            f"# Benchmark suite, {conditions['date']}",
            "",
            sentence(conditions),
            "",
            "Medians of interleaved repetitions in one process, both sides with the same model, "
            "inputs, float32 and threads. The ratio is ours to the peer's; in brackets its least "
            "and greatest value in one repetition. The last column is the share of what the "
            "machine's measured arithmetic and bandwidth would allow.",
            "",
            f"{met} of {len(judged)} targets are met.",
            "",
            *table(judged),
            "",
            "## For information",
            "",
            *table(informing),
            "",
            "## Notes",
            "",
            *notes(rows),
            "",
        ]
    )


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every note once, with the rows that it stands at."""
    paths: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            paths.setdefault(row["note"], []).append(row["path"])
    return [f"- {'; '.join(where)}: {note}." for note, where in paths.items()]


def sentence(conditions: Mapping[str, Any]) -> str:
    """Where and how it was measured, in one line."""
    where = conditions["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    return (
        f"{where['cpu']}, {where['cores']} cores, {conditions['threads']} threads, "
        f"Python {where['python']}, {packages}; load average at the start "
        f"{conditions['load']:.1f}; {conditions['minutes']:.0f} minutes."
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table."""
    head = ["path", "ours", "peer", "unit", "ratio", "target", "met", "n", "against", "limit"]
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of a table."""
    target = "" if row["target"] is None else f"{row['sense']} {row['target']:g}"
    met = {None: "", True: "yes", False: "no"}[row["met"]]
    share = "" if row["limit_share"] is None else f"{100 * row['limit_share']:.0f} %"
    return [
        row["path"],
        number(row["ours"]),
        number(row["peer"]),
        row["unit"],
        ratio(row),
        target,
        met,
        str(row["repetitions"] or ""),
        row["peer_name"] or "",
        share,
    ]


def ratio(row: Mapping[str, Any]) -> str:
    """The ratio with its range."""
    if row["ratio"] is None:
        return ""
    span = row["ratio_range"]
    if span is None or row["repetitions"] == 1:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} [{span[0]:.2f}, {span[1]:.2f}]"


def number(value: float | None) -> str:
    """A number without an exponent, three digits where it is small."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
