"""`run` and `plan` from end to end, on a recipe of seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.store import Store

MINI = ("mini.py", "--suite", "pairs.toml")
STAGES = {
    "sums": "domain",
    "copies": "domain",
    "base": "pretrain",
    "sft": "sft",
    "sums_teacher": "rl",
    "copies_teacher": "rl",
    "student": "distill",
    "evaluation": "evaluate",
}
CHECK_CACHED = """
import json, multiprocessing.forkserver, sys
from posttrain.cli import main
code = main(sys.argv[1:])
loaded = {name.split('.')[0] for name in sys.modules}
server = multiprocessing.forkserver._forkserver._forkserver_pid
print(json.dumps({"loaded": sorted(loaded), "server": server}))
sys.exit(code)
"""


def python(place: Path, *arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def first(cli: Callable[..., Any], done: Path) -> Any:
    """`run --json` where all is there."""
    return cli("run", *MINI, "--json").json


def test_a_run_tells_in_json_what_became_of_each_stage(cli: Callable[..., Any]) -> None:
    result = cli("run", *MINI, "--jobs", "2", "--json")
    found = result.json
    assert list(found) == ["recipe", "seed", "seconds", "stages", "warnings", "data", "evaluation"]
    assert found["warnings"] == []
    assert (found["recipe"], found["seed"]) == ("mini", 0)
    assert {stage["name"]: stage["kind"] for stage in found["stages"]} == STAGES
    for stage in found["stages"]:
        assert list(stage) == ["name", "kind", "status", "seconds", "artifact"]
        assert stage["status"] == "ran"
        assert 0 < stage["seconds"] <= found["seconds"]
        assert (Path(stage["artifact"]) / "record.json").is_file()
    evaluation = found["evaluation"]
    norm = {"norm", "norm_low", "norm_high", "min_recovery", "norm_domains", "gain"}
    assert {"domains", *norm, "greedy"} == set(evaluation)
    assert set(evaluation["domains"]) == {"sums", "copies"}
    for domain in evaluation["domains"].values():
        for table in (domain, domain["greedy"]):
            for model in ("init", "teacher", "student"):
                assert set(table[model]) == {"value", "low", "high"}
                assert 0 <= table[model]["low"] <= table[model]["value"] <= table[model]["high"]
            assert table["recovery"] is None or set(table["recovery"]) == {"value", "low", "high"}
        assert 0 <= domain["constant"]["value"] <= 1
    assert "Accuracy on held-out problems" in result.err
    assert Path("report.html").stat().st_size > 10_000


def test_every_model_has_a_card(done: Path) -> None:
    models = [
        artifact
        for artifact in Store(done / "posttrain-store").list()
        if artifact.kind in ("pretrain", "sft", "rl", "distill")
    ]
    assert len(models) == 5
    assert all("library_name" in model.file("README.md").read_text() for model in models)
    student = Store(done / "posttrain-store").resolve("student")
    card = student.file("README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "sums_teacher" in card and student.fingerprint in card


def test_the_second_run_runs_nothing(done: Path, finished: Path) -> None:
    before = (done / "report.html").stat().st_mtime_ns
    start = os.times()
    result = python(done, "-c", CHECK_CACHED, "run", *MINI, "--json")
    used = os.times()
    assert result.returncode == 0, result.stderr
    run, process = map(json.loads, result.stdout.splitlines())
    assert {stage["status"] for stage in run["stages"]} == {"cached"}
    assert run["seconds"] < 2
    seconds = used.children_user + used.children_system - start.children_user
    assert seconds - start.children_system < 2
    assert process["server"] is None
    heavy = {"torch", "transformers", "numpy", "matplotlib", "reasoning_gym"}
    assert heavy.isdisjoint(process["loaded"])
    assert (done / "report.html").stat().st_mtime_ns == before
    assert "all 8 stages cached" in result.stderr
    records = {artifact.name: artifact for artifact in Store(finished / "posttrain-store").list()}
    for stage in run["stages"]:
        recorded = records[stage["name"]].provenance["seconds"]
        assert stage["seconds"] == recorded > 0


def test_a_missing_report_is_written_again(first: Any, cli: Callable[..., Any]) -> None:
    Path("report.html").write_text("another page")
    again = cli("run", *MINI, "--json").json
    assert again["evaluation"] == first["evaluation"]
    assert "<html" in Path("report.html").read_text()
    Path("report.html").unlink()
    assert cli("run", *MINI, "--no-report").code == 0
    assert not Path("report.html").exists()


def test_people_see_a_table_and_no_json(done: Path, cli: Callable[..., Any]) -> None:
    result = cli("run", *MINI)
    assert result.code == 0
    assert result.err == ""
    words = ("8 stages, 8 cached", "sums", "teacher", "student", "greedy", "report.html")
    assert all(word in result.out for word in words)
    assert "{" not in result.out


def test_plan_of_an_empty_store(cli: Callable[..., Any], place: Path) -> None:
    found = cli("plan", *MINI, "--json").json
    assert list(found) == ["recipe", "seed", "stages", "warnings", "data"]
    assert {stage["name"]: stage["kind"] for stage in found["stages"]} == STAGES
    assert {(s["action"], s["reason"], s["artifact"]) for s in found["stages"]} == {
        ("run", "new", None)
    }
    assert not (place / "posttrain-store").exists()
    assert "8 to run" in cli("plan", *MINI).out


def reruns(cli: Callable[..., Any], *settings: str) -> dict[str, str]:
    """Stage -> reason, for the stages that a setting makes run again."""
    options = [text for setting in settings for text in ("--set", setting)]
    stages = cli("plan", *MINI, *options, "--json").json["stages"]
    assert {stage["action"] for stage in stages} <= {"cached", "run"}
    assert all(Path(s["artifact"]).is_dir() for s in stages if s["action"] == "cached")
    return {stage["name"]: stage["reason"] for stage in stages if stage["action"] == "run"}


def test_plan_tells_what_a_setting_changes(done: Path, cli: Callable[..., Any]) -> None:
    assert reruns(cli) == {}
    assert reruns(cli, "sums_teacher.steps=3") == {
        "sums_teacher": "steps: 2 -> 3",
        "student": "input teachers.sums_teacher reruns (sums_teacher)",
        "evaluation": "input student reruns (student); "
        "input teachers.sums_teacher reruns (sums_teacher)",
    }
    assert reruns(cli, "evaluation.samples=3") == {"evaluation": "samples: 2 -> 3"}
    found = reruns(cli, "steps=3", "*_teacher.lr=0.5")
    assert set(found) == set(STAGES) - {"sums", "copies"}
    assert found["base"] == "steps: 2 -> 3"
    assert "lr: 1e-05 -> 0.5" in found["sums_teacher"]
    table = cli("plan", *MINI, "--set", "sums_teacher.steps=3").out
    assert "5 cached, 3 to run" in " ".join(table.replace("3 to run, 5 cached", "").split())
    assert "steps: 2 -> 3" in table


def test_another_seed_is_another_run(done: Path, cli: Callable[..., Any]) -> None:
    found = cli("plan", *MINI, "--seed", "1", "--json").json
    assert found["seed"] == 1
    assert {s["name"] for s in found["stages"] if s["action"] == "cached"} == {"sums", "copies"}


VERIFIER = "def verify(response, problem):\n    raise RuntimeError('the judge is ill')\n"


def test_a_failing_stage(cli: Callable[..., Any], place: Path) -> None:
    (place / "judge.py").write_text(VERIFIER)
    suite = place / "pairs.toml"
    head, tail = suite.read_text().split("[domains.copies]")
    tail = tail.replace('"exact"', '"python:judge.py:verify"')
    suite.write_text(f"{head}[domains.copies]{tail}")
    result = cli("run", *MINI, "--json")
    assert result.code == 1
    statuses = {s["name"]: s["status"] for s in json.loads(result.out)["stages"]}
    assert statuses.pop("copies") == "failed"
    assert statuses.pop("sums") == "ran"
    assert set(statuses.values()) == {"blocked"}
    assert "evaluation" not in json.loads(result.out)
    assert "stage copies failed" in result.err
    assert "the judge is ill" in result.err
    assert "run the same command again" in result.err
    assert "Traceback" not in result.err
    assert not Path("report.html").exists()


def test_a_stage_that_finds_a_mistake_ends_with_its_exit_code(
    done: Path, cli: Callable[..., Any]
) -> None:
    result = cli("run", *MINI, "--set", "sums_teacher.max_new_tokens=400")
    assert result.code == 2
    assert "max_new_tokens = 400" in result.err


def test_ctrl_c(place: Path, cli: Callable[..., Any]) -> None:
    command = ["run", *MINI, "--no-report", "--jobs", "1", "--set", "base.steps=1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *command],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = place / "posttrain-store" / "work"
    deadline = time.monotonic() + 90
    while not list(work.glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("error: stopped.")
    assert "Not finished: base" in err
    assert "run the same command again" in err
    assert cli("verify", "--json").json["ok"]
    found = cli("plan", *MINI, "--set", "base.steps=1000000", "--json").json
    assert [s["name"] for s in found["stages"] if s["action"] == "cached"] == ["sums", "copies"]
