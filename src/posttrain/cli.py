"""The command line: names, options and help of every command, and how an error ends it.

Only typer is imported here, so that `posttrain --help` is quick; what a command does is in
`posttrain.commands`, imported when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

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

app = typer.Typer(
    name="posttrain",
    help="Whole LLM post-training recipes: traced, resumable, from a laptop CPU upwards.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done, 1 work failed, 2 a mistake in what was asked, 3 a file is to be filled in, 130 stopped
    by the user.
    """
    from posttrain.engine.errors import PosttrainError, Waiting

    command = typer.main.get_command(app)
    try:
        result = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="posttrain",
            standalone_mode=False,
        )
    except Waiting as error:
        _complain(str(error), label="waiting: ", style="bold yellow")
        return error.exit_code
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


def _complain(message: str, *notes: str, label: str = "error: ", style: str = "bold red") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((label, style), message), soft_wrap=True)
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
        typer.Option("--jobs", min=1, help="Stages at once. Default: number of cores; 1 on CUDA."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option("--device", help="Where models compute. auto: CUDA where torch sees one."),
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model that learns; on CUDA only.")
    ] = False,
    seed: Seed = None,
    report: ReportPath = DEFAULT_REPORT,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Json = False,
) -> None:
    """Make what a recipe asks for. What the store has already is not made again."""
    from posttrain.commands import run as work

    request = work.Request(
        recipe=recipe, store=store, settings=settings or (), suite=suite, seed=seed
    )
    failure = work.run(
        request,
        jobs=jobs,
        device=device,
        compile=compile,
        report=None if no_report else report,
        as_json=as_json,
    )
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


@app.command(rich_help_panel=MAKE)
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes, each with its source."""
    from posttrain.commands import report as work

    work.recipes(as_json=as_json)


@app.command(rich_help_panel=LOOK)
def ls(store: StorePath = DEFAULT_STORE, as_json: Json = False) -> None:
    """List all artifacts, newest first."""
    from posttrain.commands import inspect

    inspect.ls(store, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def show(artifact: ArtifactName, store: StorePath = DEFAULT_STORE, as_json: Json = False) -> None:
    """Show the record of an artifact: inputs, settings, metrics, files, provenance."""
    from posttrain.commands import inspect

    inspect.show(store, artifact, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def lineage(
    artifact: ArtifactName, store: StorePath = DEFAULT_STORE, as_json: Json = False
) -> None:
    """Show what an artifact descends from."""
    from posttrain.commands import inspect

    inspect.lineage(store, artifact, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def diff(
    a: ArtifactName,
    b: ArtifactName,
    store: StorePath = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Show in which settings, data and ancestors two artifacts differ, and their metrics."""
    from posttrain.commands import inspect

    inspect.diff(store, a, b, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def verify(
    artifacts: Annotated[
        list[str] | None, typer.Argument(metavar="ARTIFACT", help="Artifacts to check.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Check the whole store, as without any ARTIFACT.")
    ] = False,
    store: StorePath = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Recompute the hashes of files, data and records along whole ancestries.

    Ends with exit code 1 when something is not what was made.
    """
    from posttrain.commands import store as work

    names = [] if everything else artifacts or []
    if not work.verify(store, names, as_json=as_json):
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def report(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|ARTIFACT]", help="What it is about. Default: the newest evaluation."
        ),
    ] = None,
    settings: Settings = None,
    suite: SuiteName = None,
    store: StorePath = DEFAULT_STORE,
    seed: Seed = None,
    report: ReportPath = DEFAULT_REPORT,
) -> None:
    """Write the report again, from what is in the store."""
    from posttrain.commands import report as work

    work.report(target, settings=settings or (), suite=suite, seed=seed, store=store, path=report)


@app.command(rich_help_panel=LOOK)
def chat(
    model: Annotated[
        str, typer.Argument(metavar="ARTIFACT|DIR", help="A model of the store, or a checkpoint.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this one message.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest response.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    store: StorePath = DEFAULT_STORE,
) -> None:
    """Talk to a model, one message at a time."""
    from posttrain.commands import chat as work

    work.chat(
        store,
        model,
        prompt=prompt,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


@app.command(rich_help_panel=KEEP)
def adopt(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint directory, or a Hub id.")
    ],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What recipes call it: --set base=NAME.")
    ],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the files; without it they are linked.")
    ] = False,
    store: StorePath = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Bring a checkpoint from outside into the store, with its history if it was exported."""
    from posttrain.commands import store as work

    work.adopt(store, source, name=name, copy=copy, as_json=as_json)


@app.command(rich_help_panel=KEEP)
def export(
    artifact: ArtifactName,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    store: StorePath = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Copy an artifact out of the store: a checkpoint that stands alone, with its history."""
    from posttrain.commands import store as work

    work.export(store, artifact, target, as_json=as_json)


@app.command(rich_help_panel=KEEP)
def gc(
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="RECIPE|ARTIFACT", help="Keep this and all it needs; repeatable."
        ),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Keep nothing but what --keep names.")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Remove checkpoints of unfinished stages too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StorePath = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Remove artifacts that nothing needs.

    Kept is what an evaluation, a model from outside, or the newest artifact of each name descends
    from, themselves included, and what --keep names: an artifact, or all stages of a recipe. The
    rest is listed and, after a question, removed.
    """
    from posttrain.commands import store as work

    work.gc(
        store,
        keep=keep or (),
        only=only,
        unfinished=unfinished,
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )


if __name__ == "__main__":
    sys.exit(main())
