"""What verbs are given, as the edges of a stage and the settings that go with them.

Checked when the recipe is built: every function raises ConfigError, with the stage, the value and
the fix, for what it does not take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.algorithms import Aux as AuxSettings
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import edge_name, named
from posttrain.language import checks
from posttrain.language.builder import Builder
from posttrain.language.handles import Demos, Stage
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.judge_kinds import Scalar
from posttrain.schedules import Schedule
from posttrain.stages.kinds import kinds_making

Aux = Mapping[str, tuple[Demos | Stage, float | Schedule | AuxSettings]]
"""Name of an auxiliary loss to its data and its weight, which may have a schedule, or settings."""


NAME = re.compile(r"[A-Za-z0-9_-]+")


def rollouts(
    kind: str, stage: str, rollouts: Stage | Sequence[Stage], *, role: str = "rollouts"
) -> dict[str, str]:
    """The edges of the rollouts that a stage reads: `role`, or `role.N` of several."""
    if not isinstance(rollouts, Stage) and not rollouts:
        raise ConfigError(f"stage {stage!r} ({kind}): it is given no rollouts; name one stage")
    if isinstance(rollouts, Stage):
        several = {role: rollouts}
    else:
        several = {edge_name(role, str(number)): source for number, source in enumerate(rollouts)}
    for source in several.values():
        if not isinstance(source, Stage) or not source.may_make("rollouts"):
            found = f"{source.name!r} ({source.kind})" if isinstance(source, Stage) else source
            raise ConfigError(
                f"stage {stage!r} ({kind}): it needs the rollouts of a stage of kind "
                f"{', '.join(kinds_making('rollouts'))}, not {found}"
            )
    return {key: source.name for key, source in several.items()}


def domains_of(*sources: Stage | Sequence[Stage]) -> tuple[str, ...]:
    """The domains of all these stages together."""
    flat = [s for source in sources for s in ([source] if isinstance(source, Stage) else source)]
    return tuple(dict.fromkeys(domain for stage in flat for domain in stage.domains))


def profile(kind: str, stage: str, edge: str, profile: object, domains: Sequence[str]) -> str:
    """The name of a profile stage that knows these domains, for the edge `edge`."""
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
            place = edge_name("data", str(len(named(inputs, "data"))))
            inputs[place] = edges["data"]
            parts.append({"edge": place, "weight": weight})
        else:
            inputs |= edges
            parts.append({"domains": source.domains, "weight": weight} | source.settings())
    return parts, inputs


def candidates(
    build: Builder, stage: str, candidates: Mapping[str, Stage] | Sequence[Stage]
) -> dict[str, str]:
    """The edges `candidates.NAME` of two models or more."""
    if isinstance(candidates, Stage | str) or not isinstance(candidates, Mapping | Sequence):
        raise ConfigError(
            f"stage {stage!r} (best): its candidates are {candidates!r}; it takes a list of "
            "models, or a dict of names to models"
        )
    if not isinstance(candidates, Mapping):
        candidates = _by_own_names(candidates, f"stage {stage!r} (best)", "candidates")
    if len(candidates) < 2:
        raise ConfigError(
            f"stage {stage!r} (best): it has {len(candidates)} candidates; it chooses among two or "
            "more"
        )
    return {
        edge_name("candidates", name): build.model(stage, f"candidates[{name!r}]", model)
        for name, model in candidates.items()
    }


def _by_own_names(models: Sequence[Stage], where: str, role: str) -> dict[str, Stage]:
    """The models of a list by the names of their stages. Raises ConfigError where one is there
    twice."""
    names = [getattr(model, "name", str(model)) for model in models]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{where}: {twice[0]!r} is among its {role} twice; name it once")
    return dict(zip(names, models, strict=True))


NOT_STUDENTS = (
    *("init", "teacher", "teachers", "student", "students", "along", "self", "constant"),
    *("recovery", "norm", "minimum", "greedy", "domain", "domains", "judges", "all"),
    *("score", "win", "kl_init"),
)
"""Names that mean something else in a table of scores or among the metrics of an evaluation."""


def students(
    build: Builder,
    stage: str,
    student: Stage | Mapping[str, Stage] | Sequence[Stage],
    along: Mapping[str, Stage] | Sequence[Stage] | None,
) -> dict[str, str]:
    """The edge `student` of one model, or `students.NAME` of several, and `along.NAME`."""
    if isinstance(student, Stage):
        edges = {"student": build.model(stage, "student", student)}
        taken: dict[str, str] = {}
    else:
        taken = _by_name(build, stage, "students", student)
        edges = {edge_name("students", name): model for name, model in taken.items()}
    for name, model in {} if along is None else _by_name(build, stage, "along", along).items():
        if name in taken:
            raise ConfigError(
                f"stage {stage!r} (evaluate): {name!r} is the name of a student and of a model in "
                "along; give one of them another name"
            )
        edges[edge_name("along", name)] = model
    return edges


def _by_name(build: Builder, stage: str, role: str, given: object) -> dict[str, str]:
    """Name to the name of the stage, of the models that an evaluation has in one role."""
    where = f"stage {stage!r} (evaluate)"
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = _by_own_names(given, where, role)
    if not isinstance(given, Mapping):
        hint = f"; did you mean r.stage({given!r})?" if given in build.nodes else ""
        one = "a model, " if role == "students" else ""
        raise ConfigError(
            f"{where}: its {role} are {given!r}; it takes {one}a dict of names to models, or a "
            f"list of models{hint}"
        )
    if not given:
        raise ConfigError(
            f"{where}: it has no {role}; "
            + ("name a model, or several by name" if role == "students" else "leave along= out")
        )
    found: dict[str, str] = {}
    for name, model in given.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{where}: {role} has the name {name!r}; it takes letters, digits, _ and -"
            )
        if name in NOT_STUDENTS:
            raise ConfigError(
                f"{where}: {role} has the name {name!r}, which means something else in its "
                "tables; give the model another name"
            )
        source = build.model(stage, f"{role}[{name!r}]", model)
        for other, before in found.items():
            if before == source:
                raise ConfigError(
                    f"{where}: {other!r} and {name!r} of its {role} are the same stage "
                    f"{source!r}; name it once"
                )
        found[name] = source
    return found


def judges(build: Builder, stage: str, judges: object) -> dict[str, str]:
    """The edges of the stages that an evaluation's judges ask."""
    if judges is None:
        return {}
    if not isinstance(judges, Mapping):
        raise ConfigError(
            f"stage {stage!r} (evaluate): judges = {judges!r}; it takes a dict of domain to judge, "
            'such as judges={"chat": judges.scalar(reward_model)}'
        )
    found: dict[str, str] = {}
    for domain, judge in judges.items():
        found |= judge_edges(build, stage, f"judges[{domain!r}]", judge)
    return found


def merged(
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
    edges = {
        edge_name("models", n): build.model(stage, f"models[{n!r}]", m) for n, m in models.items()
    }
    first, *others = edges.values()
    for other in others:
        build.same_vocabulary(stage, first, other, role="model")
    if base is not None:
        edges["base"] = build.model(stage, "base", base)
    return edges


def aux_losses(
    build: Builder, stage: str, aux: Aux | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The setting `aux`, where there are auxiliary losses, and the edges of their data: `aux.NAME`
    of a data stage, `aux.NAME.DOMAIN` of demonstrations."""
    losses: dict[str, dict[str, Any]] = {}
    edges: dict[str, str] = {}
    if aux is not None and not isinstance(aux, Mapping):
        raise ConfigError(
            f"stage {stage!r}: aux = {aux!r} is no dict of name to data and weight, as in "
            "aux={'pretraining': (r.demos(...), 0.5)}"
        )
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
        found = build.data(stage, data, (Demos, Stage))
        if isinstance(data, Demos):
            edges |= {
                edge_name("aux", name, d): node for d, node in named(found, "domains").items()
            }
        else:
            edges[edge_name("aux", name)] = found["data"]
    return ({"aux": losses} if losses else {}), edges


def judge_edges(build: Builder, stage: str, field: str, judge: object) -> dict[str, str]:
    """The edges `judges.NAME` of the stages that a judge asks.

    Raises ConfigError for what is no judge, and for a stage that cannot be asked so.
    """
    if not isinstance(judge, Judge):
        raise ConfigError(
            f"stage {stage!r}: {field} = {judge!r} is no judge; it takes what posttrain.judges "
            "makes, such as judges.verifier() or judges.scalar(reward_model)"
        )
    scored = {part.edge for part in judge.walk() if isinstance(part, Scalar)}
    return {
        edge: build.model(stage, edge, asked, scores=edge in scored)
        for edge, asked in judge.stages.items()
    }


def judged(build: Builder, stage: str, judge: object, domains: Sequence[str]) -> dict[str, str]:
    """The edges to the stages that a judge asks and to the domains of what it judges."""
    edges = judge_edges(build, stage, "judge", judge)
    if not domains:
        raise ConfigError(
            f"stage {stage!r}: the domains of what it judges are not known; define the stages that "
            "it reads above it"
        )
    assert isinstance(judge, Judge)
    checks.problems_of_judge(build, judge, domains, where=f"stage {stage!r}")
    return edges | build.domain_edges(stage, domains)


def several_data(build: Builder, stage: str, data: Stage | Sequence[Stage]) -> dict[str, str]:
    """The edge `data` of one data stage, or `data.N` of several."""
    if isinstance(data, Stage | Demos | str | Path):
        return build.data(stage, data, (Stage,))
    if not data:
        raise ConfigError(f"stage {stage!r} (dedup): it is given no data; name one stage")
    found = [build.data(stage, source, (Stage,))["data"] for source in data]
    return {edge_name("data", str(number)): source for number, source in enumerate(found)}
