"""The live view of a run: the stages as a tree, each with its state, progress, rate and key metric.

    with LiveView(plan(graph, store), graph, console) as view:
        for event in run(graph, store, ...):
            view.update(event)

Where the output is not a terminal it prints plain lines instead: when a stage starts, every twenty
seconds of its progress, and when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.runner import Event
from posttrain.report.progress import Progress, tree
from posttrain.report.tables import FirstFit
from posttrain.report.wording import clock, number

PLAIN_SECONDS = 20.0
"""Between two plain lines about one stage."""

SYMBOLS = {
    "failed": ("✗", "bold red"),
    "needs input": ("?", "yellow"),
    "running": ("●", "cyan"),
    "blocked": ("\N{EN DASH}", "yellow"),
    "pending": ("·", "dim"),
    "done": ("✓", "green"),
    "cached": ("✓", "dim"),
}
"""State -> symbol and style; what a person has to see first comes first."""
URGENCY = list(SYMBOLS)
BAR_WIDTH = 12
COLUMNS: dict[str, tuple[int, JustifyMethod]] = {
    "state": (1, "left"),
    "name": (1, "left"),
    "bar": (BAR_WIDTH, "left"),
    "step": (7, "right"),
    "rate": (11, "right"),
    "metric": (12, "left"),
    "time": (5, "right"),
    "left": (9, "right"),
}
"""Least width, so that the table does not jump when a number comes, and side."""
DISPENSABLE = ("rate", "bar", "step", "left", "metric")
"""Columns that a narrow terminal does without, in this order."""


class LiveView:
    """Shows a run while it goes on; give it every event of the run."""

    def __init__(self, rows: Sequence[PlanRow], graph: Graph, console: Console) -> None:
        self.console = console
        self.stages = {row.name: Progress(name=row.name, kind=row.kind) for row in rows}
        self.prefixes = tree(rows, graph)
        """Stage -> the lines of the tree that lead to it; without the domains."""
        self._told: dict[str, float] = {}
        self._over = False
        self._live = (
            Live(self, console=console, refresh_per_second=4, vertical_overflow="crop")
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        if self._live is not None:
            self._live.stop()

    def update(self, event: Event) -> None:
        """Take in one event."""
        stage = self.stages[event.name]
        stage.update(event)
        if event.kind == "warning":
            # Above the live table, where it stays. Those of cached stages stand in the summary.
            if stage.state == "running":
                self.tell(stage.name, event.payload["text"])
            return
        if self._live is None and (line := self._plain(event, stage)):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def tell(self, name: str, text: str) -> None:
        """Show a warning of a stage, or of something else by that name."""
        line = Text.assemble(("warning", "yellow"), f"     {name}: ", text)
        self.console.print(line, soft_wrap=self._live is None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last picture stays on the screen and may be longer than it.
        room = len(self.prefixes) if self._over else max(1, console.height - 5)
        layouts = [set(DISPENSABLE[:count]) for count in range(len(DISPENSABLE) + 1)]
        yield FirstFit(choices=[self._table(set(COLUMNS) - without, room) for without in layouts])

    # -- terminal --------------------------------------------------------------------------------

    def _table(self, columns: set[str], room: int) -> Table:
        """The tree; where it has more rows than `room`, what is most urgent, and a count."""
        table = Table.grid(padding=(0, 2 if len(columns) == len(COLUMNS) else 1, 0, 0))
        shown = [column for column in COLUMNS if column in columns]
        for column in shown:
            width, side = COLUMNS[column]
            table.add_column(column, justify=side, no_wrap=True, min_width=width)
        names = list(self.prefixes)
        if len(names) > room:
            ranked = sorted(names, key=lambda name: URGENCY.index(self.stages[name].state))
            names = [name for name in names if name in ranked[:room]]
        rows = [self._domains(), *(self._row(name, names) for name in names)]
        hidden = [self.stages[name] for name in self.prefixes if name not in names]
        if hidden:
            finished = sum(stage.state in ("done", "cached") for stage in hidden)
            rest = f"{finished} more finished, {len(hidden) - finished} to come"
            rows.append({"name": Text(rest, "dim")})
        for cells in filter(None, rows):
            table.add_row(*(cells.get(column, "") for column in shown))
        return table

    def _domains(self) -> dict[str, RenderableType]:
        """All domains in one row, the cells by column: making them takes a moment."""
        domains = [stage for name, stage in self.stages.items() if name not in self.prefixes]
        if not domains:
            return {}
        first = min(domains, key=lambda stage: URGENCY.index(stage.state))
        ready = sum(stage.state in ("done", "cached") for stage in domains)
        said = {"cached": "cached", "failed": f"{first.name} failed"}.get(first.state, "")
        return {
            "state": Text(*SYMBOLS[first.state]),
            "name": Text("domains", "dim" if first.state == "cached" else ""),
            "step": Text(f"{ready}/{len(domains)}", "dim"),
            "metric": Text(said, SYMBOLS[first.state][1]),
        }

    def _row(self, name: str, shown: Sequence[str]) -> dict[str, RenderableType]:
        """The cells of one stage by column."""
        stage = self.stages[name]
        symbol, style = SYMBOLS[stage.state]
        quiet = stage.state in ("pending", "cached", "blocked")
        name_style = "dim" if quiet else "bold" if stage.state == "running" else ""
        # Of a tree with gaps the lines would lead nowhere.
        prefix = self.prefixes[name] if len(shown) == len(self.prefixes) else ""
        cells: dict[str, RenderableType] = {
            "state": Text(symbol, style),
            "name": Text.assemble((prefix, "dim"), (name, name_style)),
            "metric": Text(stage.headline),
        }
        if stage.state in ("cached", "failed", "blocked", "needs input"):
            cells["metric"] = Text(stage.state, style)
        if stage.state == "pending" and stage.reason:
            cells["metric"] = Text("in another run", "dim")
        if stage.state == "running":
            cells["bar"] = ProgressBar(
                total=1.0, completed=stage.share, width=BAR_WIDTH, pulse=stage.step is None
            )
            cells["left"] = Text("" if stage.left is None else f"ETA {clock(stage.left)}", "dim")
        if stage.state in ("running", "done", "failed"):
            cells["step"] = Text("{}/{}".format(*stage.step) if stage.step else "")
            cells["rate"] = Text(f"{number(round(stage.rate))} tok/s" if stage.rate else "", "dim")
            cells["time"] = Text(clock(stage.elapsed))
        return cells

    # -- plain -----------------------------------------------------------------------------------

    def _plain(self, event: Event, stage: Progress) -> str | None:
        """The line that an event is worth, if any."""
        word: str = stage.state
        name, text = stage.name, stage.reason
        now, told = time.monotonic(), self._told.get(name)
        # That another run works on a stage is said once.
        lately = told is not None and (stage.state == "pending" or now - told < PLAIN_SECONDS)
        if event.kind == "progress" and lately:
            return None
        if event.kind in ("started", "progress"):
            self._told[name] = now
        if event.kind == "started":
            word, name = "started", f"{name} ({stage.kind})"
        if stage.state == "done" or (stage.state == "running" and event.kind == "progress"):
            text = stage.facts
        return f"{word:<11} {name}" + (f": {text}" if text else "")
