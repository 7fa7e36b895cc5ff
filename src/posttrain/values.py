"""What a recipe may set, as values: frozen, checked where they enter, written as JSON.

`Settings` is the base of the settings of every stage and of every choice that has settings of its
own (`posttrain.algorithms`). A setting that is marked with `changing` may be given as a schedule
(`posttrain.schedules`): the field then holds the first value, `schedules` says how it goes on, and
`at` gives the settings of a step.

    Cispo(clip_high=linear(4, 2))                  kind "cispo", clip_high from 4 to 2
    settings.schedules                             {"surrogate.clip_high": Linear(...)}
    settings.at(10, 100, history).surrogate        Cispo(clip_high=3.8)

The JSON form names a choice by its `kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from inspect import get_annotations
from typing import Any, ClassVar, Literal, Self, dataclass_transform

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic import model_validator as validator
from pydantic.fields import FieldInfo

from posttrain.engine.errors import ConfigError
from posttrain.schedules import History, Schedule, corners, is_schedule, parse_schedule

CHANGING = "changing"
TAGS = ("kind", "judge", "schedule")
"""Fields that say of which kind a choice, a judge or a schedule is."""


def changing(default: Any, **limits: Any) -> Any:
    """A field with a default and limits, as pydantic's `Field`, that may be given as a schedule."""
    return Field(default, json_schema_extra={CHANGING: True}, **limits)


def tag(kind: str, *, init: Literal[False] = False) -> Any:
    """The `kind` of a choice, for a type checker no argument of the class; as a value it is `kind`
    itself."""
    return kind


# To a type checker the settings of a class are arguments in their order, all of them optional.
@dataclass_transform(field_specifiers=(tag, PrivateAttr))
class Settings(BaseModel):
    """Base of all settings. An unknown name is an error; nothing changes after it was made.

    What a class adds itself may also be given in its order: `TopK(64)`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    FUNCTION: ClassVar[str] = ""
    """Where a choice is put into practice, as "module:function"; see `implementation`."""

    _schedules: dict[str, Schedule] = PrivateAttr(default_factory=dict)
    """Those of own fields and of entries of own dicts; the fields hold the first values."""

    def __init__(self, *values: Any, **settings: Any) -> None:
        own = get_annotations(type(self))
        names = [name for name in type(self).model_fields if name in own and name != "kind"]
        if len(values) > len(names):
            raise TypeError(f"{type(self).__name__} takes {', '.join(names) or 'no settings'}")
        given = dict(zip(names, values, strict=False))
        twice = [name for name in given if name in settings]
        if twice:
            raise TypeError(f"{type(self).__name__}: {twice[0]} is given twice")
        super().__init__(**given, **settings)

    @validator(mode="wrap")
    @classmethod
    def _take_schedules(cls, given: Any, handler: Callable[[Any], Self]) -> Self:
        """Put the first value of each schedule in its place, and check all that it can become."""
        if not isinstance(given, Mapping):
            return handler(given)
        plain, schedules = _separated(cls, given)
        built = handler(plain)
        if schedules:
            built._schedules = schedules
            built.check_schedules()
            _check_all_values(cls, plain, schedules)
        return built

    def check_schedules(self) -> None:
        """Raise ValueError for a schedule that these settings cannot have."""

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Dotted path of every setting with a schedule, in choices too, to its schedule."""
        found = dict(self._schedules)
        for name, value in self._choices():
            found |= {f"{name}.{path}": s for path, s in value.schedules.items()}
        return found

    def _choices(self) -> Iterator[tuple[str, Settings]]:
        """Settings within these, by name or by `name.entry`."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Settings):
                yield name, value
            elif isinstance(value, dict):
                yield from (
                    (f"{name}.{key}", part)
                    for key, part in value.items()
                    if isinstance(part, Settings)
                )

    def at(self, step: int, total: int, history: History) -> Self:
        """The settings of 0-based `step` of `total`, with schedules resolved."""
        placed: dict[str, Any] = {
            path: _rounded(schedule.at(step, total, history), like=_entry(dict(self), path))
            for path, schedule in self._schedules.items()
        }
        for path, choice in self._choices():
            if choice.schedules:
                placed[path] = choice.at(step, total, history)
        if not placed:
            return self
        return self.model_copy(update=_placed(dict(self), placed))

    def possible(self, name: str) -> list[Any]:
        """The value of a setting, or the first one and the others at the ends of its schedule."""
        schedule = self._schedules.get(name)
        return [getattr(self, name)] if schedule is None else schedule.possible_values()

    def scheduled(self) -> dict[str, float]:
        """The present values of what has a schedule, as metrics `setting/NAME`."""
        metrics: dict[str, float] = {}
        for path in self.schedules:
            value: Any = self
            for part in path.split("."):
                value = value[part] if isinstance(value, dict) else getattr(value, part)
            place = f"setting/{path.replace('.', '/')}"
            parts = value if isinstance(value, dict) else {"": value}
            metrics |= {
                f"{place}/{entry}".rstrip("/"): float(number)
                for entry, number in parts.items()
                if number is not None
            }
        return metrics

    def to_json(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain JSON data that makes the same settings again; without `defaults` only what differs
        from them, and the kind of each choice.

        What differs is the identity of a stage: a setting that is added later, with the default
        that does what was done before, leaves every fingerprint as it is.
        """
        found: dict[str, Any] = {}
        scheduled = {path.partition(".")[0] for path in self._schedules}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            same = name not in scheduled and name not in TAGS and value == default_of(field)
            if defaults or not same:
                found[name] = _plain(value, defaults)
        for path, schedule in self._schedules.items():
            name, _, entry = path.partition(".")
            spec = schedule.model_dump(mode="json")
            found[name] = {**found[name], entry: spec} if entry else spec
        return found

    def implementation(self) -> Callable[..., Any]:
        """The function that puts a choice into practice; it takes `arguments` by name."""
        module, _, name = self.FUNCTION.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function

    def arguments(self) -> dict[str, Any]:
        """The settings of a choice by name, without its kind."""
        return {name: value for name, value in dict(self).items() if name != "kind"}


def by_kind(value: Any) -> Any:
    """`"gae"` as `{"kind": "gae"}`: a choice by its kind alone, with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


ByKind = BeforeValidator(by_kind)
"""Lets a choice be written as the text of its kind."""


def default_of(field: FieldInfo) -> Any:
    """What a field is where it is not given."""
    return field.get_default(call_default_factory=True, validated_data={})


def _separated(
    cls: type[Settings], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """The settings with the first values of schedules, and the schedules by path."""
    found: dict[str, Any] = {}
    allowed = changing_fields(cls)
    for name, value in given.items():
        if is_schedule(value):
            if name not in allowed:
                raise ValueError(
                    f"{name} cannot have a schedule; settings that can: "
                    f"{', '.join(allowed) or 'none here'}"
                )
            found[name] = value
        elif isinstance(value, Mapping) and name in allowed:
            found |= {f"{name}.{key}": part for key, part in value.items() if is_schedule(part)}
    schedules: dict[str, Schedule] = {}
    for path, value in found.items():
        try:
            schedules[path] = parse_schedule(value)
        except ConfigError as error:
            raise ValueError(f"{path}: {error}") from None
    firsts = {path: schedule.possible_values()[0] for path, schedule in schedules.items()}
    return {**given, **_placed(given, firsts)}, schedules


def changing_fields(cls: type[Settings]) -> list[str]:
    """The settings of a class that may be given as a schedule."""
    return [
        name
        for name, field in cls.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get(CHANGING)
    ]


def _check_all_values(
    cls: type[Settings], plain: Mapping[str, Any], schedules: Mapping[str, Schedule]
) -> None:
    """Raise ValueError unless the settings are fine at every step at which a schedule turns.

    Where a metric decides, each end of what a value can be is tried with the others as they are.
    """
    by_metric = {path: s for path, s in schedules.items() if s.metric is not None}
    by_step = {path: s for path, s in schedules.items() if s.metric is None}
    steps = plain.get("steps")
    length = steps if isinstance(steps, int) else None
    turns, total = corners(by_step.values(), length)
    for step in turns:
        # A choice, or a stage whose length is in epochs, does not know which step is the last.
        when = "the last step" if length is None and step == total - 1 else f"step {step}"
        values = {path: s.at(step, total, _no_history) for path, s in by_step.items()}
        values |= {path: s.possible_values()[0] for path, s in by_metric.items()}
        others = [{p: value} for p, s in by_metric.items() for value in s.possible_values()[1:]]
        for one in [values, *(values | other for other in others)]:
            _check_values(cls, plain, one, when)


def _check_values(
    cls: type[Settings], plain: Mapping[str, Any], values: Mapping[str, Any], when: str
) -> None:
    firsts = {path: _entry(plain, path) for path in values}
    placed = {path: _rounded(value, like=firsts[path]) for path, value in values.items()}
    try:
        cls(**{**plain, **_placed(plain, placed)})
    except ValidationError as error:
        problem = error.errors()[0]
        message = str(problem.get("ctx", {}).get("error", problem["msg"]))
        where = ".".join(map(str, problem["loc"]))
        told = {p: v for p, v in placed.items() if p.partition(".")[0] == where.partition(".")[0]}
        shown = ", ".join(f"{path} = {value}" for path, value in (told or placed).items())
        raise ValueError(f"{shown} of its schedule at {when}: {message}") from None


def _entry(settings: Mapping[str, Any], path: str) -> Any:
    name, _, entry = path.partition(".")
    return settings[name][entry] if entry else settings[name]


def _rounded(value: Any, *, like: Any) -> Any:
    """A whole number where the setting counts something."""
    return round(value) if type(like) is int and isinstance(value, float) else value


def _no_history(metric: str) -> tuple[float, ...]:
    return ()


def _placed(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that these values change, by name; entries go into copies of their dicts."""
    changed: dict[str, Any] = {}
    for path, value in values.items():
        name, _, entry = path.partition(".")
        if entry:
            changed[name] = {**changed.get(name, settings[name]), entry: value}
        else:
            changed[name] = value
    return changed


def _plain(value: Any, defaults: bool) -> Any:
    if isinstance(value, Settings):
        return value.to_json(defaults=defaults)
    if isinstance(value, BaseModel):
        # A judge or a schedule, and what they are made of.
        plain = value.model_dump(mode="json")
        for name, field in type(value).model_fields.items():
            part = getattr(value, name)
            if not defaults and name not in TAGS and part == default_of(field):
                plain.pop(name, None)
            elif name in plain and isinstance(part, BaseModel | Mapping | list | tuple):
                plain[name] = _plain(part, defaults)
        return plain
    if isinstance(value, Mapping):
        return {str(key): _plain(part, defaults) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, defaults) for part in value]
    return value
