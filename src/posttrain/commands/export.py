"""`export`: artifacts out of the store, as directories that stand alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from posttrain.backends.outside.adapters import (
    BASE,
    BASE_FOLDER,
    CONFIG,
    WEIGHTS,
    is_adapter,
    read_adapter_config,
    read_pointer,
)
from posttrain.backends.outside.headers import FLOATS
from posttrain.commands import io
from posttrain.commands.io import console, emit
from posttrain.engine import ancestry, transfer
from posttrain.engine.atomic import human_bytes, write_whole
from posttrain.engine.errors import ConfigError, StoreError, choices_text
from posttrain.engine.record import Artifact, Record, label_of
from posttrain.engine.store import Store
from posttrain.engine.transfer import HISTORY, read_history
from posttrain.engine.unfinished import is_place
from posttrain.engine.work import CODE_DIFF
from posttrain.report.benchmarks import benchmarks_of
from posttrain.report.card import model_card
from posttrain.report.gather import scores_of
from posttrain.stages.kinds import shown_kind
from posttrain.stages.step_checkpoint import step_model


def export(
    artifact: io.ArtifactName,
    target: Annotated[
        Path, typer.Argument(metavar="DIR", parser=io.local_path, help="A new directory.")
    ],
    dtype: io.Dtype = None,
    merged: io.Merged = False,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Copy an artifact out of the store: a checkpoint that stands alone, with its history.

    An adapter takes its base along, in a folder `base`, unless that is on the Hub.
    With --merged, and where --dtype changes weights, the history stays behind:
    it vouches for other bytes.
    """
    place = Store(store)
    found = step_model(place, artifact) if is_place(artifact) else place.resolve(artifact)
    check_dtype(dtype, found)
    check_merged(merged, is_adapter(found.path), dtype, found)
    handed = hand_out(place, found, target, dtype=dtype, merged=merged)
    path = handed.path
    if as_json:
        files = sorted(file.name for file in path.iterdir())
        told = {"artifact": found.label, "path": str(path)}
        emit(
            told
            | {"files": files, "evaluations": handed.evaluations, "records": handed.record_labels}
            | {"rounded": handed.rounded}
        )
        return
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    text = Text.assemble((found.label, "bold"), f" -> {path} ({human_bytes(size)})")
    if handed.rounded:
        text.append(f", weights rounded to {dtype}, without its history")
    elif merged:
        text.append(", merged into its base, without its history")
    if handed.scores:
        text.append(f", card with the scores of {', '.join(handed.evaluations)}")
    out = console()
    out.print(text, soft_wrap=True)
    out.print(Text(f"files: {', '.join(sorted(f.name for f in path.iterdir()))}", "dim"))
    for line in carries(path, handed.records):
        out.print(Text(line, "dim"), soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What was copied out of the store."""

    path: Path
    scores: Sequence[Mapping[str, Any]]
    """The evaluations that the card tells of."""
    rounded: bool
    """Whether the weights were rounded; the history has then stayed behind."""

    @property
    def evaluations(self) -> list[str]:
        """The labels of `scores`."""
        return [label_of(score) for score in self.scores]

    @property
    def records(self) -> list[Record]:
        """What its history holds."""
        return read_history(self.path)

    @property
    def record_labels(self) -> list[str]:
        """The labels of `records`."""
        return [label_of(record) for record in self.records]


def hand_out(
    store: Store,
    found: Artifact,
    target: Path,
    *,
    dtype: str | None = None,
    merged: bool = False,
    repository: str | None = None,
) -> Handed:
    """Copy an artifact to the new directory `target`: a checkpoint with its card, which says how to
    load it from there or from the `repository` of the Hub that it is meant for.

    An adapter is `merged`, or names its base: on the Hub, or in a folder beside it. Raises as
    `transfer.exporting`, and ConfigError for an adapter that is meant for the Hub where its base is
    not there.
    """
    scores: Sequence[Mapping[str, Any]] = []
    rounded = False
    adapter = is_adapter(found.path)
    with transfer.exporting(store, found, target) as part:
        if adapter and merged:
            merge_adapter(found, part)
        elif adapter:
            take_base_along(store, found, part, target.absolute(), on_hub=repository is not None)
        if dtype is not None:
            rounded = round_weights(part, dtype)
        if shown_kind(found.kind).is_model():
            # The card that came with the files does not know what was scored since.
            scores = scores_of(store, found)
            ancestors = [a.record for a in ancestry.lineage(store, found)]
            card = model_card(
                found.record,
                scores,
                ancestors,
                benchmarks=benchmarks_of(store, found),
                adapter=adapter and not merged,
                repository=repository,
            )
            card += MERGED if merged else ""
            card += ROUNDED.format(dtype) if rounded else ""
            write_whole(part / "README.md", card.encode())
    return Handed(path=target.absolute(), scores=scores, rounded=rounded)


def carries(path: Path, records: Sequence[Record]) -> Iterator[str]:
    """What the files of an export say of the place where it was made, for whoever hands it on."""
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


def take_base_along(
    store: Store, found: Artifact, part: Path, target: Path, *, on_hub: bool
) -> None:
    """Let an exported adapter name its base: on the Hub, or in a folder beside it. Raises
    ConfigError where it has to be `on_hub` and is not."""
    pointer = read_pointer(found.path)
    base = None if pointer is None else store.find(pointer["fingerprint"])
    if base is None:
        raise StoreError(f"{part}: its base is not in the store; `posttrain verify` says more")
    (part / BASE).unlink(missing_ok=True)
    config = read_adapter_config(part)
    origin = base.provenance.get("origin", {})
    if "hub" in origin:
        config |= {"base_model_name_or_path": origin["hub"], "revision": origin["commit"]}
    elif on_hub:
        raise ConfigError(
            f"{found.label} is an adapter, and its base {base.label} did not come from the Hub, so "
            "that nobody could load it from there; add --merged for whole weights"
        )
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
