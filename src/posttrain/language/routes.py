"""Which model serves which domain: checked when the recipe is built, never a silent fallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.engine.errors import ConfigError
from posttrain.language.builder import Builder
from posttrain.language.handles import SELF, Stage


def route(
    build: Builder,
    stage: str,
    domains: tuple[str, ...],
    teachers: Mapping[str, Stage | str],
    start: Stage,
    *,
    strict: bool = True,
) -> tuple[dict[str, str], dict[str, str]]:
    """Domain to teacher name, and the teachers' edges; strict: every domain needs a teacher."""
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
    routes: dict[str, str] = {}
    edges: dict[str, str] = {}
    for domain in domains:
        teacher = teachers.get(domain)
        if teacher is None or (teacher == SELF and not strict):
            continue
        if isinstance(teacher, str):
            if teacher != SELF:
                raise ConfigError(
                    f"stage {stage!r}: teachers[{domain!r}] = {teacher!r}; it takes a stage or "
                    f'"{SELF}"'
                )
            name, source = SELF, start
        else:
            name, source = teacher.name, teacher
        routes[domain] = name
        edge = f"teachers.{name}"
        if edges.get(edge, source.name) != source.name:
            raise ConfigError(
                f"stage {stage!r}: a teacher is called {SELF!r}, which means the student's own "
                "start; give that stage another name="
            )
        edges[edge] = build.model(stage, f"teachers[{domain!r}]", source)
    return routes, edges


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
        edges |= {f"models.{name}": name for name in names}
    return routes, edges
