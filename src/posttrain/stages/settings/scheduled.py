"""What all settings of stages that compute share: seed, precision, and values that change by step.

A setting may be given as a schedule (`posttrain.schedules`). In a dict of numbers, such as weights
of domains, an entry may be one: its key among `Config.schedules` is then `setting.entry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posttrain.engine.errors import ConfigError
from posttrain.schedules import (
    AnySchedule,
    History,
    corners,
    is_schedule,
    parse_schedule,
    steps,
)


def refuse_unread(config: BaseModel, *fields: str, because: str) -> None:
    """Raise ValueError for a setting that was changed or scheduled, and that nothing reads."""
    scheduled = {field_of(key) for key in getattr(config, "schedules", {})}
    for name in fields:
        field = type(config).model_fields[name]
        value, default = getattr(config, name), field.get_default(call_default_factory=True)
        if value != default or name in scheduled:
            given = f"{name} has a schedule" if name in scheduled else f"{name} = {value}"
            raise ValueError(
                f"{given}: it is not read with {because}; leave it out, or change the other setting"
            )


def field_of(key: str) -> str:
    """The setting that a key of `Config.schedules` is about: `aux` of `aux.ptx`."""
    return key.partition(".")[0]


class Config(BaseModel):
    """Base of the settings of stages that compute with models: an unknown name is an error.

    Where a stage has steps, the settings in its `SCHEDULABLE` and in those of its parts, or entries
    of those that are dicts, may be given as a schedule: the field then holds the first value,
    `schedules` the rest, and `at` the settings of a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset()
    LOGS_ALL: ClassVar[bool] = True
    """Whether every step logs all metrics of the stage; those by domain apart."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice of the stage follows from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which models compute. Weights that are trained stay in float32, and so does every
    softmax of a loss."""
    schedules: dict[str, AnySchedule] = Field(default_factory=dict)
    """Setting, or setting.entry, to its schedule; filled in where one is given as a schedule."""

    @classmethod
    def schedulable(cls) -> frozenset[str]:
        """The settings that may be given as a schedule, those of all parts."""
        return frozenset().union(*(vars(part).get("SCHEDULABLE", ()) for part in cls.__mro__))

    @model_validator(mode="before")
    @classmethod
    def _take_schedules(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = {name: value for name, value in values.items() if is_schedule(value)}
        schedulable = cls.schedulable()
        for name in schedulable & values.keys() - found.keys():
            if isinstance(values[name], Mapping):
                entries = values[name].items()
                found |= {f"{name}.{key}": part for key, part in entries if is_schedule(part)}
        kept = {**values.get("schedules", {}), **found}
        for key in kept:
            if field_of(key) not in schedulable:
                choices = ", ".join(sorted(schedulable)) or "none of this stage"
                raise ValueError(f"{key} cannot have a schedule; settings that can: {choices}")
        for key, schedule in kept.items():
            try:
                kept[key] = parse_schedule(schedule)
            except ConfigError as error:
                raise ValueError(f"{key}: {error}") from None
        firsts = {key: kept[key].possible_values()[0] for key in found}
        plain = {**values, **({"schedules": kept} if kept else {})}
        return plain | _placed(plain, firsts)

    @model_validator(mode="after")
    def _entries_are_there(self) -> Self:
        for key in self.schedules:
            name, _, entry = key.partition(".")
            whole = getattr(self, name)
            here = isinstance(whole, dict) and entry in whole and name not in self.schedules
            if entry and not here:
                raise ValueError(
                    f"schedules: {key!r} is no entry of {name} with a value of its own; give the "
                    f"schedule in {name} itself"
                )
        return self

    @model_validator(mode="after")
    def _scheduled_values_fit(self) -> Self:
        """Check what the settings are at each step at which a schedule turns. Where a metric
        decides, each end of what a value can be is combined with what the others are then."""
        plain = {name: getattr(self, name) for name in type(self).model_fields}
        # As constants, so that what a schedule makes sense of stays sensible, and nothing recurs.
        plain["schedules"] = {key: steps({0: self._first(key)}) for key in self.schedules}
        free = {k: s for k, s in self.schedules.items() if s.metric is not None}
        bound = {k: s for k, s in self.schedules.items() if k not in free}
        if all(len(schedule.possible_values()) == 1 for schedule in self.schedules.values()):
            return self
        turns, total = corners(bound.values(), getattr(self, "steps", None))
        for step in turns:
            then = {key: s.at(step, total, _no_history) for key, s in bound.items()}
            then |= {key: schedule.possible_values()[0] for key, schedule in free.items()}
            others = [{k: value} for k, s in free.items() for value in s.possible_values()[1:]]
            for values in [then, *(then | other for other in others)]:
                self._fits(plain, self._whole(values), step)
        return self

    def _fits(self, plain: Mapping[str, Any], values: Mapping[str, Any], step: int) -> None:
        """Raise ValueError where the settings cannot be these together."""
        try:
            type(self)(**{**plain, **_placed(plain, values)})
        except ValidationError as error:
            problem = error.errors()[0]
            message = str(problem.get("ctx", {}).get("error", problem["msg"]))
            if all(values[key] == self._first(key) for key in values):
                # Wrong with these settings whatever the schedules are.
                raise ValueError(message) from None
            where = ".".join(map(str, problem["loc"]))
            named = {k: v for k, v in values.items() if field_of(k) == field_of(where)}
            told = named or values
            shown = ", ".join(f"{key} = {value}" for key, value in told.items())
            whose = "its schedule" if len(told) == 1 else f"their schedules at step {step}"
            raise ValueError(f"{shown} of {whose}: {message}") from None

    def _first(self, key: str) -> Any:
        name, _, entry = key.partition(".")
        return getattr(self, name)[entry] if entry else getattr(self, name)

    def _whole(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same values, rounded where the setting counts something."""
        counts = {key for key in values if type(self._first(key)) is int}
        return {
            key: round(value) if key in counts and isinstance(value, float) else value
            for key, value in values.items()
        }

    def possible(self, name: str) -> list[Any]:
        """The value of a setting, or the first one and the others at the ends of its schedule."""
        schedule = self.schedules.get(name)
        return [getattr(self, name)] if schedule is None else schedule.possible_values()

    def only(self, *names: str) -> Self:
        """The same with no other schedules than those of these settings and their entries."""
        kept = {key: s for key, s in self.schedules.items() if field_of(key) in names}
        return self.model_copy(update={"schedules": kept})

    def at(self, step: int, total: int, history: History) -> Self:
        """The settings of 0-based `step` of `total`, schedules resolved.

        Raises ConfigError for a schedule that reads a metric which the stage does not log.
        """
        if not self.schedules:
            return self
        for key, schedule in self.schedules.items() if step > 0 and self.LOGS_ALL else ():
            metric = schedule.metric
            if metric is not None and "/" not in metric and not history(metric):
                raise ConfigError(
                    f"the schedule of {key} reads the metric {metric!r}, which this stage does not "
                    "log; choose one of its metrics (docs/metrics.md), such as loss"
                )
        now = {key: s.at(step, total, history) for key, s in self.schedules.items()}
        return self.model_copy(update=_placed(dict(self), self._whole(now)))

    def scheduled(self) -> dict[str, float]:
        """The values of what has a schedule as metrics, `setting/NAME` or `setting/NAME/ENTRY`.

        Of the settings that `at` gave it is what a step was made with. None is left out.
        """
        metrics: dict[str, float] = {}
        for key in self.schedules:
            value, place = self._first(key), f"setting/{key.replace('.', '/', 1)}"
            parts = value if isinstance(value, dict) else {"": value}
            metrics |= {
                f"{place}/{entry}".rstrip("/"): float(part)
                for entry, part in parts.items()
                if part is not None
            }
        return metrics


def _no_history(metric: str) -> tuple[float, ...]:
    return ()


def _placed(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that these values change, by name; entries go into copies of their dicts."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name, _, entry = key.partition(".")
        if entry:
            changed[name] = {**changed.get(name, settings[name]), entry: value}
        else:
            changed[name] = value
    return changed
