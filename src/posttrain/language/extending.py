"""Training that goes on: a stage like a finished one, from where that one ended."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.language import checks
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage
from posttrain.stages.kinds import KINDS


def extended(build: Builder, stage: object, name: str | None, settings: Mapping[str, Any]) -> Stage:
    """A stage of the kind of `stage`, with its settings and inputs but for the `settings` given,
    that starts from it.

    Raises ConfigError for what is no training stage with a start.
    """
    if not isinstance(stage, Stage) or not stage.kind:
        what = "a stage that stands further down" if isinstance(stage, Stage) else repr(stage)
        raise ConfigError(f"r.extend: {what} cannot be extended; it takes a stage that trains")
    node = build.nodes[stage.name]
    config = build.settings.get(stage.name)
    name = f"{stage.name}_more" if name is None else name
    if "start" not in node.inputs or not hasattr(config, "optimizer"):
        advice = (
            "; go on from it with r.sft(start=..., data=...)" if node.kind == "pretrain" else ""
        )
        raise ConfigError(
            f"stage {name!r}: {stage.name!r} ({node.kind}) has no start to put itself in the place "
            f"of; r.extend takes a stage of kind {', '.join(_extendable())}{advice}"
        )
    assert config is not None, "a stage with an optimiser has settings"
    values = config.to_json(defaults=False)
    # Its length is given anew; who serves which domain stays.
    routes = values.pop("routes", None)
    for field in ("steps", "epochs"):
        values.pop(field, None)
    values |= {"seed": _next_seed(config.seed)} | dict(settings)
    edges = dict(node.inputs) | {"start": stage.name}
    loss = values.get("loss", {})
    reads_reference = getattr(loss, "kind", dict(loss).get("kind") if loss else None) != "simpo"
    if node.kind == "dpo" and reads_reference:
        # Which is the start where none is named, and is to stay that.
        edges.setdefault("reference", node.inputs["start"])
    made = build.stage(node.kind, name, values, edges, routes)
    _check(build, made)
    return made


def _next_seed(seed: int) -> int:
    """Another seed that follows from the first one: other batches, other samples."""
    digest = hashlib.sha256(f"extend {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


def _check(build: Builder, stage: Stage) -> None:
    """What the verb of its kind checks."""
    if stage.kind != "reward_model":
        checks.aux_losses(build, stage.name)
    if stage.kind == "sft":
        checks.given_rows(build, stage.name)
    elif stage.kind == "dpo":
        checks.dpo(build, stage.name)
    elif stage.kind == "rl":
        checks.rl(build, stage.name, stage.domains)
    elif stage.kind == "distill":
        checks.named_domains(build, stage.name, stage.domains, "hints")


def _extendable() -> list[str]:
    """The kinds of the table that train from a start."""
    return [
        name
        for name, kind in KINDS.items()
        if name != "pretrain"
        and not kind.from_outside
        and "optimizer" in kind.settings_class().model_fields
    ]
