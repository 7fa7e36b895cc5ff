"""What goes into and out of several commands: their options, and where text and JSON are written.

With --json, standard output holds nothing but one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from posttrain.backends.given_memory import memory_size
from posttrain.engine.errors import ConfigError
from posttrain.engine.store import Store
from posttrain.engine.text import STEERING, plain_text

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or a .py file.")
]
ArtifactName = Annotated[
    str,
    typer.Argument(metavar="ARTIFACT", help="Name, name-fingerprint, or start of a fingerprint."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="STAGE.FIELD=VALUE (STAGE may be a glob) or a parameter of the recipe; repeatable.",
    ),
]
SuiteName = Annotated[
    str | None,
    typer.Option("--suite", metavar="NAME|PATH", help="Domains to use. Default: core."),
]


def local_path(text: str | Path) -> Path:
    """A path as an option or argument gives it. Raises typer.BadParameter for one that names the
    Hub: that is never a directory."""
    if str(text).startswith("hub:"):
        raise typer.BadParameter(
            f"{text} names a repository of the Hugging Face Hub, and a path is wanted here; "
            "`posttrain push` uploads to the Hub"
        )
    return Path(text)


def size_given(text: str) -> str:
    """The text of `--memory`, looked at before anything is done. Raises typer.BadParameter for one
    that is no number of bytes."""
    try:
        memory_size(text, "SIZE")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return text


StorePath = Annotated[
    Path,
    typer.Option(
        "--store",
        metavar="DIR",
        envvar="POSTTRAIN_STORE",
        parser=local_path,
        help="Where artifacts are.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every stage. Default: 0.")]
ReportPath = Annotated[
    Path,
    typer.Option("--report", metavar="PATH", parser=local_path, help="Where the report goes."),
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no report.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Stages at once. Default: number of cores; 1 on CUDA."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="Where models compute. auto: CUDA where torch sees one."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the model that learns; on CUDA only.")
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="TRACKER",
        envvar="POSTTRAIN_LOG",
        help="Also log to trackio, wandb or tensorboard; repeatable.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=size_given,
        help="What one stage may take of memory, such as 12GB. "
        "Default: POSTTRAIN_MEMORY, or three quarters of what there is.",
    ),
]
Estimate = Annotated[
    bool,
    typer.Option("--estimate", help="Also tell what it would take: tokens, memory, disk, time."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="TYPE", help="Round the weights: float32, bfloat16 or float16."
    ),
]
Merged = Annotated[
    bool, typer.Option("--merged", help="Of an adapter: whole weights with it in them.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; text for people goes to stderr.")
]
DEFAULT_STORE = Path("posttrain-store")
DEFAULT_REPORT = Path("report.html")

PIPE_WIDTH = 110
"""Columns assumed where the output is not a terminal."""


class SafeConsole(Console):
    """A console whose text steers no terminal, wherever it came from: a plain str is no markup, and
    what steers is written out."""

    def __init__(self, *, stderr: bool = False) -> None:
        """Writes to standard output, or to standard error."""
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich does; what rich itself sends to steer the terminal stays."""
        for segment in super().render(renderable, options):
            if segment.control or not STEERING.search(segment.text):
                yield segment
            else:
                yield Segment(plain_text(segment.text), segment.style)


def console(*, as_json: bool = False) -> Console:
    """For people: standard output, or standard error when JSON goes to standard output."""
    found = SafeConsole(stderr=as_json)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PIPE_WIDTH
    return found


def plain_table(*columns: str, show_header: bool = True) -> Table:
    """A table without lines; cells that do not fit are folded, never cut."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=show_header)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def tell_faults(out: Console, store: Store) -> None:
    """Say what in the store cannot be read; everything else goes on without it."""
    for fault in store.faults():
        out.print(Text(fault, "yellow"), soft_wrap=True)


def emit(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    # What JSON itself leaves as it is.
    text = STEERING.sub(lambda found: json.dumps(found[0])[1:-1], text)
    print(text, file=sys.stdout, flush=True)


def age(created: str) -> str:
    """How long ago a UTC time was, in one unit: "5 min", "3 h", "12 d"."""
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
