"""`adopt`, `verify` and `gc`: checkpoints into the store, whether it holds what was made, and what
may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from posttrain.backends.outside.headers import num_parameters
from posttrain.commands import io
from posttrain.commands.io import console, emit, plain_table, tell_faults
from posttrain.commands.run import PACKAGES
from posttrain.engine import ancestry
from posttrain.engine.ancestry import Removed
from posttrain.engine.atomic import human_bytes
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.provenance import capture
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.transfer import read_history
from posttrain.stages.adopting import adopt_checkpoint
from posttrain.stages.kinds import shown_kind

if TYPE_CHECKING:
    from posttrain.backends.checkpoint_source import CheckpointSource


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
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Bring a checkpoint from outside into the store, with its history if it was exported."""
    place = Store(store)
    # It reads templates, which `--help` has no use for.
    from posttrain.backends.checkpoint_source import find_checkpoint

    external = find_checkpoint(source, place.hashes.digest, store=place.root)
    if external.gguf is not None:
        raise ConfigError(
            f"{external.gguf}: a GGUF file is converted by the first run that starts from it "
            f"(--set base={external.gguf}, or r.model), and need not be adopted"
        )
    present = [a for a in place.list() if a.kind == "model" and a.name == name]
    for artifact in present:
        if artifact.payload["data"] != {"files": external.sha256}:
            raise StoreError(
                f"--name {name}: the store has another model of that name ({artifact.label}); "
                "choose another name"
            )
    adopted = adopt_checkpoint(
        place,
        external,
        name=name,
        copy=copy,
        metrics={"parameters": _parameters(external)},
        provenance=dict(capture([], packages=PACKAGES).facts)
        | {"source": str(external.directory), "origin": dict(external.origin)},
        history=read_history(external.directory),
    )
    if as_json:
        emit(
            {
                "name": adopted.name,
                "kind": adopted.kind,
                "fingerprint": adopted.fingerprint,
                "path": str(adopted.path),
                "history": [record["name"] for record in adopted.history],
                "was_present": bool(present) or adopted.name != name,
            }
        )
        return
    out = console()
    if adopted.name != name:
        out.print(
            Text(f"These files are in the store already, under the name {adopted.name!r}."),
            soft_wrap=True,
        )
    records = f", with the records of {len(adopted.history)} ancestors" if adopted.history else ""
    out.print(Text.assemble((adopted.name, "bold"), f"  {adopted.fingerprint}{records}"))
    out.print(Text(f"use it with --set base={adopted.name} or r.model({adopted.name!r})", "dim"))


def _parameters(external: CheckpointSource) -> int:
    """Numbers of a model; those of an adapter are beside its base's."""
    below = 0 if external.base is None else _parameters(external.base)
    return below + num_parameters(external.tensors)


def verify(
    artifacts: Annotated[
        list[str] | None, typer.Argument(metavar="ARTIFACT", help="Artifacts to check.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Check the whole store, as without any ARTIFACT.")
    ] = False,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Recompute the hashes of files, data and records along whole ancestries.

    Ends with exit code 1 when something is not what was made.
    """
    place = Store(store)
    problems: list[str] = []
    if artifacts and not everything:
        starts = [place.resolve(name) for name in artifacts]
    else:
        starts = place.list()
        problems += place.faults()
    checked: dict[str, Artifact] = {}
    for artifact in starts:
        problems += ancestry.verify(place, artifact, checked)
    records = set(checked)
    for artifact in checked.values():
        records |= {record["fingerprint"] for record in artifact.history}
    files = sum(len(artifact.files) for artifact in checked.values())
    if as_json:
        counts = {"artifacts": len(checked), "files": files, "records": len(records)}
        emit({"ok": not problems, "problems": problems, **counts})
    else:
        out = console()
        for problem in problems:
            out.print(Text.assemble(("✗ ", "bold red"), problem), soft_wrap=True)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        state = (count, "bold red") if problems else ("ok", "bold green")
        said = f"{files} files and {len(records)} records of {len(checked)} artifacts checked"
        out.print(Text.assemble(state, f": {said}"))
    if problems:
        raise typer.Exit(1)


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
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Remove artifacts that nothing needs.

    Kept is what an evaluation, a model from outside, or the newest artifact of each name descends
    from, themselves included, and what --keep names: an artifact, or all stages of a recipe. The
    rest is listed and, after a question, removed.
    """
    if only and not keep:
        raise ConfigError("--only keeps nothing but what --keep names; give at least one --keep")
    if as_json and not (dry_run or yes):
        raise ConfigError("--json asks no question; give --dry-run or --yes with it")
    place = Store(store)
    named = _named(place, keep or ())
    out = console(as_json=as_json)
    tell_faults(out, place)
    kept = named | _kept(place, only=only, unfinished=unfinished)
    removed = ancestry.gc(place, kept, dry_run=True)
    _list(out, place, removed)
    if removed and not dry_run and (yes or _confirm()):
        # Found out again under the lock: a run may have ended since the list was made.
        with place.alone():
            kept = named | _kept(place, only=only, unfinished=unfinished)
            listed = {item.path for item in removed}
            removed = ancestry.gc(place, kept, listed=listed)
        freed = human_bytes(sum(item.bytes for item in removed))
        out.print(Text(f"removed {len(removed)}, {freed} freed", "bold"))
    if as_json:
        items = [{"label": i.label, "path": str(i.path), "bytes": i.bytes} for i in removed]
        total = sum(item.bytes for item in removed)
        emit({"dry_run": dry_run, "removed": items, "bytes": total})


def _confirm() -> bool:
    try:
        return typer.confirm("Remove them?")
    except typer.Abort:
        raise ConfigError("nobody answered; give --yes to remove without asking") from None


def _list(out: Console, store: Store, found: Sequence[Removed]) -> None:
    if not found:
        out.print(Text(f"nothing to remove in {store.root}"), soft_wrap=True)
        return
    table = plain_table("artifact", "size", show_header=False)
    table.columns[1].justify = "right"
    for item in found:
        table.add_row(Text(item.label), human_bytes(item.bytes))
    out.print(table)
    total = human_bytes(sum(item.bytes for item in found))
    out.print(Text(f"{len(found)} not needed, {total}", "bold"))


def _kept(store: Store, *, only: bool, unfinished: bool) -> set[str]:
    """What stays without being named by --keep."""
    kept = set() if only else _roots(store)
    if not unfinished:
        # Their inputs stay by the rule of the newest of each name.
        kept |= {path.name for path in (store.root / "work").glob("*") if path.is_dir()}
    return kept


def _roots(store: Store) -> set[str]:
    """Every evaluation and outside model, and the newest artifact of each name."""
    artifacts = store.list()
    newest = {(a.kind, a.name): a.fingerprint for a in artifacts}
    # What a later run used under another name is not old, whenever it was made.
    used = {a.fingerprint for a in artifacts if a.name != store.names.now(a.fingerprint, a.name)}
    return {a.fingerprint for a in artifacts if _stays(a.kind)} | set(newest.values()) | used


def _stays(name: str) -> bool:
    """Whether all artifacts of a kind are kept: results, and what no run could make again."""
    kind = shown_kind(name)
    return "scores" in kind.makes or (kind.from_outside and kind.is_model())


def _named(store: Store, keep: Sequence[str]) -> set[str]:
    """Fingerprints meant by --keep: of an artifact, or of all stages of a recipe."""
    from posttrain.language.loader import is_recipe, load_recipe

    found: set[str] = set()
    for text in keep:
        if is_recipe(text):
            found |= set(load_recipe(text, store=store).graph.fingerprints().values())
        else:
            found.add(store.resolve(text).fingerprint)
    return found
