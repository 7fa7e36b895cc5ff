"""`sweep`, from two values by two seeds to the table; and `compare` of what it made."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.commands.variants import build_variants, read_axis
from posttrain.engine.store import Store

MINI = ("mini.py", "--suite", "pairs.toml")
AXIS = ("--axis", "student.lr=1e-4,0.02")
TWO = (*MINI, *AXIS, "--seeds", "0,1")


@pytest.fixture
def swept(swept_once: Path, place: Path) -> Path:
    """`place` with a copy of the store of the sweep."""
    shutil.copytree(swept_once / "posttrain-store", place / "posttrain-store")
    return place


def test_every_combination_is_made_and_what_is_shared_once(swept_once: Path) -> None:
    found = json.loads((swept_once / "out.json").read_text())
    stages = {stage["name"]: stage["status"] for stage in found["stages"]}
    assert set(stages.values()) == {"ran"}
    shared = {"sums", "copies"}
    by_seed = {
        f"{name}[seed={seed}]"
        for name in ("base", "sft", "sums_teacher", "copies_teacher")
        for seed in (0, 1)
    }
    own = {
        f"{name}[lr={lr},seed={seed}]"
        for name in ("student", "evaluation")
        for lr in ("1e-4", "0.02")
        for seed in (0, 1)
    }
    assert set(stages) == shared | by_seed | own
    assert (len(stages), found["wanted"]) == (18, 32)
    # In the store everything has the name that the recipe gave it.
    names = Counter(artifact.name for artifact in Store(swept_once / "posttrain-store").list())
    assert names == {
        **dict.fromkeys(shared, 1),
        **dict.fromkeys(("base", "sft", "sums_teacher", "copies_teacher"), 2),
        **dict.fromkeys(("student", "evaluation"), 4),
    }


def test_json_has_every_number_of_the_sweep(swept_once: Path) -> None:
    found = json.loads((swept_once / "out.json").read_text())
    assert found["split"] == "validation"
    assert found["axes"] == {"student.lr": ["1e-4", "0.02"]}
    assert found["seeds"] == [0, 1]
    assert [one["setting"] for one in found["settings"]] == [
        {"student.lr": "1e-4"},
        {"student.lr": "0.02"},
    ]
    for one in found["settings"]:
        for run in one["runs"]:
            metrics = Store(swept_once / "posttrain-store").find(run["fingerprint"]).metrics  # type: ignore[union-attr]
            for domain in ("sums", "copies"):
                value = one["measures"][domain]["seeds"][str(run["seed"])]
                assert value == metrics[f"student/{domain}"]
        accuracy = one["measures"]["accuracy"]
        assert accuracy["mean"] == pytest.approx(sum(accuracy["seeds"].values()) / 2)
    first, second = (one["measures"][found["metric"]]["seeds"] for one in found["settings"])
    difference = found["settings"][1]["difference"]
    assert difference["seeds"] == 2
    assert difference["mean"] == pytest.approx(sum(second[s] - first[s] for s in "01") / 2)
    assert difference["low"] <= difference["mean"] <= difference["high"]


def test_a_run_by_itself_finds_what_the_sweep_made(
    swept_once: Path, swept: Path, cli: Callable[..., Any]
) -> None:
    found = json.loads((swept_once / "out.json").read_text())
    settings = ("--set", "student.lr=0.02", "--set", "evaluation.split=validation")
    plan = cli("plan", *MINI, *settings, "--seed", "1", "--json").json["stages"]
    assert {stage["action"] for stage in plan} == {"cached"}
    run = found["settings"][1]["runs"][1]
    assert (run["seed"], run["status"]) == (1, "ran")
    assert plan[-1]["fingerprint"] == run["fingerprint"]
    assert Path(run["artifact"]).name == Path(plan[-1]["artifact"]).name
    # Other seeds, and the held-out problems, are other stages.
    others = cli("plan", *MINI, "--set", "student.lr=0.02", "--seed", "1", "--json").json
    assert [s["name"] for s in others["stages"] if s["action"] == "run"] == ["evaluation"]


def test_the_page_says_what_was_made(swept_once: Path) -> None:
    page = (swept_once / "sweep.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "&lt;svg" not in page and page.count("<polyline") >= 5
    words = ("student.lr=1e-4", "validation problems", "instead of 32", "over 2 seeds")
    assert all(word in page for word in words)
    command = (
        "posttrain run mini.py --set student.lr=0.02 --set evaluation.split=validation "
        "--suite pairs.toml --seed 1"
    )
    assert command in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_second_time_all_is_cached_and_people_see_a_table(
    swept_once: Path, swept: Path, cli: Callable[..., Any]
) -> None:
    result = cli("sweep", *TWO)
    assert result.code == 0 and result.err == ""
    words = ("4 runs in one plan, 18 stages instead of 32", "Δ to the first", "student.lr=0.02")
    assert all(word in result.out for word in words), result.out
    assert "all 18 stages cached" in result.out
    best = json.loads((swept_once / "out.json").read_text())["best"]
    command = "posttrain run mini.py --set student.lr={} --set evaluation.split=heldout"
    told = best is not None and command.format(best["student.lr"])
    assert ("the best on held-out problems: " in result.out) == bool(told)
    assert not told or told in result.out
    assert (swept / "sweep.html").is_file()
    found = cli("sweep", *TWO, "--no-report", "--json", "--report", "other.html").json
    assert {stage["status"] for stage in found["stages"]} == {"cached"}
    assert not (swept / "other.html").exists()


def test_stages_have_the_names_of_its_recipe(swept: Path, cli: Callable[..., Any]) -> None:
    text = (swept / "mini.py").read_text()
    (swept / "renamed.py").write_text(text.replace("lr=lr)", 'lr=lr, name="general")'))
    found = cli("sweep", "renamed.py", *TWO[1:], "--no-report", "--json").json
    assert {stage["status"] for stage in found["stages"]} == {"cached"}
    listed = {one["name"] for one in cli("ls", "--json").json["artifacts"]}
    assert "general" in listed and not any("sft" in name or "[" in name for name in listed)


def test_the_plan_makes_nothing(place: Path, cli: Callable[..., Any]) -> None:
    found = cli("sweep", *TWO, "--axis", "steps=2,3", "--plan", "--json").json
    assert len(found["variants"]) == 8
    assert found["wanted"] == 64 and len(found["stages"]) == 34
    assert found["variants"][-1]["setting"] == {"student.lr": "0.02", "steps": "3"}
    assert "student[lr=0.02,steps=3,seed=1]" in found["variants"][-1]["stages"]
    assert not (place / "posttrain-store").exists()
    table = cli("sweep", *TWO, "--plan").out
    assert "18 stages instead of 32" in table and "base[seed=1]" in table


def test_a_failed_variant_is_told_and_the_others_are_there(
    swept: Path, cli: Callable[..., Any]
) -> None:
    result = cli("sweep", *MINI, "--axis", "student.lr=1e-4,1e300", "--json")
    assert result.code == 1
    good, bad = json.loads(result.out)["settings"]
    assert good["measures"] and good["runs"][0]["status"] == "cached"
    assert bad["measures"] == {} and bad["runs"][0]["status"] == "blocked"
    assert "student[lr=1e300] failed: training diverged" in bad["runs"][0]["why"]
    assert "run the same command again" in result.err
    assert "training diverged" in (swept / "sweep.html").read_text()


def test_held_out_problems_when_asked_for(place: Path, cli: Callable[..., Any]) -> None:
    def split(*options: str) -> str:
        found: str = cli("sweep", *MINI, *AXIS, "--plan", "--json", *options).json["split"]
        return found

    assert split() == "validation"
    assert split("--split", "heldout") == "heldout"
    assert split("--set", "evaluation.split=heldout") == "heldout"


def test_a_target_that_is_no_evaluation(swept: Path, cli: Callable[..., Any]) -> None:
    (swept / "short.py").write_text(
        "def recipe(r, steps: int = 1):\n"
        "    return r.pretrain(data=r.demos(r.domains), steps=steps, batch_size=4,\n"
        "        lr=0.02, hidden_size=16, num_layers=1, num_heads=1, head_dim=16,\n"
        "        intermediate_size=16, max_positions=32)\n"
    )
    found = cli("sweep", "short.py", "--suite", "pairs.toml", "--axis", "steps=1,60", "--json").json
    assert (found["split"], found["metric"]) == (None, "loss")
    assert found["best"] == {"steps": "60"}
    assert any("no evaluation" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["something that varies", "--axis KEY=VALUE,VALUE", "--seeds"]),
        (("--axis", "student.lr"), ["--axis student.lr", "STAGE.FIELD=VALUE,VALUE"]),
        (("--axis", "student.lr="), ["--axis student.lr=", "no value"]),
        (("--axis", "student.lr=1,,2"), ["is empty"]),
        (("--axis", "student.lr=1e-4,0.0001"), ["0.0001", "twice"]),
        (("--axis", "studnt.lr=1,2"), ["--axis studnt.lr", "did you mean 'student'"]),
        (("--axis", "student.lrr=1,2"), ["'lrr'", "'lr'", "with --axis student.lrr=1"]),
        (("--axis", "*_teacher.stepz=1,2"), ["--axis *_teacher.stepz", "'steps'"]),
        (("--axis", "stps=1,2"), ["--axis stps=1", "did you mean 'steps'"]),
        (("--axis", "steps=1,two"), ["--axis steps=two", "int"]),
        (("--axis", "steps=1,2", "--axis", "steps=3"), ["--axis steps is given twice"]),
        (("--axis", "steps=1,2", "--set", "steps=3"), ["--set steps=3", "axis of the sweep"]),
        (("--axis", "cards=true,false"), ["cards=true,false changes nothing", "evaluation"]),
        (("--axis", "seed=0,1"), ["--seeds 0,1"]),
        (("--axis", "suite=core,pairs.toml"), ["the suite is no axis", "--suite"]),
        (("--seeds", "0,x"), ["--seeds 0,x", "'x'", "0,1,2"]),
        (("--seeds", "9" * 5000), ["whole number from 0 up"]),
        (("--axis", "student.lr=" + "[" * 100_000), ["student.lr"]),
        (("--seeds", "0,1.5"), ["'1.5'", "whole number"]),
        (("--seeds", "1,1"), ["the seed 1 is there twice"]),
        (("--seeds", "0,1", "--set", "seed=3"), ["--set seed=3", "--seeds"]),
        ((*AXIS, "--split", "test"), ["--split", "validation", "heldout"]),
        (
            (*AXIS, "--split", "heldout", "--set", "evaluation.split=validation"),
            ["--split heldout", "evaluation.split=validation", "contradict"],
        ),
        ((*AXIS, "--report", "no/such/page.html"), ["--report no/such/page.html"]),
    ],
)
def test_mistakes(
    place: Path, cli: Callable[..., Any], options: tuple[str, ...], words: list[str]
) -> None:
    result = cli("sweep", *MINI, *options)
    assert result.code == 2
    assert result.out == "" and result.err.startswith("error: ")
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    assert not (place / "posttrain-store").exists()


def test_values_with_commas_and_long_ones(place: Path, cli: Callable[..., Any]) -> None:
    long = '{"beta1": 0.9, "beta2": 0.95}'
    found = cli(
        *("sweep", *MINI, "--plan", "--json"),
        *("--axis", f"student.optimizer={long},{long.replace('0.95', '0.99')}"),
    ).json
    assert len(found["variants"]) == 2
    assert found["variants"][1]["setting"]["student.optimizer"] == long.replace("0.95", "0.99")
    names = [name for name in found["variants"][1]["stages"] if name.startswith("student")]
    assert names == ['student[optimizer={"beta1": 0.9, "…2]']


# -- compare ---------------------------------------------------------------------------------------


def labels(place: Path, name: str) -> list[str]:
    return [a.label for a in Store(place / "posttrain-store").list() if a.name == name]


def test_evaluations_side_by_side(swept: Path, swept_once: Path, cli: Callable[..., Any]) -> None:
    settings = json.loads((swept_once / "out.json").read_text())["settings"]
    a, b = (Path(one["runs"][0]["artifact"]).name for one in settings)
    found = cli("compare", a, b, "--json").json
    assert [one["label"] for one in found["artifacts"]] == [a, b]
    assert found["differences"] == [
        {
            "stage": Path(store_label(swept, a)).name,
            "path": "student",
            "field": "config.lr",
            "values": [0.0001, 0.02],
        }
    ]
    (side,) = found["scores"]
    assert side["split"] == "validation" and side["paired"] is False
    first, second = side["columns"]
    for domain in ("sums", "copies"):
        ours, theirs = first["domains"][domain], second["domains"][domain]
        delta = second["differences"][domain]
        assert delta["value"] == pytest.approx(theirs["value"] - ours["value"])
        # Newcombe's interval of the difference of two independent means.
        up = ((theirs["high"] - theirs["value"]) ** 2 + (ours["value"] - ours["low"]) ** 2) ** 0.5
        assert delta["high"] - delta["value"] == pytest.approx(up)
    table = cli("compare", a, b).out
    assert "the first stage in which they differ: student-" in table
    assert all(word in table for word in ("unpaired", "validation problems", "0.02"))


def store_label(place: Path, evaluation: str) -> str:
    """Label of the student that an evaluation scored."""
    student = Store(place / "posttrain-store").resolve(evaluation).inputs["student"]
    return f"{student['name']}-{student['fingerprint'][:12]}"


def test_models_by_their_evaluations_and_from_the_beginning(
    swept: Path, cli: Callable[..., Any]
) -> None:
    students = labels(swept, "student")
    found = cli("compare", *students, "--json").json
    # By seed from base on, then by learning rate.
    stages = [row["stage"].partition("-")[0] for row in found["differences"]]
    assert stages[0] == "base" and stages[-1] == "student"
    assert all(len(row["values"]) == 4 for row in found["differences"])
    rates = next(row for row in found["differences"] if row["field"] == "config.lr")
    assert Counter(rates["values"]) == {0.0001: 2, 0.02: 2}
    assert sum(len(side["columns"]) for side in found["scores"]) == 4
    teachers = cli("compare", "sums", *labels(swept, "sums_teacher")[:1])
    assert "themselves" in teachers.out


def test_compare_wants_two_different_artifacts(swept: Path, cli: Callable[..., Any]) -> None:
    student = labels(swept, "student")[0]
    for arguments, words in (
        ((student,), ["two artifacts or more"]),
        ((student, student), [student, "twice"]),
        ((student, "studnt"), ["studnt", "'student'"]),
    ):
        result = cli("compare", *arguments)
        assert result.code == 2 and all(word in result.err for word in words)


def test_domains_without_the_split_that_is_asked_are_left_out(place: Path) -> None:
    suite = place / "pairs.toml"
    suite.write_text(suite.read_text() + "validation = 0\n")

    def asked(split: str | None, *settings: str) -> set[str]:
        loaded = build_variants(
            "mini.py",
            store=Store(place / "posttrain-store"),
            axes=[read_axis(AXIS[1])],
            seeds=[0],
            settings=settings,
            suite="pairs.toml",
            split=split,
        ).loaded
        inputs = loaded.graph.nodes[loaded.graph.target].inputs
        return {name for name in ("sums", "copies") if f"domains.{name}" in inputs}

    assert asked(None) == {"sums"}
    assert asked("heldout") == {"sums", "copies"}
    assert asked(None, "evaluation.split=heldout") == {"sums", "copies"}
