"""The JSON form of judges: `{"judge": kind, ...fields}`, nested; its fields and their checks.

Read at plan time by `posttrain.judges` and at run time by `posttrain.rewards.judging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.judge_fields import FIELDS, SHAPES, scheduled

Spec = dict[str, Any]
PARTS: Mapping[str, tuple[str, ...]] = {
    "length": ("of",),
    "sum": ("terms",),
    "gate": ("condition", "then", "otherwise"),
    "lexicographic": ("first", "second"),
    "normalised": ("judges",),
    "whitened": ("of",),
    "by_domain": ("domains",),
}
"""Kind -> its fields that hold judges."""


def spec_of(kind: str, **fields: Any) -> Spec:
    """The checked JSON form of one judge. Raises ConfigError."""
    spec = {"judge": kind, **fields}
    check(spec)
    return spec


def check(spec: Any, *, where: str = "") -> Spec:
    """Returns the JSON form of a judge if it is one; `where` begins every message.

    Raises ConfigError for an unknown kind or field, a missing one, a value that does not fit, and
    a `human` judge that is not alone.
    """
    for number, (at, part) in enumerate(_walk(spec, where)):
        _check_one(part, at)
        if number and part["judge"] == "human":
            raise ConfigError(f"{at}: people compare pairs by themselves; judges.human() stands "
                              "alone, in no sum or combination")  # fmt: skip
    return dict(spec)


def walk(spec: Mapping[str, Any]) -> Iterator[Spec]:
    """The judge itself and then all judges inside, in the order in which they are written."""
    return (part for _, part in _walk(spec, ""))


def walk_domain(spec: Mapping[str, Any], domain: str) -> Iterator[Spec]:
    """As `walk`, without what other domains have for themselves in a `by_domain`."""
    yield dict(spec)
    own = spec["judge"] == "by_domain"
    for inner in [spec["domains"][domain]] if own else parts_of(spec):
        yield from walk_domain(inner, domain)


def models(spec: Mapping[str, Any]) -> list[str]:
    """The edges of the stages that a judge asks, each once."""
    kinds = ("scalar", "compare")
    return list(dict.fromkeys(part["model"] for part in walk(spec) if part["judge"] in kinds))


def uses(spec: Mapping[str, Any], kind: str) -> bool:
    """Whether a judge of this kind is in it."""
    return any(part["judge"] == kind for part in walk(spec))


def check_domains(spec: Mapping[str, Any], domains: tuple[str, ...], *, where: str) -> None:
    """Raises ConfigError where a `by_domain` has no judge for one of these domains."""
    for part in walk(spec):
        if part["judge"] != "by_domain":
            continue
        missing = [domain for domain in domains if domain not in part["domains"]]
        if missing:
            raise ConfigError(
                f"{where}: judges.by_domain has none for domain {missing[0]!r}; it has judges for "
                f"{', '.join(part['domains'])}"
            )


def check_use(spec: Mapping[str, Any], kind: str, *, where: str) -> None:
    """Raises ConfigError for a judge that a stage of this kind cannot ask."""
    if uses(spec, "itself") and kind != "rl":
        raise ConfigError(
            f"{where}: judges.itself() is for rl, which trains a policy; write "
            "judges.compare(stage)"
        )
    if uses(spec, "human") and kind not in ("pairs", "score", "best"):
        raise ConfigError(
            f"{where}: judges.human() is for pairs, score and best; train a reward_model on the "
            "pairs, and give judges.scalar(...) here"
        )


def parts_of(spec: Mapping[str, Any]) -> list[Spec]:
    """The judges directly inside one."""
    return [part for _, part in _inside(spec, "")]


def _walk(spec: Any, where: str) -> Iterator[tuple[str, Spec]]:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("judge"), str):
        raise ConfigError(
            f'{where or "judge"}: {spec!r} is no judge; it has the form {{"judge": kind, ...}}'
        )
    at = f"{where}.{spec['judge']}" if where else f"judge {spec['judge']}"
    yield at, dict(spec)
    for place, part in _inside(spec, at):
        yield from _walk(part, place)


def _inside(spec: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    kind = spec["judge"]
    for name in PARTS.get(kind, ()):
        value = spec.get(name)
        if kind == "sum":
            terms = value if isinstance(value, list | tuple) else []
            yield from ((at, term.get("of")) for term in terms if isinstance(term, Mapping))
        elif kind == "normalised":
            yield from ((at, part) for part in (value if isinstance(value, list | tuple) else []))
        elif kind == "by_domain":
            yield from ((f"{at}.{d}", j) for d, j in _items(value))
        elif name in spec:
            yield f"{at}.{name}", value


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _check_one(spec: Spec, at: str) -> None:
    kind = spec["judge"]
    if kind not in FIELDS:
        raise ConfigError(f"{at}: unknown judge {kind!r}; {choices_text(kind, FIELDS)}")
    wanted = set(FIELDS[kind]) | set(PARTS.get(kind, ()))
    if kind == "length":
        problem = FIELDS[kind]["shape"](spec.get("shape"))
        if problem:
            raise ConfigError(f"{at}: shape = {spec.get('shape')!r}; it has to be {problem}")
        wanted = {"shape", *SHAPES[spec["shape"]]}
        at += f", shape = {spec['shape']}"
    for name in spec:
        if name not in (*wanted, "judge"):
            raise ConfigError(f"{at}: it reads no {name!r}; {choices_text(name, wanted)}")
    for name in sorted(wanted):
        if name not in spec:
            raise ConfigError(f"{at}: {name} is needed")
        if name in FIELDS[kind]:
            problem = FIELDS[kind][name](spec[name])
            if problem:
                raise ConfigError(f"{at}: {name} = {spec[name]!r}; it has to be {problem}")
    _check_together(spec, at)


def _check_together(spec: Spec, at: str) -> None:
    """What the fields have to be to each other."""
    kind = spec["judge"]
    if kind == "length" and spec["shape"] == "soft_overlong" and spec["cache"] > spec["budget"]:
        raise ConfigError(f"{at}: cache = {spec['cache']} is more than budget = {spec['budget']}")
    if kind == "llm" and spec["template"] is not None:
        for name, given in (("answer", spec["reference"]), ("rubric", bool(spec["rubric"]))):
            if given != (f"{{{name}}}" in spec["template"]):
                setting = "reference" if name == "answer" else name
                raise ConfigError(
                    f"{at}: the template shows {{{name}}} where {setting} is given, and only there"
                )
    if kind == "sum":
        terms = spec["terms"]
        if not isinstance(terms, list | tuple) or not terms:
            raise ConfigError(f"{at}: terms is a list of {{weight, of}}, one at least")
        for term in terms:
            if not isinstance(term, Mapping) or set(term) != {"weight", "of"}:
                raise ConfigError(f"{at}: {term!r} is no term; it has the form {{weight, of}}")
            problem = scheduled(term["weight"])
            if problem:
                raise ConfigError(f"{at}: weight = {term['weight']!r}; it has to be {problem}")
    if kind == "normalised" and (not isinstance(spec["judges"], list) or len(spec["judges"]) < 2):
        raise ConfigError(f"{at}: it takes two judges or more")
    if kind == "by_domain" and not _items(spec["domains"]):
        raise ConfigError(f"{at}: it takes a judge for each domain")
