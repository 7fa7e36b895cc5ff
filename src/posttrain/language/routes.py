"""Which model serves which domain: checked when the recipe is built, never a silent fallback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import edge_name
from posttrain.language.builder import Builder
from posttrain.language.handles import SELF, Stage

Teacher = Stage | str
ByMode = Mapping[str, "Teacher | Sequence[Teacher]"]
Teachers = Mapping[str, Teacher | Sequence[Teacher] | ByMode]
"""Domain to its teacher, to several that take its prompts in turn, or to those of each mode."""


def route(
    build: Builder,
    stage: str,
    domains: tuple[str, ...],
    teachers: Teachers,
    start: Stage,
    *,
    modes: Sequence[str] = (),
    strict: bool = True,
) -> tuple[dict[str, str | tuple[str, ...]], dict[str, str]]:
    """Domain, or `domain/mode`, to the name of its teacher or to several, and the teachers' edges.

    Strict: every domain needs a teacher, and each domain with teachers by mode one for each of the
    `modes`.
    """
    if not isinstance(teachers, Mapping):
        raise ConfigError(
            f"stage {stage!r}: teachers = {teachers!r} is no dict of domain to teacher; for one "
            "teacher of all domains write dict.fromkeys(r.domains, teacher)"
        )
    unknown = [domain for domain in teachers if domain not in build.domains]
    if unknown:
        build.known(unknown[0])
    stray = [domain for domain in teachers if domain not in domains]
    if stray and strict:
        raise ConfigError(
            f"stage {stage!r}: teachers[{stray[0]!r}] would never be asked, since its prompts "
            f"are those of {', '.join(domains)}; add the domain to the prompts or leave the "
            "teacher out"
        )
    missing = [domain for domain in domains if domain not in teachers]
    if missing and strict:
        raise ConfigError(
            f"stage {stage!r} (distill): domain {missing[0]!r} has no teacher; teachers are "
            f"given for {', '.join(teachers) or 'none'}; add teachers[{missing[0]!r}] = a "
            f'stage, or "self" to hold the domain where the student starts'
        )
    routes: dict[str, str | tuple[str, ...]] = {}
    edges: dict[str, str] = {}
    for key, where, several in _each(stage, domains, teachers, tuple(modes), strict):
        if not strict and len(several) > 1:
            raise ConfigError(
                f"stage {stage!r}: {where} are {len(several)} teachers; an evaluation compares "
                "with one, so name the one that counts"
            )
        names: list[str] = []
        for teacher in several:
            if teacher == SELF and not strict:
                continue
            if teacher != SELF and not isinstance(teacher, Stage):
                raise ConfigError(
                    f'stage {stage!r}: {where} = {teacher!r}; it takes a stage or "{SELF}"'
                )
            source = start if isinstance(teacher, str) else teacher
            name = SELF if isinstance(teacher, str) else teacher.name
            edge = edge_name("teachers", name)
            if edges.get(edge, source.name) != source.name:
                raise ConfigError(
                    f"stage {stage!r}: a teacher is called {SELF!r}, which means the student's own "
                    "start; give that stage another name="
                )
            edges[edge] = build.model(stage, where, source)
            names.append(name)
        if names:
            routes[key] = names[0] if len(names) == 1 else tuple(names)
    return routes, edges


def _each(
    stage: str, domains: Sequence[str], teachers: Teachers, modes: tuple[str, ...], strict: bool
) -> Iterator[tuple[str, str, list[Teacher]]]:
    """Key of the route, what the recipe calls it, and the teachers there."""
    for domain in domains:
        if domain not in teachers:
            continue
        given, where = teachers[domain], f"teachers[{domain!r}]"
        if not isinstance(given, Mapping):
            yield domain, where, _listed(stage, where, given)
            continue
        if set(given) != set(modes) and (strict or not set(modes) <= set(given)):
            raise ConfigError(
                f"stage {stage!r}: {where} has teachers for the modes {', '.join(given)}, and its "
                f"prompts have {', '.join(modes) or 'none'}; give one for each mode of the prompts"
            )
        for mode in modes:
            place = f"{where}[{mode!r}]"
            yield f"{domain}/{mode}", place, _listed(stage, place, given[mode])


def _listed(stage: str, where: str, given: Teacher | Sequence[Teacher]) -> list[Teacher]:
    several = (
        [given] if isinstance(given, Stage | str) or not isinstance(given, Sequence) else given
    )
    if not several:
        raise ConfigError(f"stage {stage!r}: {where} names no teacher; give a stage")
    return list(several)


def samplers(
    build: Builder,
    stage: str,
    domains: tuple[str, ...],
    models: Stage | Sequence[Stage] | Mapping[str, Stage | Sequence[Stage]],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Domain to the names of the models that sample it, and the models' edges."""
    if not isinstance(models, Mapping):
        models = dict.fromkeys(domains, models)
    missing = [domain for domain in domains if domain not in models]
    if missing:
        raise ConfigError(
            f"stage {stage!r} (sample): no model for domain {missing[0]!r}; models are given "
            f"for {', '.join(models) or 'none'}; add models[{missing[0]!r}]"
        )
    routes: dict[str, tuple[str, ...]] = {}
    edges: dict[str, str] = {}
    for domain in domains:
        of_domain = models[domain]
        several = [of_domain] if isinstance(of_domain, Stage | str) else list(of_domain)
        names = [build.model(stage, f"models.{domain}", model) for model in several]
        twice = [name for name in names if names.count(name) > 1]
        if not names or twice:
            what = f"names {twice[0]!r} twice" if twice else "names no model"
            raise ConfigError(
                f"stage {stage!r} (sample): models[{domain!r}] {what}; give each model once, and "
                "raise k for more responses of one"
            )
        routes[domain] = tuple(names)
        edges |= {edge_name("models", name): name for name in names}
    return routes, edges
