"""live.html: a page about a run while it goes on. It is written again every few seconds, and asks
the browser to load it again; there are no scripts, and all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from posttrain.engine.atomic import write_whole
from posttrain.report.curves import sections
from posttrain.report.gather import domain_colours
from posttrain.report.html import report_templates, style
from posttrain.report.live import SYMBOLS
from posttrain.report.watching import Watched


def write_live_page(
    path: Path,
    stages: Sequence[Watched],
    *,
    title: str,
    now: str,
    seconds: float | None,
) -> None:
    """Write the page about these stages to `path`, whole or not at all.

    `title` is what runs, `now` the time of day. The browser loads it again after `seconds`; None
    says that the page is written for the last time, as when the run has ended.
    """
    facts = [stage.facts for stage in stages]
    colours = domain_colours(facts)
    # What runs comes first: its samples are the ones that are read.
    sampled = [stage.facts for stage in reversed(stages) if stage.facts.samples]
    again = Markup('<meta http-equiv="refresh" content="{}">').format(round(seconds or 0))
    page = (
        report_templates()
        .get_template("live.html")
        .render(
            style=style(),
            again=again if seconds else "",
            title=title,
            now=now,
            renewed=seconds is not None,
            goes_on=any(stage.state == "running" for stage in stages),
            stages=stages,
            symbols={state: symbol for state, (symbol, _) in SYMBOLS.items()},
            warnings=[{"stage": one.name, "text": text} for one in facts for text in one.warnings],
            colours=colours,
            curves=sections(facts, colours),
            sampled=sampled,
            unfolded=True,
        )
    )
    write_whole(path, page.encode("utf-8", "backslashreplace"))
