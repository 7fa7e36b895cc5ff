"""`adopt`, `export`, `verify` and `gc`: checkpoints into the store and out of it, whether it holds
what was made, and what may go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from posttrain.backends.checkpoint_source import CheckpointSource, find_checkpoint
from posttrain.backends.outside.adapters import (
    BASE,
    BASE_FOLDER,
    CONFIG,
    WEIGHTS,
    is_adapter,
    read_adapter_config,
    read_pointer,
)
from posttrain.backends.outside.headers import FLOATS, num_parameters
from posttrain.commands import io
from posttrain.commands.io import console, emit, plain_table, tell_faults
from posttrain.commands.run import PACKAGES
from posttrain.engine import ancestry, transfer
from posttrain.engine.ancestry import Removed
from posttrain.engine.atomic import human_bytes, write_whole
from posttrain.engine.errors import ConfigError, StoreError, choices_text
from posttrain.engine.provenance import capture
from posttrain.engine.record import Artifact, Record, label_of
from posttrain.engine.store import Store
from posttrain.engine.transfer import HISTORY, read_history
from posttrain.engine.unfinished import is_place
from posttrain.engine.work import CODE_DIFF
from posttrain.report.card import model_card
from posttrain.report.gather import scores_of
from posttrain.stages.adopting import adopt_checkpoint
from posttrain.stages.kinds import shown_kind
from posttrain.stages.step_checkpoint import step_model


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
    external = find_checkpoint(source, place.hashes.digest, store=place.root)
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


def export(
    artifact: io.ArtifactName,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="TYPE", help="Round the weights: float32, bfloat16 or float16."
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of an adapter: whole weights with it in them.")
    ] = False,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Copy an artifact out of the store: a checkpoint that stands alone, with its history.

    An adapter takes its base along, in a folder `base`, unless that is on the Hub. With --merged,
    and with --dtype and weights of another type, the history stays behind: it vouches for other
    bytes.
    """
    place = Store(store)
    found = step_model(place, artifact) if is_place(artifact) else place.resolve(artifact)
    check_dtype(dtype, found)
    adapter = is_adapter(found.path)
    check_merged(merged, adapter, dtype, found)
    scores, rounded = [], False
    with transfer.exporting(place, found, target) as part:
        if adapter and merged:
            merge_adapter(found, part)
        elif adapter:
            take_base_along(place, found, part, target.absolute())
        if dtype is not None:
            rounded = round_weights(part, dtype)
        if shown_kind(found.kind).is_model():
            # The card that came with the files does not know what was scored since.
            scores = scores_of(place, found)
            ancestors = [a.record for a in ancestry.lineage(place, found)]
            card = model_card(found.record, scores, ancestors, adapter=adapter and not merged)
            card += MERGED if merged else ""
            card += ROUNDED.format(dtype) if rounded else ""
            write_whole(part / "README.md", card.encode())
    path = target.absolute()
    evaluations = [label_of(score) for score in scores]
    carried = read_history(path)
    if as_json:
        files = sorted(file.name for file in path.iterdir())
        told = {"artifact": found.label, "path": str(path)}
        records = [label_of(record) for record in carried]
        emit(
            told
            | {"files": files, "evaluations": evaluations, "records": records, "rounded": rounded}
        )
        return
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    text = Text.assemble((found.label, "bold"), f" -> {path} ({human_bytes(size)})")
    if rounded:
        text.append(f", weights rounded to {dtype}, without its history")
    elif merged:
        text.append(", merged into its base, without its history")
    if scores:
        text.append(f", card with the scores of {', '.join(evaluations)}")
    out = console()
    out.print(text, soft_wrap=True)
    for line in _carries(path, carried):
        out.print(Text(line, "dim"), soft_wrap=True)


def _carries(path: Path, records: Sequence[Record]) -> Iterator[str]:
    """What an export holds, for whoever hands it on: its files, and what they say of the place
    where it was made."""
    yield f"files: {', '.join(sorted(file.name for file in path.iterdir()))}"
    if (path / CODE_DIFF).exists():
        yield (
            f"{CODE_DIFF}: the changes of tracked files that were not committed, and the names of "
            "untracked ones"
        )
    if not records:
        return
    facts = [record["provenance"] for record in records]
    hosts = dict.fromkeys(str(one["host"]) for one in facts if one.get("host"))
    texts = dict.fromkeys(
        str(text.get("path")) for one in facts for text in one.get("texts", {}).values()
    )
    yield (
        f"{HISTORY}: records of {len(records)} artifacts with settings, metrics, command lines"
        + (f", the name of the host ({', '.join(hosts)})" if hosts else "")
        + (f", the text of {', '.join(texts)}" if texts else "")
    )


ROUNDED = """
## Rounded

The weights were rounded to {} when this was exported. Its record is that of other bytes.
"""


MERGED = """
## Merged

The adapter was merged into the weights of its base when this was exported. Its record is that of
the adapter.
"""


def check_merged(merged: bool, adapter: bool, dtype: str | None, found: Artifact) -> None:
    """Raise ConfigError for options that an artifact has no use for."""
    if merged and not adapter:
        raise ConfigError(f"--merged: {found.label} is no adapter; leave the option out")
    if adapter and dtype is not None and not merged:
        raise ConfigError(
            f"--dtype {dtype}: {found.label} is an adapter, which stays as it was trained; add "
            "--merged for whole weights of that type"
        )


def merge_adapter(found: Artifact, part: Path) -> None:
    """Put whole weights in the place of an adapter's files, in the types of its base."""
    # They import torch.
    from posttrain.backends.checkpoint import load, save
    from posttrain.backends.saved_types import read_types
    from posttrain.backends.scalar import load_scalar, save_scalar

    for name in (CONFIG, WEIGHTS, BASE, transfer.HISTORY):
        (part / name).unlink(missing_ok=True)
    scores = read_adapter_config(found.path).get("task_type") == "SEQ_CLS"
    types = read_types(found.path)
    if scores:
        save_scalar(load_scalar(found.path), part, types=types)
    else:
        save(load(found.path), part, types=types)


def take_base_along(store: Store, found: Artifact, part: Path, target: Path) -> None:
    """Let an exported adapter name its base: on the Hub, or in a folder beside it."""
    pointer = read_pointer(found.path)
    base = None if pointer is None else store.find(pointer["fingerprint"])
    if base is None:
        raise StoreError(f"{part}: its base is not in the store; `posttrain verify` says more")
    (part / BASE).unlink(missing_ok=True)
    config = read_adapter_config(part)
    origin = base.provenance.get("origin", {})
    if "hub" in origin:
        config |= {"base_model_name_or_path": origin["hub"], "revision": origin["commit"]}
    else:
        transfer.export(store, base, part / BASE_FOLDER)
        config |= {"base_model_name_or_path": str(target / BASE_FOLDER)}
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(part / CONFIG, content.encode())


def check_dtype(dtype: str | None, found: Artifact) -> None:
    """Raise ConfigError for a type that weights cannot have, or an artifact without weights."""
    choices = sorted({*FLOATS.values()} - {"float64"})
    if dtype is not None and dtype not in choices:
        raise ConfigError(f"--dtype {dtype}: {choices_text(dtype, choices)}")
    if dtype is not None and not shown_kind(found.kind).is_model():
        raise ConfigError(f"--dtype {dtype}: {found.label} is no model; leave the option out")


def round_weights(path: Path, dtype: str) -> bool:
    """Round the weights of an export; whether that changed any. Its history then goes."""
    # It imports torch.
    from posttrain.backends.saved_types import recast

    rounded = recast(path, dtype)
    if rounded:
        (path / transfer.HISTORY).unlink(missing_ok=True)
    return rounded


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
