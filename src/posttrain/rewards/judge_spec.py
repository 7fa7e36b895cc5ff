"""The JSON form of judges: `{"judge": kind, ...fields}`, nested; its fields and their checks.

Read at plan time by `posttrain.judges` and at run time by `posttrain.rewards.judging`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards.choices import choices_text
from posttrain.schedules import is_schedule, possible_values

Spec = dict[str, Any]
EDGE = "judges."
"""What the edges of a judge's stages begin with."""

Check = Callable[[Any], str]
"""Returns what a value has to be, or nothing where it is."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> str:
    return "" if _number(value) else "a number"


def _not_negative(value: Any) -> str:
    return "" if _number(value) and value >= 0 else "a number >= 0"


def _positive(value: Any) -> str:
    return "" if _number(value) and value > 0 else "a number > 0"


def _count(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and value > 0 else "a whole number > 0"


def _scheduled(value: Any) -> str:
    if not is_schedule(value):
        return "" if _number(value) else "a number or a schedule"
    return "" if all(map(_number, possible_values(value))) else "a schedule of numbers"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value else "a text"


def _edge(value: Any) -> str:
    fits = isinstance(value, str) and value.startswith(EDGE)
    return "" if fits else f"the edge of a stage, {EDGE}NAME; pass the stage in the recipe"


def _url(value: Any) -> str:
    fits = isinstance(value, str) and value.startswith(("http://", "https://"))
    return "" if fits else "a url that begins with http:// or https://"


def _regex(value: Any) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        return f"a regular expression ({error})"
    return ""


def _rubric(value: Any) -> str:
    fits = value is True or (isinstance(value, str) and value)
    return "" if fits else "a text, or true to read each row's rubric"


def _optional(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


def _one_of(*choices: str) -> Check:
    return lambda value: "" if value in choices else f"one of {', '.join(choices)}"


def _template(*fields: str, needs: tuple[str, ...]) -> Check:
    """A text for the values of `fields`; all of `needs` stand in it."""

    def check(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            return "a text"
        found = set(re.findall(r"\{(\w+)\}", value))
        if found <= set(fields) and set(needs) <= found:
            return ""
        may, must = (", ".join(f"{{{name}}}" for name in names) for names in (fields, needs))
        return f"a text with {must}; it may hold {may}"

    return check


SHAPES: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"budget"}),
    "budget": frozenset({"budget"}),
    "soft_overlong": frozenset({"budget", "cache"}),
    "concave": frozenset({"budget", "k", "q"}),
    "pass_rate": frozenset({"budget", "of"}),
    "group_relative": frozenset(),
}
"""Shape of a length penalty -> the fields that it has besides."""

_UNIT = _one_of("word", "character")
_PAIRWISE: dict[str, Check] = {
    "pairing": _one_of("all", "circular"),
    "swap": _flag,
    "template": _template("prompt", "a", "b", "answer", needs=("a", "b")),
}
_ENDPOINT: dict[str, Check] = {"url": _url, "model": _text, "key": _optional(_text)}

FIELDS: Mapping[str, Mapping[str, Check]] = {
    "verifier": {},
    "scalar": {"model": _edge, "squash": _flag},
    "oracle": {"noise": _not_negative},
    "constant": {"value": _finite},
    "length": {
        "shape": _one_of(*SHAPES), "budget": _count, "cache": _count, "k": _positive,
        "q": _not_negative,
    },
    "language": {"regex": _regex, "unit": _UNIT},
    "format": {"pattern": _regex},
    "repetition": {"n": _count, "unit": _UNIT},
    "finished": {},
    "llm": {
        **_ENDPOINT, "reference": _flag, "rubric": _optional(_rubric), "best": _positive,
        "template": _template(
            "prompt", "response", "answer", "rubric", needs=("prompt", "response")
        ),
    },
    "compare": {"model": _edge, **_PAIRWISE},
    "compare_endpoint": {**_ENDPOINT, **_PAIRWISE},
    "itself": _PAIRWISE,
    "human": {"file": _optional(_text), "pairing": _one_of("all", "circular")},
    "sum": {},
    "gate": {"below": _scheduled},
    "lexicographic": {},
    "normalised": {},
    "whitened": {},
    "by_domain": {},
}  # fmt: skip
"""Kind -> its plain fields and their checks."""

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
            yield from ((f"{at}.{d}", j) for d, j in (value or {}).items())
        elif kind != "length" or value is not None:
            yield f"{at}.{name}", value


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
            problem = _scheduled(term["weight"])
            if problem:
                raise ConfigError(f"{at}: weight = {term['weight']!r}; it has to be {problem}")
    if kind == "normalised" and (not isinstance(spec["judges"], list) or len(spec["judges"]) < 2):
        raise ConfigError(f"{at}: it takes two judges or more")
    if kind == "by_domain" and not spec["domains"]:
        raise ConfigError(f"{at}: it takes a judge for each domain")
