"""Arguments and options that several commands take, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
StorePath = Annotated[
    Path,
    typer.Option("--store", metavar="DIR", envvar="POSTTRAIN_STORE", help="Where artifacts are."),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every stage. Default: 0.")]
ReportPath = Annotated[
    Path, typer.Option("--report", metavar="PATH", help="Where the report goes.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; text for people goes to stderr.")
]
DEFAULT_STORE = Path("posttrain-store")
DEFAULT_REPORT = Path("report.html")
