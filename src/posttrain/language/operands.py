"""What the data operators are given: checked when the recipe is built, as edges and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.algorithms import InTurn, StrongAgainstWeak
from posttrain.engine.errors import ConfigError
from posttrain.judges import Judge
from posttrain.language.builder import Builder
from posttrain.language.handles import Demos, Stage
from posttrain.language.judging import check_problems, judge_edges
from posttrain.stages.kinds import kinds_making


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
        if not isinstance(source, Stage) or not source.may_make("rollouts"):
            found = f"{source.name!r} ({source.kind})" if isinstance(source, Stage) else source
            raise ConfigError(
                f"stage {stage!r} ({kind}): it needs the rollouts of a stage of kind "
                f"{', '.join(kinds_making('rollouts'))}, not {found}"
            )
    return {key: source.name for key, source in several.items()}


def judge_inputs(
    build: Builder, stage: str, judge: object, domains: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The setting `judge`, and the edges to the stages it asks and to the domains it judges."""
    edges = judge_edges(build, stage, "judge", judge)
    if not domains:
        raise ConfigError(
            f"stage {stage!r}: the domains of what it judges are not known; define the stages that "
            "it reads above it"
        )
    assert isinstance(judge, Judge)
    check_problems(build, judge, domains, where=f"stage {stage!r}")
    return {"judge": judge}, edges | build.domain_edges(stage, domains)


def domains_of(*sources: Stage | Sequence[Stage]) -> tuple[str, ...]:
    """The domains of all these stages together."""
    flat = [s for source in sources for s in ([source] if isinstance(source, Stage) else source)]
    return tuple(dict.fromkeys(domain for stage in flat for domain in stage.domains))


def profile_edge(
    stage: str, edge: str, profile: object, domains: Sequence[str], *, kind: str = "filter"
) -> str:
    """The name of a profile stage that knows these domains."""
    if not isinstance(profile, Stage) or not profile.may_make("rates"):
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


def check_drawing(build: Builder, stage: Stage, profile: Stage | None) -> None:
    """Refuse an rl stage whose curriculum does not fit its profile."""
    draw = build.settings[stage.name].draw
    if not isinstance(draw, InTurn) and profile is None:
        raise ConfigError(
            f"stage {stage.name!r} (rl), field 'draw': {draw.kind} needs pass rates to begin with; "
            "give profile=r.profile(start, prompts=...)"
        )
    if isinstance(draw, InTurn) and profile is not None:
        raise ConfigError(
            f"stage {stage.name!r} (rl): profile = {profile.name!r} is not read with draw = "
            "in_turn; leave it out, or set draw to band or gaussian"
        )


def mix_parts(
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


def candidate_edges(
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


def check_steps(build: Builder, stage: str) -> None:
    """Raise ConfigError where a select stage chooses steps of rollouts that have none."""
    node = build.nodes[stage]
    for field in ("first_step", "last_step"):
        for source in map(build.handle, node.inputs.values()):
            if node.config[field] is not None and source.kind not in ("rl", ""):
                raise ConfigError(
                    f"stage {stage!r} (select): {field} = {node.config[field]} chooses among the "
                    f"steps of an rl stage, and {source.name!r} is a {source.kind} stage; leave it "
                    "out, or select from r.rl(...)"
                )


def check_scored(build: Builder, stage: str) -> None:
    """Raise ConfigError where a stage goes by scores that its rollouts do not have."""
    node = build.nodes[stage]
    settings = build.settings[stage]
    by = settings.by if node.kind == "pairs" else getattr(settings.how, "by", "reward")
    if by != "score" or node.config.get("judge") is not None:
        return
    for edge, source in node.inputs.items():
        kind = build.handle(source).kind
        if edge.partition(".")[0] in ("rollouts", "against") and kind not in ("score", ""):
            raise ConfigError(
                f"stage {stage!r} ({node.kind}): by = score, and {source!r} is a {kind} stage, "
                "whose rollouts have rewards only; give it r.score(rollouts, judge=...)"
            )


def check_pairs(build: Builder, stage: str) -> None:
    """Raise ConfigError where `how` and the stages that a pairs stage reads do not fit."""
    node = build.nodes[stage]
    against = any(edge.partition(".")[0] == "against" for edge in node.inputs)
    how = build.settings[stage].how
    if isinstance(how, StrongAgainstWeak) != against:
        raise ConfigError(
            f"stage {stage!r} (pairs): how = {how.kind} "
            + ("reads no" if against else "needs a")
            + " second stage; write r.pairs(strong, against=weak) for strong_against_weak and "
            "r.pairs(rollouts) for the others"
        )


def check_filter(build: Builder, stage: str) -> None:
    """Raise ConfigError for a condition on a second profile that a filter does not have."""
    node = build.nodes[stage]
    for field, unread in {"against_low": 0.0, "against_high": 1.0, "min_gain": None}.items():
        if "against" not in node.inputs and node.config[field] != unread:
            raise ConfigError(
                f"stage {stage!r} (filter): {field} = {node.config[field]} is about a second "
                "profile; give against=r.profile(...), or leave it out"
            )


def check_mix(build: Builder, stage: str) -> None:
    """Raise ConfigError where a mix by tokens has no tokenizer, or one by rows has one."""
    node = build.nodes[stage]
    given = "tokenizer" in node.inputs
    if (node.config["by"] == "tokens") != given:
        raise ConfigError(
            f"stage {stage!r} (mix): by = {node.config['by']} "
            + ("reads no" if given else "needs")
            + " tokenizer=, a model whose tokens are counted; give both or neither"
        )
