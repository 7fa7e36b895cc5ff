"""`push`: a checkpoint from the store to the Hugging Face Hub, with its card and its history."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from posttrain.backends.outside.adapters import is_adapter
from posttrain.backends.outside.hub import Pushed, repository, upload
from posttrain.commands import io
from posttrain.commands.export import Handed, carries, check_dtype, check_merged, hand_out
from posttrain.commands.io import console, emit, plain_table
from posttrain.engine.atomic import human_bytes
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.transfer import HISTORY
from posttrain.engine.unfinished import is_place
from posttrain.stages.kinds import shown_kind
from posttrain.stages.step_checkpoint import step_model

OF_DATA = ("rollouts.jsonl", "samples.jsonl")
"""Files of a training stage that hold rows of its data; they stay here."""


def push(
    artifact: io.ArtifactName,
    repo: Annotated[str, typer.Argument(metavar="hub:OWNER/NAME", help="A model on the Hub.")],
    dtype: io.Dtype = None,
    merged: io.Merged = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="A branch that is there. Default: main."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. Default: private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be uploaded.")
    ] = False,
    store: io.StorePath = io.DEFAULT_STORE,
    as_json: io.Json = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub as one commit, with its card and its history.

    The files are those of `export`, without the logs that hold rows of data.
    A repository that is not there yet is made, a private one.
    Log in with `hf auth login`, or set HF_TOKEN.
    """
    name = repository(repo)
    place = Store(store)
    found = step_model(place, artifact) if is_place(artifact) else place.resolve(artifact)
    if not shown_kind(found.kind).is_model():
        raise ConfigError(f"push {found.label}: no model but {found.kind}; only models are pushed")
    check_dtype(dtype, found)
    check_merged(merged, is_adapter(found.path), dtype, found)
    with tempfile.TemporaryDirectory(prefix="posttrain-push-") as folder:
        handed = hand_out(
            place, found, Path(folder) / "model", dtype=dtype, merged=merged, repository=name
        )
        for file in OF_DATA:
            (handed.path / file).unlink(missing_ok=True)
        pushed = None
        if not dry_run:
            message = f"{found.label}, made by posttrain"
            pushed = upload(handed.path, name, revision=revision, public=public, message=message)
        _tell(found, name, handed, pushed, as_json=as_json)


def _tell(
    found: Artifact, name: str, handed: Handed, pushed: Pushed | None, *, as_json: bool
) -> None:
    """Say what was uploaded, or would be."""
    sizes = {
        str(file.relative_to(handed.path)): file.stat().st_size
        for file in sorted(handed.path.rglob("*"))
        if file.is_file()
    }
    if as_json:
        told: dict[str, Any] = {"artifact": found.label, "repository": name, "files": sizes}
        told |= {"evaluations": handed.evaluations, "records": handed.record_labels}
        told |= {"rounded": handed.rounded, "pushed": pushed is not None}
        emit(told | ({} if pushed is None else {"url": pushed.url, "commit": pushed.commit}))
        return
    out = console()
    table = plain_table("file", "size", show_header=False)
    table.columns[1].justify = "right"
    for file, size in sizes.items():
        table.add_row(Text(file), human_bytes(size))
    out.print(table)
    for line in carries(handed.path, handed.records):
        out.print(Text(line, "dim"), soft_wrap=True)
    if handed.scores:
        out.print(Text(f"card with the scores of {', '.join(handed.evaluations)}", "dim"))
    if handed.rounded:
        out.print(Text(f"weights rounded, without {HISTORY}: it vouches for other bytes", "dim"))
    total = human_bytes(sum(sizes.values()))
    what = Text.assemble((found.label, "bold"), f" -> hub:{name} ({total})")
    if pushed is None:
        what.append(", nothing was uploaded")
    else:
        what.append(f"  {pushed.url} at {pushed.commit[:12]}")
    out.print(what, soft_wrap=True)
