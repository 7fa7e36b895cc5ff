"""Values that change within a stage: the learning rate, and schedules on any other number.

    r.rl(..., temperature=schedules.linear(1.0, 0.7), kl=KL(schedules.steps({0: 0.01, 40: 0.0})))

A schedule is a frozen value that the settings of a stage hold, so it is part of the stage's
identity and is written as JSON, `{"schedule": kind, ...fields}`, in its record. What a step sees is
a pure function of the step and of the metrics logged before it, which is why a resumed stage goes
on as if it had never stopped. A new kind is one class here and its name in `AnySchedule`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from posttrain.engine import exact
from posttrain.engine.errors import ConfigError

History = Callable[[str], Sequence[float]]
"""Metric name -> its logged values so far, one per step; empty where it was never logged."""

ALTERNATIONS = 8
"""Rounds of an alternating schedule whose settings are checked together with the others'."""


def _number(value: Any, info: ValidationInfo) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(
            f"it calculates with numbers, and {info.field_name} = {value!r} is none; choices for "
            "other values: steps, alternate"
        )
    return value


Number = Annotated[int | float, BeforeValidator(_number)]
Until = Annotated[int, Field(ge=1)] | None


class Schedule(BaseModel):
    """A value that changes from step to step; the kinds are the classes below.

    Settings may be given in their order or by name. Raises ConfigError for a setting that is
    missing or unknown, and for values that do not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedule: str
    """The kind."""

    def __init__(self, *values: Any, **settings: Any) -> None:
        kind, names = type(self).model_fields["schedule"].default, list(type(self).model_fields)[1:]
        given = dict(zip(names, values, strict=False)) | settings
        needed = {n for n, field in type(self).model_fields.items() if field.is_required()}
        if not needed <= given.keys() <= {"schedule", *names} or len(values) > len(names):
            raise ConfigError(
                f"schedule {kind!r} has the fields {', '.join(sorted(given.keys() - {'schedule'}))}"
                f"; it takes {', '.join(sorted(names))}"
            )
        try:
            super().__init__(**given)
        except ValidationError as error:
            problem = error.errors()[0]
            said = problem.get("ctx", {}).get("error")
            if said is None:
                where = ".".join(map(str, problem["loc"]))
                said = f"{where} = {problem['input']!r}: {problem['msg']}"
            raise ConfigError(f"schedule {kind!r}: {said}") from None

    if TYPE_CHECKING:

        @property
        def metric(self) -> str | None:
            """The metric that it reads, None where it only goes by the step."""

    @abstractmethod
    def at(self, step: int, total: int, history: History) -> Any:
        """The value at 0-based `step` of `total`; `history` has the metrics of the steps before."""

    @abstractmethod
    def possible_values(self) -> list[Any]:
        """The first value and then the others at the ends of what it can take."""

    def turns(self) -> set[int]:
        """The 0-based steps at which it changes its course, where it reads no metric."""
        return set()


class Steps(Schedule):
    """Each value from its 0-based step on: `steps({0: 32, 820: 64})`."""

    schedule: Literal["steps"] = "steps"
    values: dict[int, Any]
    """Step to value, of any type that the setting takes; the first step is 0."""
    metric: ClassVar[None] = None

    @field_validator("values", mode="before")
    @classmethod
    def _begins_at_0(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(f"values = {values!r}; see posttrain.schedules.steps")
        keys = [str(key) for key in values]
        if not all(key.isdigit() for key in keys) or "0" not in keys:
            raise ValueError(
                f"its steps are {', '.join(keys) or 'none'}; they are numbers, the first is 0"
            )
        return values

    def at(self, step: int, total: int, history: History) -> Any:
        """The value of the last step that has begun."""
        return self.values[max(begin for begin in self.values if begin <= step)]

    def possible_values(self) -> list[Any]:
        """All values, by their steps."""
        return [self.values[begin] for begin in sorted(self.values)]

    def turns(self) -> set[int]:
        """The steps of its values."""
        return set(self.values)


class Linear(Schedule):
    """From `first` at step 0 to `last` at step `until`, in a straight line: `linear(1, 0.7)`."""

    schedule: Literal["linear"] = "linear"
    first: Number
    last: Number
    until: Until = None
    """None is the stage's last step."""
    metric: ClassVar[None] = None

    def at(self, step: int, total: int, history: History) -> Any:
        """`last` from `until` on."""
        return self.first + (self.last - self.first) * _progress(self.until, step, total)

    def possible_values(self) -> list[Any]:
        """Both ends."""
        return [self.first, self.last]

    def turns(self) -> set[int]:
        """`until`, where it is given."""
        return set() if self.until is None else {self.until}


class Cosine(Schedule):
    """Half a cosine from `first` to `last`, slow at both ends."""

    schedule: Literal["cosine"] = "cosine"
    first: Number
    last: Number
    until: Until = None
    """None is the stage's last step."""
    metric: ClassVar[None] = None

    def at(self, step: int, total: int, history: History) -> Any:
        """`last` from `until` on."""
        share = 0.5 * (1 - math.cos(math.pi * _progress(self.until, step, total)))
        return self.first + (self.last - self.first) * share

    def possible_values(self) -> list[Any]:
        """Both ends."""
        return [self.first, self.last]

    def turns(self) -> set[int]:
        """`until`, where it is given."""
        return set() if self.until is None else {self.until}


class Alternate(Schedule):
    """The values in turn, each for `every` steps (Toggle of Kimi K2.5, arXiv 2602.02276):
    `alternate(32, 8, every=10)`."""

    schedule: Literal["alternate"] = "alternate"
    values: list[Any] = Field(min_length=2)
    every: int = Field(ge=1)
    metric: ClassVar[None] = None

    def __init__(self, *values: Any, **settings: Any) -> None:
        super().__init__(**({"values": list(values)} if values else {}), **settings)

    def at(self, step: int, total: int, history: History) -> Any:
        """The value whose turn it is."""
        return self.values[step // self.every % len(self.values)]

    def possible_values(self) -> list[Any]:
        """All values, by their turns."""
        return list(self.values)

    def turns(self) -> set[int]:
        """The first steps of the first turns, `ALTERNATIONS` of each value."""
        return {turn * self.every for turn in range(ALTERNATIONS * len(self.values))}


class OnPlateau(Schedule):
    """Moves from `first` towards `last` whenever a metric has stopped rising.

    A plateau: the mean of `metric` over the last `patience` steps is less than `gain` above its
    mean over the `patience` steps before. Both windows then start anew (the temperature of GLM-4.5,
    arXiv 2508.06471, 3.2).
    """

    schedule: Literal["on_plateau"] = "on_plateau"
    first: Number
    last: Number
    change: Number | None = None
    """What is added at each plateau; or"""
    times: Number | None = None
    """what the value is multiplied by."""
    metric: str = "reward"
    patience: int = Field(10, ge=1)
    """Steps of each of the two windows whose means are compared."""
    gain: Number = 0.01
    """Least rise of the mean that is no plateau, in units of the metric."""

    @model_validator(mode="after")
    def _moves(self) -> Self:
        if (self.change is None) == (self.times is None):
            raise ValueError("give exactly one of change and times")
        if (self._moved(self.first) - self.first) * (self.last - self.first) <= 0:
            raise ValueError(f"it would never move from {self.first} towards {self.last}")
        return self

    def _moved(self, value: Any) -> Any:
        return value + self.change if self.times is None else value * self.times

    def at(self, step: int, total: int, history: History) -> Any:
        """`first`, moved once for each plateau before `step`, and never beyond `last`."""
        value: Any = self.first
        bound = max if self.last < self.first else min
        seen = history(self.metric)[:step]
        for _ in plateaus(seen, patience=self.patience, gain=self.gain):
            value = bound(self._moved(value), self.last)
        return value

    def possible_values(self) -> list[Any]:
        """Both ends."""
        return [self.first, self.last]


class Track(Schedule):
    """Holds a metric near a target: after each step the value moves by `change` towards it.

    Up while the metric is below `target` and down while it is above, within [`low`, `high`]: the
    upper clip that keeps MAI-Thinking-1's entropy. A negative `change` moves the other way.
    """

    schedule: Literal["track"] = "track"
    metric: str
    first: Number
    target: Number
    change: Number
    low: Number
    high: Number

    @model_validator(mode="after")
    def _begins_within(self) -> Self:
        if not self.low <= self.first <= self.high:
            raise ValueError(
                f"first = {self.first} is not between low = {self.low} and {self.high}"
            )
        return self

    def at(self, step: int, total: int, history: History) -> Any:
        """`first`, moved up for each step with a metric below the target, and down for one above,
        within [`low`, `high`]."""
        value: Any = self.first
        for seen in history(self.metric)[:step]:
            sign = (seen < self.target) - (seen > self.target)
            value = min(max(value + sign * self.change, self.low), self.high)
        return value

    def possible_values(self) -> list[Any]:
        """`first`, and the bounds."""
        return [self.first, self.low, self.high]


AnySchedule = Annotated[
    Steps | Linear | Cosine | Alternate | OnPlateau | Track, Field(discriminator="schedule")
]
"""The type of a field that holds a schedule; pydantic reads it from JSON by its kind."""

KINDS: dict[str, type[Schedule]] = {
    kind.model_fields["schedule"].default: kind for kind in get_args(get_args(AnySchedule)[0])
}


# What a recipe writes; Any, since it stands where a type checker expects the setting's own type.
steps: Callable[..., Any] = Steps
linear: Callable[..., Any] = Linear
cosine: Callable[..., Any] = Cosine
alternate: Callable[..., Any] = Alternate
on_plateau: Callable[..., Any] = OnPlateau
track: Callable[..., Any] = Track


def is_schedule(value: object) -> bool:
    """Whether a setting's value is a schedule, as an object or as JSON."""
    return isinstance(value, Schedule) or (isinstance(value, Mapping) and "schedule" in value)


def parse_schedule(value: Any) -> Schedule:
    """The schedule that a value is, or that its JSON form describes.

    Raises ConfigError for an unknown kind, a field that is missing or unknown, and values that do
    not fit.
    """
    if isinstance(value, Schedule):
        return value
    kind = value.get("schedule") if isinstance(value, Mapping) else None
    if kind not in KINDS:
        raise ConfigError(f"schedule {kind!r} is not known; choices: {', '.join(KINDS)}")
    return KINDS[kind](**value)


def _progress(until: int | None, step: int, total: int) -> float:
    """How far `step` is on the way to `until`, or to the last of `total` steps: 0 to 1."""
    end = total - 1 if until is None else until
    return 1.0 if end <= 0 else min(1.0, step / end)


def corners(schedules: Iterable[Schedule], total: int | None) -> tuple[list[int], int]:
    """The 0-based steps at which schedules that read no metric turn, first and last step among
    them, and the number of steps: `total`, or enough for all turns where it is not known."""
    turns = {0}.union(*(schedule.turns() for schedule in schedules))
    total = max(turns) + 2 if total is None else total
    return sorted(turns | {total - 1}), total


def plateaus(seen: Sequence[float], *, patience: int, gain: float) -> list[int]:
    """The 0-based steps before which `seen` had stopped rising, as `on_plateau` has it."""
    found: list[int] = []
    begin = 0
    for now in range(len(seen) + 1):
        if now - begin < 2 * patience:
            continue
        late, early = seen[now - patience : now], seen[now - 2 * patience : now - patience]
        rise = sum(late) / patience - sum(early) / patience
        if abs(rise - gain) < exact.ROUNDING:
            # So near that the rounding of the sums would decide.
            rise = exact.difference(exact.mean(late), exact.mean(early))
        if rise < gain:
            found.append(now)
            begin = now
    return found


class LearningRate(Protocol):
    """The settings of a stage that `learning_rate` reads."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_decay(self) -> Any: ...
    @property
    def warmup_steps(self) -> int: ...


def learning_rate(settings: LearningRate, step: int, total: int) -> float:
    """Learning rate of 0-based `step` of `total`: linear warm-up, then as `lr_decay` says.

    Warm-up takes at most half of the steps, so that a short stage reaches `lr` too; the last step
    is at `lr * lr_decay.end`, or at `lr` where it stays.
    """
    warmup = min(settings.warmup_steps, total // 2)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    decay = settings.lr_decay
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if decay.kind == "constant":
        share = 1.0
    elif decay.kind == "linear":
        share = 1 - (1 - decay.end) * progress
    else:
        share = decay.end + (1 - decay.end) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * share
