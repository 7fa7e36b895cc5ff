"""What the data operators are given: checked when the recipe is built, as edges and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.language.builder import Builder
from posttrain.language.handles import ROLLOUT_KINDS, Demos, Stage


def rollout_edges(
    kind: str, stage: str, rollouts: Stage | Sequence[Stage], *, edge: str = "rollouts"
) -> dict[str, str]:
    """The edges of the rollouts that a data operator reads: `edge`, or `edge.N` of several."""
    if not isinstance(rollouts, Stage) and not rollouts:
        raise ConfigError(f"stage {stage!r} ({kind}): it is given no rollouts; name one stage")
    if isinstance(rollouts, Stage):
        several = {edge: rollouts}
    else:
        several = {f"{edge}.{number}": source for number, source in enumerate(rollouts)}
    for source in several.values():
        if not isinstance(source, Stage) or source.kind not in (*ROLLOUT_KINDS, ""):
            found = f"{source.name!r} ({source.kind})" if isinstance(source, Stage) else source
            raise ConfigError(
                f"stage {stage!r} ({kind}): it needs the rollouts of a stage of kind "
                f"{', '.join(ROLLOUT_KINDS)}, not {found}"
            )
    return {key: source.name for key, source in several.items()}


def profile_edge(
    stage: str, edge: str, profile: object, domains: Sequence[str], *, kind: str = "filter"
) -> str:
    """The name of a profile stage that knows these domains."""
    if not isinstance(profile, Stage) or profile.kind not in ("profile", ""):
        found = f"{profile.name!r} ({profile.kind})" if isinstance(profile, Stage) else profile
        raise ConfigError(
            f"stage {stage!r} ({kind}): {edge} = {found} is no profile; it takes "
            "r.profile(model, prompts=...)"
        )
    missing = [domain for domain in domains if domain not in profile.domains]
    if missing and profile.kind:
        raise ConfigError(
            f"stage {stage!r} ({kind}): {edge} = {profile.name!r} has no problem of domain "
            f"{missing[0]!r}, only of {', '.join(profile.domains)}; profile the same prompts"
        )
    return profile.name


def check_drawing(
    build: Builder, stage: Stage, domains: tuple[str, ...], profile: Stage | None
) -> None:
    """Refuse an rl stage whose shares or curriculum do not fit its prompts and its profile."""
    build.named_domains(stage, domains, "domain_shares")
    for shares in build.values(stage, "domain_shares"):
        for domain in domains:
            if shares and domain not in shares:
                raise ConfigError(
                    f"stage {stage.name!r} (rl), field 'domain_shares': it gives no share to "
                    f"domain {domain!r} of its prompts; write {domain!r}: 0 to leave it out"
                )
    curriculum = build.nodes[stage.name].config["curriculum"]
    if curriculum != "none" and profile is None:
        raise ConfigError(
            f"stage {stage.name!r} (rl), field 'curriculum': {curriculum} needs pass rates to "
            "begin with; give profile=r.profile(start, prompts=...)"
        )
    if curriculum == "none" and profile is not None:
        raise ConfigError(
            f"stage {stage.name!r} (rl): profile = {profile.name!r} is not read with curriculum = "
            "none; leave it out, or set curriculum to band or gaussian"
        )


def mixed(
    build: Builder, stage: str, sources: Mapping[Demos | Stage, float]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The parts of a mix for its settings, and its edges."""
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(
            f"stage {stage!r} (mix): it takes a dict of data to weight, such as "
            "{r.demos(r.domains): 0.2, selection: 0.8}"
        )
    parts: list[dict[str, Any]] = []
    inputs: dict[str, str] = {}
    for source, weight in sources.items():
        edges = build.data(stage, source, (Demos, Stage))
        if isinstance(source, Demos) and source.hint:
            raise ConfigError(
                f"stage {stage!r} (mix): demonstrations with a hint are for sft alone; leave hint "
                "out"
            )
        if isinstance(source, Stage):
            edge = f"data.{sum(key.startswith('data.') for key in inputs)}"
            inputs[edge] = edges["data"]
            parts.append({"edge": edge, "weight": weight})
        else:
            inputs |= edges
            parts.append({"domains": source.domains, "weight": weight} | source.settings())
    return parts, inputs


def contest(
    build: Builder, stage: str, candidates: Mapping[str, Stage] | Sequence[Stage]
) -> dict[str, str]:
    """The edges `candidates.NAME` of two models or more."""
    if not isinstance(candidates, Mapping):
        names = [getattr(model, "name", str(model)) for model in candidates]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"stage {stage!r} (best): {twice[0]!r} is among its candidates twice")
        candidates = dict(zip(names, candidates, strict=True))
    if len(candidates) < 2:
        raise ConfigError(
            f"stage {stage!r} (best): it has {len(candidates)} candidates; it chooses among two or "
            "more"
        )
    return {
        f"candidates.{name}": build.model(stage, f"candidates[{name!r}]", model)
        for name, model in candidates.items()
    }
