"""The form of the files that an evaluation leaves: checked before anything shows them.

They may come from a stranger's store, with hashes made anew. What is missing here from files of
older versions is optional, and what newer ones add stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from posttrain.engine.errors import ConfigError

LARGEST = 1e15
"""Of numbers that are shown; no accuracy, score, length or divergence comes near."""


def _shown(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"is beyond {LARGEST:g}")
    return value


Number = Annotated[float, AfterValidator(_shown)]
Count = Annotated[int, Field(ge=0, le=10**12)]
_MORE = ConfigDict(extra="allow", strict=True)


class _Value(BaseModel):
    model_config = _MORE
    value: Number
    low: Number
    high: Number


class _Mean(BaseModel):
    model_config = _MORE
    sampled: Number
    greedy: Number


class _Both(_Value):
    """At temperature 1, and greedily."""

    greedy: _Value


class _Cells(BaseModel):
    model_config = _MORE
    init: _Value | None
    student: _Value
    teacher: _Value | None
    recovery: _Value | None
    note: str | None
    gain: _Value | None = None
    teacher_gain: _Value | None = None


class _Constant(BaseModel):
    model_config = _MORE
    value: Number
    response: str


class _Domain(_Cells):
    num_problems: Count
    greedy: _Cells
    constant: _Constant


class _Norm(BaseModel):
    model_config = _MORE
    norm: Number | None
    norm_low: Number | None
    norm_high: Number | None
    min_recovery: Number | None
    norm_domains: Count | None = None
    gain: _Value | None = None


class _View(_Norm):
    """What is said of one student."""

    domains: dict[str, _Domain]
    greedy: _Norm


_Models = dict[str, dict[str, _Mean]]


class _One(BaseModel):
    """evaluation.json of one student with its init, but for what is said of the student."""

    model_config = _MORE
    routes: dict[str, str]
    models: _Models
    split: str
    samples: Count


class _Decodings(BaseModel):
    model_config = _MORE
    sampled: _Value
    greedy: _Value


class _Pair(BaseModel):
    model_config = _MORE
    first: str
    second: str
    domains: dict[str, _Both]
    all: _Both | None


class _Behaviour(BaseModel):
    model_config = _MORE
    length: _Value
    truncated: Number
    kl_init: _Value | None
    kl_teacher: _Value | None


class _Unverified(BaseModel):
    model_config = _MORE
    num_problems: Count
    teacher: str | None
    models: dict[str, _Behaviour]


class _Judged(BaseModel):
    model_config = _MORE
    score: _Value | None
    win: _Value | None


class _JudgedBoth(_Judged):
    greedy: _Judged


class _JudgedDomain(BaseModel):
    model_config = _MORE
    num_problems: Count
    judge: list[str]
    compares: bool
    unit: bool
    models: dict[str, _JudgedBoth]


class _Several(BaseModel):
    """evaluation.json of several models."""

    model_config = _MORE
    students: Annotated[dict[str, _View], Field(min_length=1)]
    along: dict[str, dict[str, _Decodings]]
    pairs: list[_Pair]
    routes: dict[str, str]
    models: _Models
    unverified: dict[str, _Unverified] = {}
    judged: dict[str, _JudgedDomain] = {}
    split: str
    samples: Count


class _Response(BaseModel):
    model_config = _MORE
    sampled: str
    greedy: str
    sampled_score: Number | None
    greedy_score: Number | None
    sampled_judged: Number | None = None
    greedy_judged: Number | None = None


class _Problem(BaseModel):
    model_config = _MORE
    prompt: str
    answer: str | None
    responses: dict[str, _Response]


def check_evaluation(content: Mapping[str, Any], edges: Iterable[str]) -> None:
    """Raise ConfigError, with the field, unless it is an evaluation of the models at these
    edges."""
    several = "students" in content
    for form in (_Several,) if several else (_One, _View):
        _check(form, content)
    if several:
        models = content["models"]
        students = {
            name: name if name in models else f"students.{name}" for name in content["students"]
        }
        wanted = [*students.values(), *(f"along.{name}" for name in content["along"])]
        views = list(content["students"].values())
    else:
        wanted, views = ["student"], [content]
    domains = list(views[0]["domains"])
    if any(list(view["domains"]) != domains for view in views):
        raise ConfigError("students: not all have the same domains")
    known = set(edges)
    if several and not known >= content["models"].keys():
        raise ConfigError("models: has one that was not evaluated")
    silent, judged = content.get("unverified", {}), content.get("judged", {})
    wanted += [f"teachers.{name}" for domain, name in content["routes"].items()]
    for edge in wanted:
        if edge not in content["models"]:
            raise ConfigError(f"models: {edge} is missing")
    for edge, row in content["models"].items():
        if list(row) != domains:
            raise ConfigError(f"models.{edge}: has other domains than the students")
        for part, rows in (("unverified", silent), ("judged", judged)):
            for domain, of_domain in rows.items():
                if edge not in of_domain["models"]:
                    raise ConfigError(f"{part}.{domain}.models: {edge} is missing")
    for name, row in content.get("along", {}).items():
        if list(row) != domains:
            raise ConfigError(f"along.{name}: has other domains than the students")
    for pair in content.get("pairs", ()):
        if list(pair["domains"]) != domains or not {pair["first"], pair["second"]} <= set(students):
            raise ConfigError("pairs: has a student or domains that there are not")
        if len(domains) > 1 and pair["all"] is None:
            raise ConfigError("pairs: all is missing")
    for view in views:
        _check_view(view, content)


def _check_view(view: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """What of one student hangs together: accuracies of init and teacher, gains, Norm."""
    with_init = "init" in content["models"]
    for name, row in view["domains"].items():
        for cells in (row, row["greedy"]):
            if (cells["init"] is not None) != with_init:
                raise ConfigError(f"domains.{name}.init: is there, or not, unlike that of models")
            if (cells["teacher"] is not None) != (name in content["routes"]):
                raise ConfigError(f"domains.{name}.teacher: is there, or not, unlike its route")
            if view.get("gain") is not None and cells.get("gain") is None:
                raise ConfigError(f"domains.{name}.gain: is missing")
    for part in (view, view["greedy"]):
        numbers = [part[key] for key in ("norm", "norm_low", "norm_high", "min_recovery")]
        if numbers.count(None) not in (0, 4):
            raise ConfigError("norm: some of norm, norm_low, norm_high, min_recovery are missing")
    if not (with_init or "students" in content):
        raise ConfigError("models: init is missing")


def check_transcripts(content: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the field, unless it holds problems with answers by domain."""
    _check(dict[str, list[_Problem]], content)


def _check(form: Any, content: Any) -> None:
    try:
        TypeAdapter(form).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place}: {first['msg']}") from None
