"""Checkpoints from outside, as stages of a recipe: whole models, and adapters on a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from posttrain.backends.checkpoint_source import CheckpointSource
from posttrain.engine.errors import ConfigError
from posttrain.language import speaking
from posttrain.language.builder import Builder
from posttrain.language.handles import Stage


def taken_in_model(
    build: Builder, source: str | Path, base: Stage | str | Path | None, name: str
) -> Stage:
    """The stage that takes in a checkpoint; of an adapter its base is another one, NAME_base unless
    it is a stage already.

    Raises ConfigError for what is no checkpoint, for an adapter that does not fit its base, and for
    a base of a whole model.
    """
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"model {name!r}: its source is {source!r}; it takes a checkpoint directory, an "
            "adopted name or a Hub id, as a text"
        )
    if base is not None and not isinstance(base, Stage):
        base = taken_in_model(build, base, None, f"{name}_base")
    known: CheckpointSource | Literal["find", "later"] = "find"
    if base is not None:
        build.model(name, "base", base)
        known = build.external.get(base.name, "later")
    external = build.adopted(str(source), known) or build.checkpoint(source, known)
    if external.adapter is None and base is not None:
        raise ConfigError(
            f"model {name!r}: base = {base.name!r} with {external.directory}, which is a whole "
            "model; base is for adapters, leave it out"
        )
    return _stage(build, external, base, name)


def _stage(build: Builder, external: CheckpointSource, base: Stage | None, name: str) -> Stage:
    if external.base is not None and base is None:
        base = _stage(build, external.base, None, f"{name}_base")
    speaking.told(build, name, external)
    build.external[name] = external
    return build.add(build.external_node(name, {} if base is None else {"base": base.name}))


def check_adapters(build: Builder) -> None:
    """Refuse a stage whose `lora` is another than that of the adapter it starts from: it goes on
    with the start's, as that is. Raises ConfigError with the setting, both values and the fix.

    What only the models tell, such as which layers have one, is refused when the stage begins.
    """
    for name, settings in build.settings.items():
        lora, start = getattr(settings, "lora", None), build.nodes[name].inputs.get("start", "")
        if lora is None:
            continue
        before = getattr(build.settings.get(start), "lora", None)
        theirs = None if before is None else before.to_json()
        if start in build.external and build.external[start].adapter is not None:
            theirs = _settings_of(build.external[start].adapter or {})
        for field, value in (theirs or {}).items():
            mine = lora.to_json()[field]
            if mine != value:
                raise ConfigError(
                    f"stage {name!r}, field 'lora.{field}': {mine!r}, and its start {start!r} is "
                    f"an adapter with {value!r}, which this stage would go on with; give the same "
                    "lora, or leave lora out to train the merged weights"
                )


def _settings_of(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says of the settings of `LoRA`, but for the targets, which it may
    say in several ways."""
    return {
        "rank": adapter.get("r"),
        "alpha": float(adapter.get("lora_alpha") or 0),
        "dora": bool(adapter.get("use_dora")),
        "rslora": bool(adapter.get("use_rslora")),
    }
