"""Adapters that come into a store, together with the base they stand on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.backends.outside.adapters import CONFIG
from posttrain.engine import transfer
from posttrain.engine.record import Artifact, Record
from posttrain.engine.store import Store
from posttrain.stages.kinds import KINDS

if TYPE_CHECKING:  # it reads templates, which `--help` has no use for
    from posttrain.backends.checkpoint_source import CheckpointSource


def adopt_checkpoint(
    store: Store,
    external: CheckpointSource,
    *,
    name: str,
    copy: bool,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    history: Sequence[Record] = (),
) -> Artifact:
    """Commit a checkpoint from outside as a model of that name; `copy` its files, or link them.

    The base of an adapter is adopted before it, as NAME_base, with the history that lies beside it;
    the small files of the adapter itself are always copied. Raises StoreError as `transfer.adopt`.
    """
    # Files that lie in the store itself are copied: `gc` could remove what a link points at.
    inside = any(
        (external.directory / file).resolve().is_relative_to(store.root.resolve())
        for file in external.files
    )
    how: dict[str, Any] = {
        "name": name,
        "kind": "model",
        "metrics": metrics,
        "provenance": provenance,
        "data": {"files": external.sha256},
        "history": history,
        "version": KINDS["model"].version,
    }
    if external.base is None:
        link = not (copy or inside)
        return transfer.adopt(store, external.directory, files=external.files, link=link, **how)
    base = adopt_checkpoint(
        store,
        external.base,
        name=f"{name}_base",
        copy=copy,
        metrics={},
        provenance=dict(provenance)
        | {"source": str(external.base.directory), "origin": dict(external.base.origin)},
        history=transfer.read_history(external.base.directory),
    )
    # It reads a tokenizer, which imports transformers.
    from posttrain.stages.models import place_adapter

    with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
        out = Path(scratch)
        own = [file for file in external.files if file != CONFIG]
        for file in own:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(external.directory / file, out / file)
        place_adapter(external.directory, own, base.path, out)
        files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
        return transfer.adopt(store, out, files=files, link=False, inputs={"base": base}, **how)
