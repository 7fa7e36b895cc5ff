"""Values that change within a stage: the learning rate, and schedules on any other number.

    r.rl(..., temperature=schedules.linear(1.0, 0.7), kl_coef=schedules.steps({0: 0.01, 40: 0.0}))

A schedule is a plain value that the settings of a stage hold, so it is part of the stage's identity
and is written as JSON in its record. What a step sees is a pure function of the step and of the
metrics logged before it, which is why a resumed stage goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from posttrain.engine.errors import ConfigError

History = Callable[[str], Sequence[float]]
"""Metric name -> its logged values so far, one per step; empty where it was never logged."""

Schedule = dict[str, Any]
"""`{"schedule": kind, ...}`: what the functions below return."""

FIELDS: dict[str, frozenset[str]] = {
    "steps": frozenset({"values"}),
    "linear": frozenset({"first", "last", "until"}),
    "cosine": frozenset({"first", "last", "until"}),
    "alternate": frozenset({"values", "every"}),
    "on_plateau": frozenset({"first", "last", "change", "times", "metric", "patience", "gain"}),
    "track": frozenset({"first", "metric", "target", "change", "low", "high"}),
}
"""Kind of schedule -> its fields."""

ALTERNATIONS = 8
"""Rounds of an alternating schedule whose settings are checked together with the others'."""


def steps(values: Mapping[int, Any]) -> Schedule:
    """Each value from its 0-based step on: `steps({0: 32, 820: 64})`.

    Values may be anything that the setting takes, also other than numbers.
    """
    return _checked({"schedule": "steps", "values": {str(k): v for k, v in values.items()}})


def linear(first: float, last: float, *, until: int | None = None) -> Schedule:
    """From `first` at step 0 to `last` at step `until`, the stage's last step if not given."""
    return _checked({"schedule": "linear", "first": first, "last": last, "until": until})


def cosine(first: float, last: float, *, until: int | None = None) -> Schedule:
    """Half a cosine from `first` to `last`, slow at both ends; `until` as in `linear`."""
    return _checked({"schedule": "cosine", "first": first, "last": last, "until": until})


def alternate(*values: Any, every: int) -> Schedule:
    """The values in turn, each for `every` steps (Toggle of Kimi K2.5, arXiv 2602.02276)."""
    return _checked({"schedule": "alternate", "values": list(values), "every": every})


def on_plateau(
    first: float,
    last: float,
    *,
    change: float | None = None,
    times: float | None = None,
    metric: str = "reward",
    patience: int = 10,
    gain: float = 0.01,
) -> Schedule:
    """Starts at `first` and moves on towards `last` whenever a metric has stopped rising.

    A plateau: the mean of `metric` over the last `patience` steps is less than `gain` above its
    mean over the `patience` steps before. Then `change` is added, or the value is multiplied by
    `times`, and both windows start anew (the temperature of GLM-4.5, arXiv 2508.06471, 3.2).
    """
    return _checked(
        {
            "schedule": "on_plateau",
            "first": first,
            "last": last,
            "change": change,
            "times": times,
            "metric": metric,
            "patience": patience,
            "gain": gain,
        }
    )


def track(
    metric: str, *, target: float, first: float, change: float, low: float, high: float
) -> Schedule:
    """Holds a metric near a target: after each step the value moves by `change` towards it.

    Up while the metric is below `target` and down while it is above, within [`low`, `high`]: the
    upper clip that keeps MAI-Thinking-1's entropy. A negative `change` moves the other way.
    """
    return _checked(
        {
            "schedule": "track",
            "first": first,
            "metric": metric,
            "target": target,
            "change": change,
            "low": low,
            "high": high,
        }
    )


def is_schedule(value: object) -> bool:
    """Whether a setting's value is a schedule."""
    return isinstance(value, Mapping) and "schedule" in value


def possible_values(schedule: Schedule) -> list[Any]:
    """The first value and then the others at the ends of what it can take; a setting is checked
    with each. Raises ConfigError for a malformed schedule."""
    spec = _checked(schedule)
    kind = spec["schedule"]
    if kind == "steps":
        return [spec["values"][key] for key in sorted(spec["values"], key=int)]
    if kind == "alternate":
        return list(spec["values"])
    if kind == "track":
        return [spec["first"], spec["low"], spec["high"]]
    return [spec["first"], spec["last"]]


def corners(schedules: Iterable[Schedule], total: int | None) -> tuple[list[int], int]:
    """The 0-based steps at which schedules that read no metric turn, first and last step among
    them, and the number of steps: `total`, or enough for all turns where it is not known."""
    turns = {0}
    for schedule in schedules:
        if schedule["schedule"] == "steps":
            turns |= set(map(int, schedule["values"]))
        elif schedule["schedule"] == "alternate":
            rounds = ALTERNATIONS * len(schedule["values"])
            turns |= {number * schedule["every"] for number in range(rounds)}
        elif schedule["until"] is not None:
            turns.add(schedule["until"])
    total = max(turns) + 2 if total is None else total
    return sorted(turns | {total - 1}), total


def metric_of(schedule: Schedule) -> str | None:
    """The metric that it reads, None where it only goes by the step."""
    metric = schedule.get("metric")
    return None if metric is None else str(metric)


def value_at(schedule: Schedule, step: int, total: int, history: History) -> Any:
    """The value at 0-based `step` of `total`; `history` has the metrics of the steps before."""
    kind = schedule["schedule"]
    if kind == "steps":
        begun = [int(key) for key in schedule["values"] if int(key) <= step]
        return schedule["values"][str(max(begun))]
    if kind == "alternate":
        values = schedule["values"]
        return values[step // schedule["every"] % len(values)]
    if kind == "on_plateau":
        return _plateau(schedule, history(schedule["metric"])[:step])
    if kind == "track":
        value = schedule["first"]
        for seen in history(schedule["metric"])[:step]:
            sign = (seen < schedule["target"]) - (seen > schedule["target"])
            moved = value + sign * schedule["change"]
            value = min(max(moved, schedule["low"]), schedule["high"])
        return value
    until = total - 1 if schedule["until"] is None else schedule["until"]
    share = 1.0 if until <= 0 else min(1.0, step / until)
    if kind == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return schedule["first"] + (schedule["last"] - schedule["first"]) * share


def plateaus(seen: Sequence[float], *, patience: int, gain: float) -> list[int]:
    """The 0-based steps before which `seen` had stopped rising, as `on_plateau` has it."""
    found: list[int] = []
    begin = 0
    for now in range(len(seen) + 1):
        if now - begin < 2 * patience:
            continue
        late, early = seen[now - patience : now], seen[now - 2 * patience : now - patience]
        if sum(late) / patience - sum(early) / patience < gain:
            found.append(now)
            begin = now
    return found


def _plateau(schedule: Schedule, seen: Sequence[float]) -> Any:
    value = schedule["first"]
    bound = max if schedule["last"] < schedule["first"] else min
    for _ in plateaus(seen, patience=schedule["patience"], gain=schedule["gain"]):
        times, change = schedule["times"], schedule["change"]
        moved = value * times if change is None else value + change
        value = bound(moved, schedule["last"])
    return value


def _checked(schedule: Mapping[str, Any]) -> Schedule:
    kind = schedule.get("schedule")
    if kind not in FIELDS:
        raise ConfigError(f"schedule {kind!r} is not known; choices: {', '.join(FIELDS)}")
    given = frozenset(schedule) - {"schedule"}
    if given != FIELDS[kind]:
        raise ConfigError(
            f"schedule {kind!r} has the fields {', '.join(sorted(given))}; it takes "
            f"{', '.join(sorted(FIELDS[kind]))}"
        )
    problem = _problem(schedule, kind)
    if problem:
        raise ConfigError(f"schedule {kind!r}: {problem}")
    return dict(schedule)


def _problem(spec: Mapping[str, Any], kind: str) -> str:
    if kind in ("steps", "alternate"):
        wanted = Mapping if kind == "steps" else list
        if not isinstance(spec["values"], wanted):
            return f"values = {spec['values']!r}; see posttrain.schedules.{kind}"
    else:
        for name in ("first", "last", "low", "high"):
            value = spec.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return (
                    f"it calculates with numbers, and {name} = {value!r} is none; choices for "
                    "other values: steps, alternate"
                )
    if kind == "steps":
        keys = [str(key) for key in spec["values"]]
        if not all(key.isdigit() for key in keys) or "0" not in keys:
            return f"its steps are {', '.join(keys) or 'none'}; they are numbers, the first is 0"
    if kind == "alternate" and (len(spec["values"]) < 2 or spec["every"] < 1):
        return "it takes two values or more, and every >= 1"
    if kind in ("linear", "cosine") and spec["until"] is not None and spec["until"] < 1:
        return f"until = {spec['until']}; it is the step of the last value, 1 or more"
    if kind == "on_plateau":
        if (spec["change"] is None) == (spec["times"] is None):
            return "give exactly one of change and times"
        if spec["patience"] < 1:
            return f"patience = {spec['patience']}; it is a number of steps, 1 or more"
        first, last = spec["first"], spec["last"]
        moved = first * spec["times"] if spec["change"] is None else first + spec["change"]
        if (moved - first) * (last - first) <= 0:
            return f"it would never move from {first} towards {last}"
    if kind == "track" and not (spec["low"] <= spec["first"] <= spec["high"]):
        return f"first = {spec['first']} is not between low = {spec['low']} and {spec['high']}"
    return ""


class LearningRate(Protocol):
    """The settings that `learning_rate` reads."""

    lr: float
    lr_schedule: str
    lr_end: float
    warmup_steps: int


def learning_rate(config: LearningRate, step: int, total: int) -> float:
    """Learning rate of 0-based `step` of `total`: linear warm-up, then the configured shape.

    Warm-up takes at most half of the steps, so that a short stage reaches `lr` too; the last step
    is at `lr * lr_end` (unless the schedule is constant).
    """
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if config.lr_schedule == "constant":
        share = 1.0
    elif config.lr_schedule == "linear":
        share = 1 - (1 - config.lr_end) * progress
    else:
        share = config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share
