"""The model that a step checkpoint of an unfinished stage holds, as an artifact of the store.

A step checkpoint has the tensors of the learner alone. To make a checkpoint of them, the learner is
made as the stage makes it, takes the tensors back, and saves its model, the moving average where
there is one. That is done once: the artifact is a model like one that was adopted, with the
identity of its files, and stays when the stage goes on.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.backends.outside.adapters import is_adapter, read_pointer
from posttrain.engine import transfer
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.hashes import HASHES
from posttrain.engine.inputs import check_inputs
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.engine.unfinished import Unfinished, find_unfinished, split_place, unfinished
from posttrain.stages.adopting import adopt_checkpoint
from posttrain.stages.kinds import KINDS, kind_of

if TYPE_CHECKING:  # it reads templates, which `--help` has no use for
    from posttrain.backends.checkpoint_source import CheckpointSource

PART = "policy/"
"""The part of a stage's state that is its model."""


def step_model(store: Store, text: str) -> Artifact:
    """The model of `NAME@step` or `NAME@step-120`. Needs torch where it was not asked for before.

    Raises StoreError as `find_unfinished`, and ConfigError for a stage that trains no model.
    """
    name, step = split_place(text)
    if step is not None:
        # Taken out before, whatever has become of the stage since.
        kept = [a for a in store.named("model", name_of(name, step)) if "stage" in a.provenance]
        newer = any(one.name == name and one.step == step for one in unfinished(store))
        if kept and not newer:
            return kept[-1]
    stage = find_unfinished(store, text)
    assert stage.step is not None, "find_unfinished finds those that have one"
    for artifact in store.named("model", name_of(stage.name, stage.step)):
        if artifact.provenance.get("stage", {}).get("fingerprint") == stage.fingerprint:
            return artifact
    return _take_out(store, stage, stage.step)


def name_of(stage: str, step: int) -> str:
    """What the model of a step checkpoint is called in the store."""
    return f"{stage}.step-{step}"


def _take_out(store: Store, stage: Unfinished, step: int) -> Artifact:
    kind = kind_of(stage.kind)
    if not kind.is_model() or "optimizer" not in kind.settings_class().model_fields:
        raise ConfigError(
            f"{stage.name}@step: a stage of kind {stage.kind} trains no model, so its step "
            "checkpoint holds none"
        )
    # Of the others the stage reads data, which no model is made of.
    start = {edge: place for edge, place in stage.stage["inputs"].items() if edge == "start"}
    check_inputs(start, store.root / HASHES)
    with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch:
        out = Path(scratch) / "model"
        save_model(stage, Path(scratch), out)
        provenance = {
            "source": f"{stage.name}@step-{step}",
            "stage": {key: stage.stage[key] for key in ("name", "kind", "fingerprint")},
        }
        how: dict[str, Any] = {"metrics": {"step": step}, "provenance": provenance}
        name = name_of(stage.name, step)
        if is_adapter(out):
            base = _base_of(store, out)
            from posttrain.backends.checkpoint_source import find_checkpoint

            external = find_checkpoint(out, store.hashes.digest, store=store.root, base=base)
            return adopt_checkpoint(store, external, name=name, copy=True, **how)
        return transfer.adopt(
            store,
            out,
            name=name,
            kind="model",
            files=sorted(path.name for path in out.iterdir()),
            link=False,
            version=KINDS["model"].version,
            **how,
        )


def _base_of(store: Store, out: Path) -> CheckpointSource:
    """The base of an adapter that was made outside of its place in the store."""
    pointer = read_pointer(out)
    base = None if pointer is None else store.find(pointer["fingerprint"])
    if base is None:
        raise StoreError(f"{out}: its base is not in the store; `posttrain verify` says more")
    from posttrain.backends.checkpoint_source import find_checkpoint

    return find_checkpoint(base.path, store.hashes.digest, store=store.root)


def save_model(stage: Unfinished, scratch: Path, out: Path) -> None:
    """Write the model of a stage's newest step checkpoint to `out`."""
    # Not at the top: a plan can do without torch where the model was taken out before.
    from safetensors import SafetensorError

    from posttrain.stages.config import build_config
    from posttrain.stages.context import Context
    from posttrain.stages.step_state import Part, SavedTensors
    from posttrain.stages.worker import new_backend

    config: dict[str, Any] = dict(stage.stage["config"])
    if "precision" in config:
        # Here nothing computes, and float32 holds whatever numbers the weights have.
        config["precision"] = "float32"
        config["optimizer"] = config["optimizer"] | {"master": "float32"}
    settings: Any = build_config(stage.kind, stage.name, config)
    ctx = Context(
        name=stage.name,
        work=scratch / "work",
        inputs=stage.stage["inputs"],
        threads=1,
        backend=new_backend(os.environ),
    )
    # A stage without a start has the model that it began with in its work directory.
    source = "start" if "start" in ctx.inputs else stage.path / "fresh"
    scalar = "reward_model" in kind_of(stage.kind).makes
    try:
        state = SavedTensors(stage.path / stage.checkpoint()["directory"] / "state.safetensors")
    except (OSError, KeyError, SafetensorError) as error:
        raise StoreError(
            f"{stage.name}@step: its step checkpoint cannot be read ({error}); a run that goes on "
            "with the stage replaces it, ask again"
        ) from error
    learner = ctx.learner(settings, source, scalar=scalar)
    learner.restore(Part(state, PART))
    learner.finish()
    learner.save(out)
    ctx.close()
