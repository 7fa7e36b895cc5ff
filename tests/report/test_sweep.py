"""The table of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.commands.inspect import key_metric
from posttrain.engine.record import Artifact
from posttrain.report.seeds import Difference, Spread, difference, t_quantile
from posttrain.report.sweep import (
    Run,
    Sweep,
    difference_text,
    gathered,
    measures,
    outcome,
    settings_json,
    spread_text,
)


def artifact(metrics: dict[str, Any], kind: str = "evaluate", init: str = "i") -> Artifact:
    # The student is another one in every run, by whichever edge it comes.
    students = {edge: {"fingerprint": str(metrics)} for edge in ("students.a", "along.b")}
    inputs = {**students, "init": {"fingerprint": init}}
    record = {"name": "end", "kind": kind, "metrics": metrics, "inputs": inputs}
    return Artifact(path=Path("/store/artifacts/x"), record=record)


def sweep(
    *values: Mapping[int, Artifact | None], split: str | None = "validation", why: str = ""
) -> Sweep:
    """One axis `lr`; per value of it the target by seed."""
    settings = [{"student.lr": str(number)} for number in range(len(values))]
    runs = [
        Run(
            setting=number,
            seed=seed,
            stage=f"end[lr={number},seed={seed}]",
            fingerprint=f"{number}/{seed}",
            status="ran" if found else "blocked",
            why="" if found else why,
            artifact=found,
        )
        for number, by_seed in enumerate(values)
        for seed, found in by_seed.items()
    ]
    return Sweep(
        recipe="r",
        suite="core",
        split=split,
        axes={"student.lr": [setting["student.lr"] for setting in settings]},
        seeds=list(values[0]),
        settings=settings,
        runs=runs,
    )


def scored(add: float, rev: float, init: str = "i", **others: float) -> Artifact:
    return artifact({"student/add": add, "student/rev": rev, **others}, init=init)


def test_quantiles_of_students_distribution() -> None:
    """Against the table in any book, at 1, 2, 9, 10, 11, 20, 30 and 120 degrees of freedom."""
    book = {1: 12.706, 2: 4.303, 9: 2.262, 10: 2.228, 11: 2.201, 20: 2.086, 30: 2.042, 120: 1.980}
    assert {freedom: round(t_quantile(freedom), 3) for freedom in book} == book


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, s = 1, so that the half width is 4.3027 / sqrt(3)."""
    first = Spread(values={0: 10.0, 1: 20.0, 2: 30.0, 7: 99.0})
    found = difference(first, Spread(values={0: 11.0, 1: 22.0, 2: 33.0}))
    assert found is not None and found.low is not None and found.high is not None
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.3027 / math.sqrt(3))
    assert 2 - found.low == pytest.approx(found.high - 2)
    alone = difference(first, Spread(values={1: 21.0}))
    assert alone == Difference(mean=1.0, low=None, high=None, seeds=1)
    assert difference(first, Spread(values={5: 1.0})) is None


def test_rows_have_mean_and_deviation_and_the_best_is_marked() -> None:
    made = outcome(
        sweep(
            {0: scored(0.2, 0.4), 1: scored(0.4, 0.6)},
            {0: scored(0.5, 0.7), 1: scored(0.6, 1.0)},
        )
    )
    assert made.metric == "accuracy"
    assert list(made.units) == ["accuracy", "add", "rev"]
    first, second = made.rows
    # Means over domains .3 and .5; .6 and .8: the differences are .3 and .3.
    assert first.measures["accuracy"].mean == pytest.approx(0.4)
    assert first.measures["accuracy"].deviation == pytest.approx(0.2 / math.sqrt(2))
    assert second.difference is not None
    assert second.difference.mean == pytest.approx(0.3)
    assert second.difference.high == pytest.approx(0.3)
    assert (first.best, second.best) == (False, True)
    assert spread_text(first.measures["accuracy"], "percent") == "40.0 ± 14.1"
    assert difference_text(second.difference, "percent")[0] == "+30.0"
    assert made.title("add") == "add, %"
    assert any("validation problems; the held-out problems were not" in n for n in made.notes)
    assert made.cautions == []


def test_norm_comes_first_only_where_every_run_has_it() -> None:
    both = outcome(sweep({0: scored(0.1, 0.1, norm=0.5)}, {0: scored(0.9, 0.9, norm=0.4)}))
    assert both.metric == "Norm"
    assert [row.best for row in both.rows] == [True, False]
    assert spread_text(both.rows[0].measures["Norm"], both.units["Norm"]) == "0.50"
    some = outcome(sweep({0: scored(0.1, 0.1, norm=0.5)}, {0: scored(0.9, 0.9)}))
    assert some.metric == "accuracy"
    assert [row.best for row in some.rows] == [False, True]
    assert any("Only 1 of 2 runs have a Norm" in caution for caution in some.cautions)


def test_it_is_told_when_norm_is_measured_against_other_models() -> None:
    def norms(*inits: str) -> list[str]:
        runs = [{0: scored(0.1, 0.2, norm=0.5 + n, init=i)} for n, i in enumerate(inits)]
        return [c for c in outcome(sweep(*runs)).cautions if "init or the teachers" in c]

    assert norms("a", "a") == []
    assert len(norms("a", "b")) == 1


def test_one_seed_has_no_interval_and_says_so() -> None:
    made = outcome(sweep({3: scored(0.1, 0.3)}, {3: scored(0.2, 0.4)}))
    assert difference_text(made.rows[1].difference, "percent") == ("+10.0", "")
    assert spread_text(made.rows[1].measures["add"], "percent") == "20.0"
    assert any("One seed (3): no spread and no interval" in c for c in made.cautions)


def test_held_out_problems_are_told() -> None:
    made = outcome(sweep({0: scored(0.1, 0.3)}, {0: scored(0.2, 0.4)}, split="heldout"))
    assert any("held-out problems" in c and "flatters" in c for c in made.cautions)


def test_a_setting_with_a_missing_seed_is_told_and_is_not_the_best() -> None:
    made = outcome(
        sweep(
            {0: scored(0.1, 0.1), 1: scored(0.1, 0.2)},
            {0: scored(0.9, 0.9), 1: None},
            {0: scored(0.2, 0.2), 1: scored(0.2, 0.2)},
            {0: None, 1: None},
            why="student failed: it diverged",
        )
    )
    assert [row.best for row in made.rows] == [False, False, True, False]
    assert made.rows[1].measures["accuracy"].values == {0: pytest.approx(0.9)}
    assert made.rows[3].measures == {} and made.rows[3].difference is None
    told = [c for c in made.cautions if "it diverged" in c]
    assert told == [
        f"student.lr={number}, seed {seed}: blocked; student failed: it diverged"
        for number, seed in ((1, 1), (3, 0), (3, 1))
    ]


def test_equal_means_have_no_best() -> None:
    made = outcome(sweep({0: scored(0.1, 0.1)}, {0: scored(0.1, 0.1)}))
    assert made.best is None
    assert any("share the best mean accuracy" in c for c in made.cautions)


def test_settings_that_are_the_same_stages_are_told() -> None:
    found = sweep({0: scored(0.1, 0.1)}, {0: scored(0.1, 0.1)}, {0: scored(0.2, 0.1)})
    runs = [Run(**vars(run) | {"fingerprint": "x"}) for run in found.runs[:2]]
    same = Sweep(**vars(found) | {"runs": [*runs, found.runs[2]]})
    assert any(
        "student.lr=0 and student.lr=1 are one and the same" in c for c in outcome(same).cautions
    )


@pytest.mark.parametrize(
    ("kind", "metrics", "best"),
    [
        ("sft", ({"loss": 2.0}, {"loss": 1.0}), 1),
        ("rl", ({"reward": 0.2}, {"reward": 0.1}), 0),
        ("merge", ({"models": 2}, {"models": 3}), None),
    ],
)
def test_other_targets_have_their_summary_metric(
    kind: str, metrics: tuple[dict[str, float], ...], best: int | None
) -> None:
    made = outcome(sweep(*({0: artifact(m, kind)} for m in metrics), split=None))
    assert made.metric == next(iter(metrics[0]))
    assert [n for n, row in enumerate(made.rows) if row.best] == ([] if best is None else [best])
    assert any("no evaluation" in note for note in made.notes)


def test_several_students_have_columns_of_their_own() -> None:
    found = measures(artifact({"a/add": 0.2, "a/rev": 0.4, "b/add": 0.6, "norm/a": 0.5}))
    assert {key: one.value for key, one in found.items()} == {
        "accuracy of all students": pytest.approx(0.45),
        "a: Norm": 0.5,
        "a: accuracy": pytest.approx(0.3),
        "a: add": 0.2,
        "a: rev": 0.4,
        "b: accuracy": 0.6,
        "b: add": 0.6,
    }


def test_json_has_every_value() -> None:
    found = sweep({0: scored(0.2, 0.4), 1: None}, {0: scored(0.5, 0.7), 1: scored(0.6, 1.0)})
    first, second = settings_json(found, outcome(found))
    assert first["setting"] == {"student.lr": "0"}
    assert first["measures"]["add"] == {"mean": 0.2, "sd": None, "seeds": {"0": 0.2}}
    assert [run["status"] for run in first["runs"]] == ["ran", "blocked"]
    assert second["difference"]["mean"] == pytest.approx(0.3)
    assert second["measures"]["rev"]["seeds"] == {"0": 0.7, "1": 1.0}


def test_a_warning_of_many_variants_is_told_once() -> None:
    found = [{"stage": f"end[{n}]", "text": "cut"} for n in range(3)]
    assert gathered([*found, {"stage": None, "text": "unused"}]) == [
        {"stage": "end[0] and 2 more", "text": "cut"},
        {"stage": None, "text": "unused"},
    ]


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"student/add": 0.5, "student/sort": 0.25}, "accuracy 37.5 %"),
        ({"kl_init/a/chat": 1.3, "a/add": 0.5}, "accuracy 50.0 %"),
        ({"student/add": 0.5, "norm": 0.75}, "Norm 0.75"),
        ({}, ""),
    ],
)
def test_the_key_number_of_an_evaluation(metrics: dict[str, float], text: str):
    assert key_metric(artifact(metrics)) == text


def test_what_is_no_accuracy_is_called_in_words():
    metrics = {"student/add": 0.5, "kl_init/student/chat": 0.1, "win/a/chat": 0.5, "a/add": 0.2}
    made = outcome(sweep({0: artifact(metrics)}))
    assert made.title("kl_init/student/chat") == "KL to init, chat"
    assert made.title("win/a/chat") == "a: wins against init, chat, %"
