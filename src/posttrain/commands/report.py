"""`report` and `recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from posttrain.commands.find import find_artifact
from posttrain.commands.output import console, emit
from posttrain.commands.page import check_report_path, write_report_of
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.language.loader import Loaded, describe, is_recipe, load_recipe, shipped_recipes


def report(
    name: str | None,
    *,
    settings: Sequence[str],
    suite: str | None,
    seed: int | None,
    store: Path,
    path: Path,
) -> None:
    """Write the report of a recipe, of an artifact, or of the newest evaluation, again."""
    check_report_path(path)
    place = Store(store)
    loaded = None
    if name is not None and is_recipe(name):
        loaded = load_recipe(name, store=place, settings=settings, suite=suite, seed=seed)
        artifact = _target(place, loaded)
    elif settings or suite is not None or seed is not None:
        raise ConfigError(
            f"--set, --suite and --seed belong to a recipe; {name or 'no target'} is none"
        )
    else:
        artifact = _newest_evaluation(place) if name is None else find_artifact(place, name)
    write_report_of(path, store=place, artifact=artifact, loaded=loaded, anew=True)
    console().print(Text(f"report of {artifact.label}: {path.absolute()}"), soft_wrap=True)


def _target(store: Store, loaded: Loaded) -> Artifact:
    artifact = store.find(loaded.graph.fingerprints()[loaded.graph.target])
    if artifact is None:
        raise StoreError(
            f"{loaded.graph.target} of recipe {loaded.name!r} with these settings is not in "
            f"{store.root}; `posttrain run` makes it, `posttrain plan` tells what differs"
        )
    return artifact


def _newest_evaluation(store: Store) -> Artifact:
    found = [artifact for artifact in store.list() if artifact.kind == "evaluate"]
    if not found:
        raise ConfigError(
            f"{store.root} has no evaluation to report on; name a recipe or an artifact "
            "(`posttrain ls`)"
        )
    return found[-1]


def recipes(*, as_json: bool) -> None:
    """Print every shipped recipe with one line about it and its source."""
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
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("recipe", "what it is", "source"):
        table.add_column(column, overflow="fold")
    for name, description in found.items():
        table.add_row(
            Text(name, "bold"), Text(description.summary), Text(description.source, "dim")
        )
    out.print(table)
