"""`report` and `recipes`; and the page that a run writes at its end."""

from __future__ import annotations

import os
import time
from datetime import datetime
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
from posttrain.report.watching import Watched, of_run, of_stages
from posttrain.stages.kinds import shown_kind

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded


DEFAULT_LIVE = Path("live.html")
LIVE_SECONDS = 5.0
"""Between two writings of the page of a run."""


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
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="PATH", help="Where it goes. Default: report.html, or live.html."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="A page about a run while it goes on, until it ends."),
    ] = False,
) -> None:
    """Write the report again, from what is in the store."""
    from posttrain.language.loader import is_recipe, load_recipe

    report = report or (DEFAULT_LIVE if live else io.DEFAULT_REPORT)
    check_report_path(report)
    place = Store(store)
    if live:
        write_live(report, place, target, settings=settings, suite=suite, seed=seed)
        return
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


def write_live(
    path: Path,
    store: Store,
    target: str | None,
    *,
    settings: list[str] | None,
    suite: str | None,
    seed: int | None,
) -> None:
    """Write a page about a run again and again until the run ends, or until Ctrl-C.

    It shows the stages of the recipe `target`, or without one those that run and what they descend
    from. It waits for a run that has not begun. Raises ConfigError for a target that is no recipe.
    """
    from posttrain.language.loader import is_recipe, load_recipe

    loaded = None
    if target is not None and is_recipe(target):
        loaded = load_recipe(target, store=store, settings=settings or (), suite=suite, seed=seed)
    elif target is not None or settings or suite is not None or seed is not None:
        raise ConfigError(
            f"--live is about a run: give the recipe that runs, with its --set, --suite and "
            f"--seed, or nothing{f'; {target} is no recipe' if target else ''}"
        )
    console().print(Text(f"live: {path.absolute()}"), soft_wrap=True)
    page = _Live(path, store, loaded)
    try:
        while page.write():
            time.sleep(LIVE_SECONDS)
    except KeyboardInterrupt:
        # That is how one ends it; what was last written would go on loading itself.
        page.end()


class _Live:
    """A page about a run, while it is written."""

    def __init__(self, path: Path, store: Store, loaded: Loaded | None) -> None:
        self.path, self.store, self.loaded = path, store, loaded
        self.seen: dict[str, None] = {}
        """Fingerprints of what ran since."""

    def write(self) -> bool:
        """Write the page once; returns whether it is to be written again."""
        # Before looking: what ends meanwhile is seen once more.
        used = self.store.used()
        stages = self._stages()
        self.seen |= {s.facts.fingerprint: None for s in stages if s.state == "running"}
        goes_on = used or not self.seen
        self._put(stages, LIVE_SECONDS if goes_on else None)
        return goes_on

    def end(self) -> None:
        """Write it for the last time."""
        self._put(self._stages(), None)

    def _stages(self) -> list[Watched]:
        if self.loaded is None:
            return of_run(self.store, self.seen)
        graph = self.loaded.graph
        prints = graph.fingerprints()
        return of_stages(self.store, ((n, graph.nodes[n].kind, prints[n]) for n in graph.order()))

    def _put(self, stages: list[Watched], seconds: float | None) -> None:
        from posttrain.report.live_page import write_live_page

        title = self.loaded.name if self.loaded else self.store.root.name
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with guarded(self.path.absolute().parent, "writing the page"):
            write_live_page(self.path, stages, title=title, now=now, seconds=seconds)


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
