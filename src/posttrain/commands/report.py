"""`report` and `recipes`; and the page that a run writes at its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from posttrain.commands import io
from posttrain.commands.io import console, emit, plain_table
from posttrain.engine.atomic import guarded
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.stages.kinds import shown_kind

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded


def report(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|ARTIFACT]", help="What it is about. Default: the newest evaluation."
        ),
    ] = None,
    settings: io.Settings = None,
    suite: io.SuiteName = None,
    store: io.StorePath = io.DEFAULT_STORE,
    seed: io.Seed = None,
    report: io.ReportPath = io.DEFAULT_REPORT,
) -> None:
    """Write the report again, from what is in the store."""
    from posttrain.language.loader import is_recipe, load_recipe

    check_report_path(report)
    place = Store(store)
    loaded = None
    if target is not None and is_recipe(target):
        loaded = load_recipe(target, store=place, settings=settings or (), suite=suite, seed=seed)
        artifact = _target(place, loaded)
    elif settings or suite is not None or seed is not None:
        raise ConfigError(
            f"--set, --suite and --seed belong to a recipe; {target or 'no target'} is none"
        )
    else:
        artifact = _newest_evaluation(place) if target is None else place.resolve(target)
    write_report_of(report, store=place, artifact=artifact, loaded=loaded, anew=True)
    console().print(Text(f"report of {artifact.label}: {report.absolute()}"), soft_wrap=True)


def _target(store: Store, loaded: Loaded) -> Artifact:
    artifact = store.find(loaded.graph.fingerprints()[loaded.graph.target])
    if artifact is None:
        raise StoreError(
            f"{loaded.graph.target} of recipe {loaded.name!r} with these settings is not in "
            f"{store.root}; `posttrain run` makes it, `posttrain plan` tells what differs"
        )
    return artifact


def _newest_evaluation(store: Store) -> Artifact:
    found = [artifact for artifact in store.list() if "scores" in shown_kind(artifact.kind).makes]
    if not found:
        raise ConfigError(
            f"{store.root} has no evaluation to report on; name a recipe or an artifact "
            "(`posttrain ls`)"
        )
    return found[-1]


def check_report_path(report: Path) -> None:
    """Raise ConfigError, before any work is done, for a path that no report can be written to."""
    folder = report.absolute().parent
    if report.is_dir():
        problem = f"that is a directory; name a file, such as {report / 'report.html'}"
    elif not folder.is_dir():
        problem = f"the directory {folder} does not exist; make it"
    elif not os.access(folder, os.W_OK):
        problem = f"the directory {folder} cannot be written to; name another one"
    else:
        return
    raise ConfigError(f"--report {report}: {problem}")


def write_report_of(
    path: Path,
    *,
    store: Store,
    artifact: Artifact,
    loaded: Loaded | None = None,
    seconds: float | None = None,
    anew: bool = False,
) -> bool:
    """Write the page about `artifact`; returns False where it was there already (unless `anew`).

    `loaded` is the recipe that asked for it, None where only the artifact is known. `seconds` is
    how long the run took that made it. Raises StoreError for a full disk.
    """
    # Templates and plots take a while to import, and most commands do without.
    from posttrain.report.html import report_is_current, write_report

    names = {} if loaded is None else names_of(loaded)
    # What is to be told about a recipe is no part of the artifact.
    anew = anew or (loaded is not None and bool(loaded.warnings))
    if not anew and report_is_current(path, artifact.fingerprint, names):
        return False
    if loaded is None:
        recipe, source, warnings = artifact.name, "", []
        seed = int(artifact.config.get("seed", 0))
    else:
        recipe, seed = loaded.name, loaded.seed
        source = loaded.path.read_text(encoding="utf-8")
        warnings = [{"stage": w.stage, "text": w.text} for w in loaded.warnings]
    with guarded(path.absolute().parent, "writing the report"):
        write_report(
            path,
            store=store,
            artifact=artifact,
            recipe=recipe,
            seed=seed,
            seconds=seconds,
            source=source,
            warnings=warnings,
            names=names,
        )
    return True


def names_of(loaded: Loaded) -> dict[str, str]:
    """Fingerprint to what the recipe calls the stage; of two equal stages the first."""
    found: dict[str, str] = {}
    for name, fingerprint in loaded.graph.fingerprints().items():
        found.setdefault(fingerprint, name)
    return found


def recipes(as_json: io.Json = False) -> None:
    """List the shipped recipes, each with its source."""
    from posttrain.language.loader import describe, shipped_recipes

    found = {name: describe(path) for name, path in shipped_recipes().items()}
    if as_json:
        emit(
            {
                "recipes": [
                    {"name": name, "summary": d.summary, "source": d.source}
                    for name, d in found.items()
                ]
            }
        )
        return
    out = console()
    table = plain_table("recipe", "what it is", "source")
    for name, description in found.items():
        table.add_row(
            Text(name, "bold"), Text(description.summary), Text(description.source, "dim")
        )
    out.print(table)
