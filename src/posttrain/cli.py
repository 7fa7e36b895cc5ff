"""The command line: names, options and help of every command, and how an error ends it.

Only typer is imported here, so that `posttrain --help` is quick; what a command does is in
`posttrain.commands`, imported when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

MAKE, LOOK, KEEP = "Make", "Look", "Keep"

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
    typer.Option("--suite", metavar="NAME|PATH", help="Domains to use.  [default: core]"),
]
StorePath = Annotated[
    Path,
    typer.Option("--store", metavar="DIR", envvar="POSTTRAIN_STORE", help="Where artifacts are."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of every stage.  [default: 0]")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; text for people goes to stderr.")
]
DEFAULT_STORE = Path("posttrain-store")
DEFAULT_REPORT = Path("report.html")

app = typer.Typer(
    name="posttrain",
    help="Whole LLM post-training recipes: traced, resumable, from a laptop CPU upwards.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done, 1 work failed, 2 a mistake in what was asked, 130 stopped by the user.
    """
    from posttrain.engine.errors import PosttrainError

    command = typer.main.get_command(app)
    try:
        result = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="posttrain",
            standalone_mode=False,
        )
    except PosttrainError as error:
        _complain(str(error), *getattr(error, "__notes__", ()))
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "posttrain"
        _complain(error.format_message(), f"`{path} --help` lists what it takes")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except BrokenPipeError:
        # Who read our output has gone; there is nobody to tell.
        sys.stderr.close()
        return 1
    if result == 130:
        _complain("stopped; to go on, run the same command again")
    return result if isinstance(result, int) else 0


def _complain(message: str, *notes: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from posttrain import __version__

        print(f"posttrain {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(rich_help_panel=MAKE)
def run(
    recipe: RecipeName,
    settings: Settings = None,
    suite: SuiteName = None,
    store: StorePath = DEFAULT_STORE,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Stages at once.  [default: number of cores]"),
    ] = None,
    seed: Seed = None,
    report: Annotated[
        Path, typer.Option("--report", metavar="PATH", help="Where the report goes.")
    ] = DEFAULT_REPORT,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Json = False,
) -> None:
    """Make what a recipe asks for. What the store has already is not made again."""
    from posttrain.commands import run as work

    request = work.Request(
        recipe=recipe, store=store, settings=settings or (), suite=suite, seed=seed
    )
    failure = work.run(request, jobs=jobs, report=None if no_report else report, as_json=as_json)
    if failure is not None:
        raise failure


@app.command(rich_help_panel=MAKE)
def plan(
    recipe: RecipeName,
    settings: Settings = None,
    suite: SuiteName = None,
    store: StorePath = DEFAULT_STORE,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Tell what `run` would do, stage by stage, and why. Runs nothing."""
    from posttrain.commands import run as work

    request = work.Request(
        recipe=recipe, store=store, settings=settings or (), suite=suite, seed=seed
    )
    work.plan(request, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
