"""`adopt`, `export` and `gc`: checkpoints into the store, out of it, and what may go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.commands.find import find_artifact
from posttrain.commands.output import console, emit
from posttrain.commands.run import PACKAGES
from posttrain.engine.ancestry import Removed
from posttrain.engine.atomic import guarded, write_whole
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.provenance import capture
from posttrain.engine.record import SHORT
from posttrain.engine.store import Store
from posttrain.engine.transfer import read_history
from posttrain.external import find_external
from posttrain.loading import is_recipe, load_recipe
from posttrain.report.card import model_card
from posttrain.report.gather import scores_of
from posttrain.report.wording import size
from posttrain.stages.kinds import KINDS, shown_kind


def adopt(root: Path, source: str, *, name: str, copy: bool, as_json: bool) -> None:
    """Bring a checkpoint from outside into the store, with its history if it has one.

    Files that lie in the store itself are copied: `gc` could remove what a link points at.
    """
    store = Store(root)
    external = find_external(source, store.hashes.digest)
    present = [a for a in store.list() if a.kind == "model" and a.name == name]
    for artifact in present:
        if artifact.payload["data"] != {"files": external.sha256}:
            raise StoreError(
                f"--name {name}: the store has another model of that name ({artifact.label}); "
                "choose another name"
            )
    inside = any(
        (external.directory / file).resolve().is_relative_to(root.resolve())
        for file in external.files
    )
    adopted = store.adopt(
        external.directory,
        name=name,
        kind="model",
        files=external.files,
        link=not (copy or inside),
        metrics={"parameters": count_parameters(external.directory)},
        provenance=dict(capture([], packages=PACKAGES).facts) | {"source": str(external.directory)},
        data={"files": external.sha256},
        history=read_history(external.directory),
        version=KINDS["model"].version,
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


def count_parameters(directory: Path) -> int:
    """Parameters in the safetensors files of a directory, from their headers alone.

    Format: 8 bytes little-endian length of a JSON header, which has the shape of every tensor.
    """
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size:
                raise ConfigError(f"{path}: not a safetensors file (its header is damaged)")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ConfigError(f"{path}: not a safetensors file ({error})") from error
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for length_of_axis in tensor["shape"]:
                    count *= length_of_axis
                total += count
    return total


def export(root: Path, name: str, target: Path, *, as_json: bool) -> None:
    """Copy an artifact out of the store; a model with a card that has its scores by now."""
    store = Store(root)
    artifact = find_artifact(store, name)
    path = store.export(artifact, target)
    scores = []
    if shown_kind(artifact.kind).is_model():
        scores = scores_of(store, artifact)
        card = model_card(
            name=artifact.name,
            kind=artifact.kind,
            fingerprint=artifact.fingerprint,
            config=artifact.payload["config"],
            inputs=artifact.inputs,
            metrics=artifact.metrics,
            scores=scores,
        )
        with guarded(path, "writing the model card"):
            write_whole(path / "README.md", card.encode())
    evaluations = [f"{s['name']}-{s['fingerprint'][:SHORT]}" for s in scores]
    files = sorted(file.name for file in path.iterdir())
    if as_json:
        emit(
            {
                "artifact": artifact.label,
                "path": str(path),
                "files": files,
                "evaluations": evaluations,
            }
        )
        return
    text = Text.assemble((artifact.label, "bold"), f" -> {path} ({size(artifact.bytes)})")
    if scores:
        text.append(f", card with the scores of {', '.join(evaluations)}")
    console().print(text, soft_wrap=True)


def gc(
    root: Path,
    *,
    keep: Sequence[str],
    only: bool,
    unfinished: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove what neither the usual roots nor --keep need; asks first."""
    if only and not keep:
        raise ConfigError("--only keeps nothing but what --keep names; give at least one --keep")
    if as_json and not (dry_run or yes):
        raise ConfigError("--json asks no question; give --dry-run or --yes with it")
    store = Store(root)
    kept = _named(store, keep) | (set() if only else _roots(store))
    if not unfinished:
        # Their inputs stay by the rule of the newest of each name.
        kept |= {path.name for path in (store.root / "work").glob("*") if path.is_dir()}
    out = console(as_json=as_json)
    removed = store.gc(kept, dry_run=True)
    _list(out, store, removed)
    if removed and not dry_run and (yes or _confirm()):
        removed = store.gc(kept, dry_run=False)
        freed = size(sum(item.bytes for item in removed))
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
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for item in found:
        table.add_row(Text(item.label), size(item.bytes))
    out.print(table)
    total = size(sum(item.bytes for item in found))
    out.print(Text(f"{len(found)} not needed, {total}", "bold"))


def _roots(store: Store) -> set[str]:
    """Every evaluation and outside model, and the newest artifact of each name."""
    artifacts = store.list()
    newest = {(a.kind, a.name): a.fingerprint for a in artifacts}
    always = {a.fingerprint for a in artifacts if a.kind in ("evaluate", "model")}
    return always | set(newest.values())


def _named(store: Store, keep: Sequence[str]) -> set[str]:
    """Fingerprints meant by --keep: of an artifact, or of all stages of a recipe."""
    found: set[str] = set()
    for text in keep:
        if is_recipe(text):
            found |= set(load_recipe(text, store=store).graph.fingerprints().values())
        else:
            found.add(find_artifact(store, text).fingerprint)
    return found
