"""What a sweep found: one row per setting of the axes, with mean and spread over seeds.

Everything is a pure function of the artifacts that the sweep made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

from posttrain.engine.graph import role_of
from posttrain.engine.record import Artifact
from posttrain.report.scores import split_words
from posttrain.report.seeds import Difference, Spread, difference
from posttrain.report.wording import DASH, RANGE, fixed, number, percent, signed
from posttrain.stages.kinds import shown_kind

Unit = Literal["percent", "ratio", "number"]

NORM = "Norm"
ACCURACY = "accuracy"
ALL_STUDENTS = "accuracy of all students"
BETTER: Mapping[str, Literal["higher", "lower"]] = {
    "reward": "higher",
    "heldout_accuracy": "higher",
    "score": "higher",
    "rate": "higher",
    "loss": "lower",
    "kl": "lower",
}
"""Summary metrics of which one direction is better, beside accuracies and Norm, of which more is
better; of others no setting is called the best."""
_NOT_STUDENTS = {
    "norm": "Norm",
    "score": "judge's score",
    "win": "wins against init",
    "kl_init": "KL to init",
}
"""Metrics of an evaluation in several parts begin with one of these, else with a student; and how
these are called in a table."""


class Measure(NamedTuple):
    """A number of a run."""

    value: float
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class Run:
    """One setting of the axes with one seed."""

    setting: int
    """Its place among the settings of the sweep."""
    seed: int
    stage: str
    """What the plan calls its target."""
    fingerprint: str
    status: str
    """Of the target: "ran", "cached", "failed", "blocked", ..."""
    why: str = ""
    """Why it is not there."""
    artifact: Artifact | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for, and what came of it."""

    recipe: str
    suite: str
    split: str | None
    """Whose problems the evaluations asked; None where the target is no evaluation."""
    axes: Mapping[str, Sequence[str]]
    """What is varied -> its values, as they were written."""
    seeds: Sequence[int]
    settings: Sequence[Mapping[str, str]]
    """Every combination of values of the axes."""
    runs: Sequence[Run]

    def of(self, setting: int) -> list[Run]:
        """The runs of one setting, in the order of the seeds."""
        return [run for run in self.runs if run.setting == setting]

    def words(self, setting: int) -> str:
        """A setting as people read it: "lr=0.1, steps=20"; empty without axes."""
        return ", ".join(f"{key}={value}" for key, value in self.settings[setting].items())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting of the axes."""

    setting: int
    measures: Mapping[str, Spread]
    difference: Difference | None = None
    """Of the metric; None for the first setting and where no seed has both."""
    best: bool = False
    missing: Sequence[Run] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The table of a sweep."""

    metric: str | None
    """The measure that settings are compared by; None where no run ended."""
    units: Mapping[str, Unit]
    """All measures, the metric first, and how each is written."""
    rows: Sequence[Row]
    notes: Sequence[str]
    """What the numbers are, a sentence each."""
    cautions: Sequence[str]
    """What keeps them from meaning more, a sentence each."""
    scores: bool
    """Whether the measures are those of evaluations, hence shares of problems."""

    @property
    def best(self) -> Row | None:
        """The setting with the best mean; None where none can be named."""
        return next((row for row in self.rows if row.best), None)

    def title(self, measure: str) -> str:
        """A measure as the head of a column."""
        title = measure
        head, _, rest = measure.partition("/")
        if head in _NOT_STUDENTS and rest:
            student, _, domain = rest.rpartition("/")
            title = f"{_NOT_STUDENTS[head]}, {domain}"
            if student != "student":
                title = f"{student}: {title}"
        return f"{title}, %" if self.units[measure] == "percent" else title


def measures(artifact: Artifact) -> dict[str, Measure]:
    """The numbers of a target, the one to compare by first.

    Of an evaluation, for each student, Norm where there is one, the accuracy at temperature 1 as
    the mean over domains and per domain; before them, of several students, the mean over them. Of
    another target its summary metric.
    """
    kind, metrics = shown_kind(artifact.kind), artifact.metrics
    if "scores" in kind.makes:
        return _of_evaluation(metrics)
    for key in (kind.number[0], *kind.headline):
        value = metrics.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return {key: Measure(float(value), "number")}
    return {}


def _of_evaluation(metrics: Mapping[str, Any]) -> dict[str, Measure]:
    domains: dict[str, dict[str, Measure]] = {}
    norms = {"student": metrics["norm"]} if "norm" in metrics else {}
    others = {}
    for key, value in metrics.items():
        head, _, rest = key.partition("/")
        if head == "norm" and rest:
            norms[rest] = value
        elif head in _NOT_STUDENTS and rest:
            share: Unit = "percent" if head == "win" else "number"
            others[key] = Measure(float(value), share)
        elif rest:
            domains.setdefault(head, {})[rest] = Measure(float(value), "percent")
    found: dict[str, Measure] = {}
    if len(domains) > 1:
        every = [fmean(a.value for a in accuracies.values()) for accuracies in domains.values()]
        found[ALL_STUDENTS] = Measure(fmean(every), "percent")
    for student, accuracies in domains.items():
        # One student needs no name.
        before = f"{student}: " if len(domains) > 1 else ""
        if norms.get(student) is not None:
            found[f"{before}{NORM}"] = Measure(float(norms[student]), "ratio")
        mean = fmean(accuracy.value for accuracy in accuracies.values())
        found[f"{before}{ACCURACY}"] = Measure(mean, "percent")
        found |= {f"{before}{domain}": accuracy for domain, accuracy in accuracies.items()}
    return found | others


def outcome(sweep: Sweep) -> Outcome:
    """The table of a sweep, of whatever of it is there."""
    found = {(run.setting, run.seed): measures(run.artifact) for run in sweep.runs if run.artifact}
    metric = _metric(list(found.values()))
    units = {key: one.unit for values in found.values() for key, one in values.items()}
    if metric is not None:
        units = {metric: units[metric]} | units
    rows: list[Row] = []
    for setting in range(len(sweep.settings)):
        own = {run.seed: found[setting, run.seed] for run in sweep.of(setting) if run.artifact}
        by_measure = {
            key: {seed: values[key].value for seed, values in own.items() if key in values}
            for key in units
        }
        spreads = {key: Spread(values=values) for key, values in by_measure.items() if values}
        first = rows[0].measures.get(metric) if rows and metric else None
        mine = spreads.get(metric) if metric else None
        rows.append(
            Row(
                setting=setting,
                measures=spreads,
                difference=difference(first, mine) if first and mine else None,
                missing=[run for run in sweep.of(setting) if run.artifact is None],
            )
        )
    artifacts = [run.artifact for run in sweep.runs if run.artifact]
    scores = any("scores" in shown_kind(artifact.kind).makes for artifact in artifacts)
    rows = _with_best(rows, metric, units)
    made = Outcome(metric=metric, units=units, rows=rows, notes=[], cautions=[], scores=scores)
    return replace(
        made,
        notes=_notes(sweep, made),
        cautions=_cautions(sweep, made, list(found.values())),
    )


def _metric(found: Sequence[Mapping[str, Measure]]) -> str | None:
    """The first measure that every run has; Norm of some and not of others compares nothing."""
    if not found:
        return None
    return next((key for key in found[0] if all(key in values for values in found)), None)


def _compared(
    rows: Sequence[Row], metric: str | None, units: Mapping[str, Unit]
) -> tuple[list[Row], Literal["higher", "lower"] | None]:
    """The rows that have the metric for all seeds, and which direction of it is better, None where
    that is not known or there is nothing to compare."""
    whole = [row for row in rows if metric in row.measures and not row.missing]
    if metric is None or len(whole) < 2:
        return whole, None
    return whole, BETTER.get(metric) if units[metric] == "number" else "higher"


def _with_best(rows: Sequence[Row], metric: str | None, units: Mapping[str, Unit]) -> list[Row]:
    """The rows with the best one marked, where there is one alone."""
    whole, better = _compared(rows, metric, units)
    if metric is None or better is None:
        return list(rows)
    means = [row.measures[metric].mean for row in whole]
    top = max(means) if better == "higher" else min(means)
    alone = means.count(top) == 1
    return [
        replace(row, best=alone and row in whole and row.measures[metric].mean == top)
        for row in rows
    ]


# -- in words --------------------------------------------------------------------------------------


def _notes(sweep: Sweep, made: Outcome) -> list[str]:
    """What the numbers are."""
    notes = [_about(sweep, made)]
    if len(sweep.seeds) > 1:
        notes.append(
            f"Mean ± standard deviation over {len(sweep.seeds)} seeds. A difference is to the "
            "first row, the same seed paired with the same seed; its 95 % interval is a t-interval "
            "over the seeds."
        )
    if made.best is not None:
        notes.append(_about_best(sweep, made, made.best))
    return notes


def _cautions(sweep: Sweep, made: Outcome, found: Sequence[Mapping[str, Measure]]) -> list[str]:
    """What keeps the numbers from meaning more."""
    said = []
    if made.scores and sweep.split != "validation":
        said.append(
            f"Settings are compared on {split_words(sweep.split or '')} problems: "
            "the best one is selected on the very problems that its number is from, so that number "
            "flatters it."
        )
    if len(sweep.seeds) == 1:
        said.append(
            f"One seed ({sweep.seeds[0]}): no spread and no interval over seeds is known, and a "
            "difference may be the noise of one run."
        )
    if made.best is None and _compared(made.rows, made.metric, made.units)[1] is not None:
        said.append(f"Several settings share the best mean {made.metric}, hence none is marked.")
    norms = sum(NORM in values for values in found)
    if made.metric == ACCURACY and norms:
        said.append(
            f"Only {norms} of {len(found)} runs have a Norm, hence settings are compared by "
            f"{made.metric}."
        )
    if made.metric == NORM and _yardsticks_differ(sweep):
        said.append(
            "The axes change the init or the teachers as well, against which Norm is measured: "
            "compare the accuracies rather than Norm."
        )
    said += _same(sweep)
    for row in made.rows:
        for run in row.missing:
            what = f"{sweep.words(row.setting)}, seed {run.seed}".removeprefix(", ")
            said.append(f"{what}: {run.status}" + (f"; {run.why}" if run.why else ""))
    return said


def _about(sweep: Sweep, made: Outcome) -> str:
    """What the numbers are."""
    if not made.scores:
        return (
            "The target is no evaluation: the number is the summary metric of the stage itself, "
            "which may be of its own training batches."
        )
    problems = f"{split_words(sweep.split or '')} problems"
    unseen = "; the held-out problems were not looked at" if sweep.split == "validation" else ""
    if made.metric == ALL_STUDENTS:
        who = "each student; settings are compared by the mean over all of them"
        return f"Accuracies at temperature 1 on {problems}, of {who}{unseen}."
    return f"Accuracies are of the student at temperature 1 on {problems}{unseen}."


def _about_best(sweep: Sweep, made: Outcome, best: Row) -> str:
    assert made.metric is not None
    name = sweep.words(best.setting)
    first = sweep.words(0)
    value = written(best.measures[made.metric].mean, made.units[made.metric])
    told = f"Best mean {made.metric}: {name} with {value}"
    if best.setting == 0:
        return f"{told}, the first setting."
    found = best.difference
    if found is None or found.low is None or found.high is None:
        return f"{told}."
    if found.low <= 0 <= found.high:
        return f"{told}; over these seeds it cannot be told apart from the first, {first}."
    return f"{told}; the interval of its difference to the first, {first}, excludes 0."


def _yardsticks_differ(sweep: Sweep) -> bool:
    """Whether, for one seed, settings were measured against other inits or teachers."""
    seen: dict[int, set[tuple[tuple[str, str], ...]]] = {}
    for run in sweep.runs:
        if run.artifact is not None:
            others = tuple(
                (edge, source["fingerprint"])
                for edge, source in sorted(run.artifact.inputs.items())
                if role_of(edge) in ("init", "teachers")
            )
            seen.setdefault(run.seed, set()).add(others)
    return any(len(found) > 1 for found in seen.values())


def _same(sweep: Sweep) -> list[str]:
    """Which settings are the same stages."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for setting in range(len(sweep.settings)):
        prints = tuple(run.fingerprint for run in sweep.of(setting))
        groups.setdefault(prints, []).append(setting)
    return [
        f"{' and '.join(sweep.words(setting) for setting in group)} are one and the same: all "
        "their stages are shared."
        for group in groups.values()
        if len(group) > 1
    ]


def written(value: float, unit: Unit) -> str:
    """A value in its unit: a share in per cent, Norm with two decimals."""
    if unit == "percent":
        return percent(value)
    return fixed(value, 2) if unit == "ratio" else number(value)


def spread_text(spread: Spread | None, unit: Unit) -> str:
    """Mean and standard deviation: "61.2 ± 1.3"."""
    if spread is None:
        return DASH
    mean = written(spread.mean, unit)
    return mean if spread.deviation is None else f"{mean} ± {written(spread.deviation, unit)}"


def difference_text(found: Difference | None, unit: Unit) -> tuple[str, str]:
    """A difference with its sign, and its interval, empty where there is none."""
    if found is None:
        return DASH, ""
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"{_signed(found.low, unit)} {RANGE} {_signed(found.high, unit)}"
    return _signed(found.mean, unit), interval


def _signed(value: float, unit: Unit) -> str:
    if unit == "percent":
        return signed(value)
    text = written(value, unit)
    return f"+{text}" if value >= 0 else text


def gathered(warnings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Warnings, {"stage", "text"} each, every text once: variants of a stage warn of the same.

    >>> gathered([{"stage": "a[1]", "text": "x"}, {"stage": "a[2]", "text": "x"}])
    [{'stage': 'a[1] and 1 more', 'text': 'x'}]
    """
    stages: dict[str, list[str | None]] = {}
    for warning in warnings:
        stages.setdefault(warning["text"], []).append(warning["stage"])
    return [
        {"stage": names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"}
        | {"text": text}
        for text, names in stages.items()
    ]


def settings_json(sweep: Sweep, made: Outcome) -> list[dict[str, Any]]:
    """Every setting with its numbers and runs, as plain data."""
    return [
        {
            "setting": dict(sweep.settings[row.setting]),
            "best": row.best,
            "measures": {
                key: {
                    "mean": spread.mean,
                    "sd": spread.deviation,
                    "seeds": {str(seed): value for seed, value in spread.values.items()},
                }
                for key, spread in row.measures.items()
            },
            "difference": None if row.difference is None else vars(row.difference),
            "runs": [
                {
                    "seed": run.seed,
                    "stage": run.stage,
                    "status": run.status,
                    "why": run.why or None,
                    "fingerprint": run.fingerprint,
                    "artifact": None if run.artifact is None else str(run.artifact.path),
                }
                for run in sweep.of(row.setting)
            ],
        }
        for row in made.rows
    ]
