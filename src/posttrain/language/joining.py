"""The edges of what joins several things in one stage: models that merge, auxiliary losses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.algorithms import Aux as AuxSettings
from posttrain.engine.errors import ConfigError
from posttrain.language.builder import Builder
from posttrain.language.handles import Demos, Stage
from posttrain.schedules import Schedule

Aux = Mapping[str, tuple[Demos | Stage, float | Schedule | AuxSettings]]
"""Name of an auxiliary loss to its data and its weight, which may have a schedule, or settings."""

NAME = re.compile(r"[A-Za-z0-9_-]+")


def auxiliary(
    build: Builder, stage: str, aux: Aux | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings with the weights of the auxiliary losses, and the edges of their data.

    Raises ConfigError for what is not a pair of data and weight.
    """
    losses: dict[str, dict[str, Any]] = {}
    edges: dict[str, str] = {}
    for name, given in (aux or {}).items():
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"stage {stage!r}: aux has the name {name!r}; it takes letters, digits, _ and -"
            )
        if not isinstance(given, tuple) or len(given) != 2:
            raise ConfigError(
                f"stage {stage!r}: aux[{name!r}] is {given!r}; it takes data and weight, as in "
                f"aux={{{name!r}: (r.demos(...), 0.5)}}"
            )
        data, weight = given
        losses[name] = weight.to_json() if isinstance(weight, AuxSettings) else {"weight": weight}
        if isinstance(data, Demos) and data.noise:
            raise ConfigError(
                f"stage {stage!r}: aux[{name!r}] has noise = {data.noise}; the demonstrations of "
                "an auxiliary loss have no slips, so leave noise out"
            )
        if isinstance(data, Demos) and data.hint:
            raise ConfigError(
                f"stage {stage!r}: aux[{name!r}] has a hint; the demonstrations of an auxiliary "
                "loss have their own prompts, so leave hint out"
            )
        if isinstance(data, Demos) and data.modes:
            losses[name]["modes"] = data.modes
        for edge, source in build.data(stage, data, (Demos, Stage)).items():
            edges[f"aux.{name}" + edge.removeprefix("data").replace("domains", "", 1)] = source
    return {**settings, **({"aux": losses} if losses else {})}, edges


def check_auxiliary(build: Builder, stage: str, aux: Aux | None) -> None:
    """Refuse weights, given as settings or by --set, of losses that have no data."""
    known = list(aux or {})
    for name in build.nodes[stage].config["aux"]:
        if name not in known:
            raise ConfigError(
                f"stage {stage!r}, field 'aux': {name!r} has no data in the recipe; choices: "
                f"{', '.join(known) or 'none: give aux={name: (data, weight)}'}"
            )


def merging(
    build: Builder, stage: str, models: Mapping[str, Stage] | Iterable[Stage], base: Stage | None
) -> dict[str, str]:
    """The edges of the models that merge, by their names in the recipe or their stages' names.

    Raises ConfigError for fewer than two models, for one that occurs twice, and for checkpoints
    from outside whose tokens differ.
    """
    if isinstance(models, Stage):
        raise ConfigError(
            f"stage {stage!r} (merge): it is given {models.name!r} alone; it takes a list of "
            "models, or a dict of names to models"
        )
    if not isinstance(models, Mapping):
        listed = list(models)
        names = [build.model(stage, f"models[{i}]", model) for i, model in enumerate(listed)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"stage {stage!r} (merge): {twice!r} is given twice; name each model once and use "
                "weights="
            )
        models = dict(zip(names, listed, strict=True))
    if len(models) < 2 and base is None:
        raise ConfigError(
            f"stage {stage!r} (merge): it has {len(models)} model and needs two or more, or one "
            "and a base"
        )
    if not models:
        raise ConfigError(f"stage {stage!r} (merge): it has no models besides its base")
    edges = {f"models.{n}": build.model(stage, f"models[{n!r}]", m) for n, m in models.items()}
    first, *others = edges.values()
    for other in others:
        build.same_vocabulary(stage, first, other, role="model")
    if base is not None:
        edges["base"] = build.model(stage, "base", base)
    return edges


def check_merge(build: Builder, stage: str) -> None:
    """Refuse a merge without the base that its `how` adds to, and weights of unknown models."""
    node = build.nodes[stage]
    how, weights = build.settings[stage].how.kind, node.config["weights"]
    names = [edge.removeprefix("models.") for edge in node.inputs if edge.startswith("models.")]
    if (how != "average") != ("base" in node.inputs):
        raise ConfigError(
            f"stage {stage!r} (merge): how = {how} "
            + (
                "reads no base; leave base= out"
                if how == "average"
                else "adds to a base; give base="
            )
            + ", or change how"
        )
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"stage {stage!r} (merge), field 'weights': {name!r} is not one of its models; "
                f"choices: {', '.join(names)}"
            )
    if how == "average" and sum(weights.get(name, 1.0) for name in names) <= 0:
        raise ConfigError(
            f"stage {stage!r} (merge), field 'weights': they add up to 0, so there is no average"
        )
