"""`adopt`, `export`, `verify` and `gc`: checkpoints into the store and out of it, whether it holds
what was made, and what may go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from posttrain.backends.checkpoint_source import find_checkpoint
from posttrain.commands.output import console, emit, plain_table
from posttrain.commands.run import PACKAGES
from posttrain.engine import ancestry, transfer
from posttrain.engine.ancestry import Removed
from posttrain.engine.atomic import guarded, write_whole
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.provenance import capture
from posttrain.engine.record import SHORT, Artifact
from posttrain.engine.store import Store
from posttrain.engine.transfer import read_history
from posttrain.language.loader import is_recipe, load_recipe
from posttrain.report.card import model_card
from posttrain.report.gather import scores_of
from posttrain.report.wording import size
from posttrain.stages.kinds import KINDS, shown_kind


def adopt(root: Path, source: str, *, name: str, copy: bool, as_json: bool) -> None:
    """Bring a checkpoint from outside into the store, with its history if it has one.

    Files that lie in the store itself are copied: `gc` could remove what a link points at.
    """
    store = Store(root)
    external = find_checkpoint(source, store.hashes.digest)
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
    adopted = transfer.adopt(
        store,
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
    artifact = store.resolve(name)
    path = transfer.export(store, artifact, target)
    scores = []
    if shown_kind(artifact.kind).is_model():
        scores = scores_of(store, artifact)
        card = model_card(
            name=artifact.name,
            kind=artifact.kind,
            fingerprint=artifact.fingerprint,
            config=artifact.config,
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


def verify(root: Path, names: Sequence[str], *, as_json: bool) -> bool:
    """Print every problem of the named artifacts and their ancestors, of all if none is named.

    Returns whether there is none.
    """
    store = Store(root)
    problems: list[str] = []
    artifacts, starts = _chosen(store, names, problems)
    for artifact in starts:
        problems += [p for p in ancestry.verify(store, artifact) if p not in problems]
    records: dict[str, Mapping[str, Any]] = {}
    for artifact in artifacts:
        records |= {record["fingerprint"]: record for record in artifact.history}
        records[artifact.fingerprint] = artifact.record
    counts = {
        "artifacts": len(artifacts),
        "files": sum(len(artifact.files) for artifact in artifacts),
        "records": len(records),
    }
    if as_json:
        emit({"ok": not problems, "problems": problems, **counts})
        return not problems
    out = console()
    for problem in problems:
        out.print(Text.assemble(("✗ ", "bold red"), problem), soft_wrap=True)
    state = ("ok", "bold green") if not problems else (f"{len(problems)} problems", "bold red")
    checked = f"{counts['files']} files and {counts['records']} records"
    out.print(Text.assemble(state, f": {checked} of {len(artifacts)} artifacts checked"))
    return not problems


def _chosen(
    store: Store, names: Sequence[str], problems: list[str]
) -> tuple[list[Artifact], list[Artifact]]:
    """All artifacts to check, and those among them whose ancestries cover them all."""
    if names:
        starts = [store.resolve(name) for name in names]
        found: dict[str, Artifact] = {}
        for start in starts:
            try:
                ancestors = ancestry.lineage(store, start)
            except StoreError:
                # `Store.verify` tells about the damaged record.
                found[start.fingerprint] = start
                continue
            found |= {a.artifact.fingerprint: a.artifact for a in ancestors if a.artifact}
        return list(found.values()), starts
    artifacts = []
    for path in store.index().values():
        try:
            artifacts.append(store.load(path))
        except StoreError as error:
            problems.append(str(error))
    used = {source["fingerprint"] for a in artifacts for source in a.inputs.values()}
    return artifacts, [a for a in artifacts if a.fingerprint not in used]


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
    removed = ancestry.gc(store, kept, dry_run=True)
    _list(out, store, removed)
    if removed and not dry_run and (yes or _confirm()):
        removed = ancestry.gc(store, kept, dry_run=False)
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
    table = plain_table("artifact", "size", show_header=False)
    table.columns[1].justify = "right"
    for item in found:
        table.add_row(Text(item.label), size(item.bytes))
    out.print(table)
    total = size(sum(item.bytes for item in found))
    out.print(Text(f"{len(found)} not needed, {total}", "bold"))


def _roots(store: Store) -> set[str]:
    """Every evaluation and outside model, and the newest artifact of each name."""
    artifacts = store.list()
    newest = {(a.kind, a.name): a.fingerprint for a in artifacts}
    return {a.fingerprint for a in artifacts if _stays(a.kind)} | set(newest.values())


def _stays(name: str) -> bool:
    """Whether all artifacts of a kind are kept: results, and what no run could make again."""
    kind = shown_kind(name)
    return "scores" in kind.makes or (kind.from_outside and kind.is_model())


def _named(store: Store, keep: Sequence[str]) -> set[str]:
    """Fingerprints meant by --keep: of an artifact, or of all stages of a recipe."""
    found: set[str] = set()
    for text in keep:
        if is_recipe(text):
            found |= set(load_recipe(text, store=store).graph.fingerprints().values())
        else:
            found.add(store.resolve(text).fingerprint)
    return found
