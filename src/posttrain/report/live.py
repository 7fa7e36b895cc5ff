"""The live view of a run: the stages as a tree, each with its state, progress, rate and key metric.

    with LiveView(plan(graph, store), graph, console) as view:
        for event in run(graph, store, ...):
            view.update(event)

Where the output is not a terminal it prints plain lines instead: when a stage starts, every twenty
seconds of its progress, and when it ends.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.engine.graph import Graph
from posttrain.engine.planner import PlanRow
from posttrain.engine.runner import Event
from posttrain.report.progress import Branch, Progress, tree
from posttrain.report.terminal import FirstFit
from posttrain.report.wording import clock, number

_UNBOUNDED = 100_000
PLAIN_SECONDS = 20.0
"""Between two plain lines about one stage."""

SYMBOLS = {
    "waiting": ("·", "dim"),
    "running": ("●", "cyan"),
    "done": ("✓", "green"),
    "cached": ("✓", "dim"),
    "failed": ("✗", "bold red"),
    "blocked": ("\N{EN DASH}", "yellow"),
    "waits": ("?", "yellow"),
}
ALL_COLUMNS = ("state", "name", "bar", "step", "rate", "metric", "time", "left")
COLUMNS = (
    ALL_COLUMNS,
    ("state", "name", "bar", "rate", "metric", "time", "left"),
    ("state", "name", "step", "metric", "time", "left"),
    ("state", "name", "metric", "time"),
    ("state", "name", "time"),
)
"""From wide to narrow; the first that fits is drawn."""
BAR_WIDTH = 12
MIN_WIDTHS = {"bar": BAR_WIDTH, "step": 7, "rate": 11, "metric": 12, "time": 5, "left": 9}
"""Room for what comes later, so that the layout does not jump."""
NUMBERS = ("step", "rate", "time", "left")


class LiveView:
    """Shows a run while it goes on; give it every event of the run."""

    def __init__(self, rows: list[PlanRow], graph: Graph, console: Console) -> None:
        self.console = console
        self.stages = {row.name: Progress(name=row.name, kind=row.kind) for row in rows}
        self.branches = tree(rows, graph)
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
        if self._live is None:
            line = self._plain(event, stage)
            if line:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = _UNBOUNDED if self._over else console.height - 3
        yield FirstFit(choices=[self._table(columns, room) for columns in COLUMNS])

    # -- terminal --------------------------------------------------------------------------------

    def _table(self, columns: tuple[str, ...], room: int) -> Table:
        """The tree; where it is higher than `room`, only what is going on, and a count."""
        table = Table.grid(padding=(0, 2 if columns == ALL_COLUMNS else 1, 0, 0))
        for column in columns:
            table.add_column(
                column,
                justify="right" if column in NUMBERS else "left",
                no_wrap=True,
                min_width=MIN_WIDTHS.get(column),
            )
        domains = [stage for stage in self.stages.values() if stage.kind == "domain"]
        if domains:
            table.add_row(*self._domains(columns, domains))
        shown = self._shown(room - 2)
        for branch in shown:
            table.add_row(*self._row(columns, branch))
        if len(shown) < len(self.branches):
            names = {branch.name for branch in shown}
            hidden = [self.stages[b.name] for b in self.branches if b.name not in names]
            finished = sum(stage.state in ("done", "cached") for stage in hidden)
            rest = f"{finished} more finished, {len(hidden) - finished} to come"
            table.add_row(*("" if c != "name" else Text(rest, "dim") for c in columns))
        return table

    def _shown(self, room: int) -> list[Branch]:
        """All branches if there is room, else those that matter now, in their order."""
        if len(self.branches) <= max(room, 1):
            return self.branches
        first = {"failed": 0, "running": 0, "waits": 0, "blocked": 1}
        rank = first | {"waiting": 2, "done": 3, "cached": 4}
        ranked = sorted(self.branches, key=lambda b: rank[self.stages[b.name].state])
        chosen = {branch.name for branch in ranked[: max(room, 1)]}
        return [Branch(name=b.name, prefix="") for b in self.branches if b.name in chosen]

    def _domains(self, columns: tuple[str, ...], domains: list[Progress]) -> list[RenderableType]:
        """All domains in one row: making them takes a moment."""
        order = ("failed", "blocked", "waits", "running", "waiting", "done", "cached")
        state = min((stage.state for stage in domains), key=order.index)
        ready = sum(stage.state in ("done", "cached") for stage in domains)
        cells: dict[str, RenderableType] = {
            "state": Text(*SYMBOLS[state]),
            "name": Text("domains", "dim" if state == "cached" else ""),
            "step": Text(f"{ready}/{len(domains)}", "dim"),
            "metric": Text("cached" if state == "cached" else "", "dim"),
        }
        if state in ("failed", "blocked"):
            broken = next(stage for stage in domains if stage.state == state)
            cells["metric"] = Text(f"{broken.name} {state}", SYMBOLS[state][1])
        return [cells.get(column, "") for column in columns]

    def _row(self, columns: tuple[str, ...], branch: Branch) -> list[RenderableType]:
        stage = self.stages[branch.name]
        symbol, style = SYMBOLS[stage.state]
        quiet = stage.state in ("waiting", "cached", "blocked")
        name_style = "dim" if quiet else "bold" if stage.state == "running" else ""
        cells: dict[str, RenderableType] = {
            "state": Text(symbol, style),
            "name": Text.assemble((branch.prefix, "dim"), (stage.name, name_style)),
            "metric": Text(stage.headline),
        }
        if stage.state in ("cached", "failed", "blocked", "waits"):
            cells["metric"] = Text(stage.state, style)
        if stage.state == "waiting" and stage.reason:
            cells["metric"] = Text("in another run", "dim")
        if stage.state == "running":
            cells["bar"] = ProgressBar(
                total=1.0, completed=stage.share, width=BAR_WIDTH, pulse=stage.step is None
            )
            cells["left"] = _left(stage.left)
        if stage.state in ("running", "done", "failed"):
            step, rate = stage.step, stage.rate
            cells["step"] = Text(f"{step[0]}/{step[1]}" if step else "")
            cells["rate"] = Text(f"{number(round(rate))} tok/s" if rate else "", "dim")
            cells["time"] = Text(clock(stage.elapsed))
        return [cells.get(column, "") for column in columns]

    # -- plain -----------------------------------------------------------------------------------

    def _plain(self, event: Event, stage: Progress) -> str | None:
        """The line that an event is worth, if any."""
        if event.kind == "started":
            self._told[stage.name] = time.monotonic()
            return f"started   {stage.name} ({stage.kind}): {stage.reason}"
        if event.kind == "progress":
            now = time.monotonic()
            first = stage.name not in self._told
            if "waiting" in event.payload:
                self._told[stage.name] = now
                return f"waiting   {stage.name}: {stage.reason}" if first else None
            if not first and now - self._told[stage.name] < PLAIN_SECONDS:
                return None
            self._told[stage.name] = now
            return f"running   {stage.name}: {_facts(stage)}"
        if event.kind == "finished":
            return f"finished  {stage.name}: {_facts(stage)}"
        if event.kind == "cached":
            return f"cached    {stage.name}" + (f": {stage.reason}" if stage.reason else "")
        return f"{event.kind:8}  {stage.name}: {stage.reason}"


def _left(seconds: float | None) -> Text:
    return Text("" if seconds is None else f"ETA {clock(seconds)}", "dim")


def _facts(stage: Progress) -> str:
    """Everything known about a stage on one line."""
    parts = [f"{stage.step[0]}/{stage.step[1]}" if stage.step else "", stage.headline]
    parts.append(f"{number(round(stage.rate))} tokens/s" if stage.rate else "")
    parts.append(clock(stage.elapsed))
    parts.append(f"ETA {clock(stage.left)}" if stage.left is not None else "")
    return ", ".join(filter(None, parts))
