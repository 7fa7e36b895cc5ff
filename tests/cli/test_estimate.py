"""`plan --estimate`, and what a run took beside its estimate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.store import Store

MINI = ("mini.py", "--suite", "pairs.toml")
SAID = (
    "from posttrain.cli import main; import sys; code = main(sys.argv[1:]);"
    "print(); print('LOADED', *sys.modules); sys.exit(code)"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without rates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "cache"


def loaded(place: Path, *arguments: str) -> set[str]:
    """The modules that a command has imported, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", SAID, *arguments],
        capture_output=True, text=True, cwd=place, env=dict(os.environ), check=True,
    )  # fmt: skip
    return set(result.stdout.rpartition("LOADED ")[2].split())


def test_an_estimate_measures_the_machine_once(
    cli: Callable[..., Any], place: Path, cache: Path
) -> None:
    found = cli("plan", *MINI, "--estimate", "--jobs", "1", "--device", "cpu", "--json").json
    estimate = found["estimate"]
    stages = {stage["name"]: stage for stage in estimate["stages"]}
    assert set(stages) == {stage["name"] for stage in found["stages"]}
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert stages["base"]["found"] == ["calibrated"]
    # 2 steps of 4 documents such as "1+1=" and "2", in two domains: all tokens but the first.
    assert 2 * 4 * 5 < stages["base"]["learned"] < 2 * 4 * 10
    assert stages["student"]["memory"]["peak"] > stages["student"]["memory"]["readers"] > 0
    totals = estimate["totals"]
    assert totals["seconds"] == totals["seconds_of_stages"] > 0 and totals["unknown"] == []
    assert estimate["critical_path"][-1]["stage"] == "evaluation"
    assert estimate["does_not_fit"] == []
    (rates,) = (cache / "posttrain").glob("rates-*.json")
    before = rates.read_bytes()
    # The second time nothing is measured, so that torch is not needed.
    options = ("--estimate", "--jobs", "1", "--device", "cpu")
    modules = loaded(place, "plan", *MINI, *options)
    assert "posttrain.estimate.about" in modules
    assert not {"torch", "transformers", "numpy"} & modules
    assert rates.read_bytes() == before
    assert not list(place.glob("posttrain-store")), "a plan makes no store"


def test_a_plan_without_estimate_loads_nothing_of_it(place: Path, cache: Path) -> None:
    modules = loaded(place, "plan", *MINI)
    assert not {"torch", "transformers", "posttrain.estimate.about"} & modules


@pytest.mark.parametrize(
    "option", [("--jobs", "2"), ("--device", "cpu"), ("--memory", "1G")], ids=lambda o: o[0]
)
def test_what_only_an_estimate_reads_is_refused_alone(
    cli: Callable[..., Any], option: tuple[str, str]
) -> None:
    result = cli("plan", *MINI, *option)
    assert result.code == 2 and f"{option[0]} says on what the stages would run" in result.err
    assert "add --estimate" in result.err.replace("\n", " ")


def test_a_run_without_rates_notes_what_it_expects_and_shows_no_times(
    done: Path, cache: Path
) -> None:
    records = Store(done / "posttrain-store").list()
    estimates = {one.name: one.provenance["estimate"] for one in records}
    assert estimates["student"]["tokens"] > 0 and estimates["student"]["peak_memory"] > 0
    assert all(one.provenance["processor_seconds"] > 0 for one in records)
    page = (done / "report.html").read_text()
    assert "Estimate against actual" in page
    # It is no identity: what is planned now is all there.
    assert all("estimate" not in json.dumps(one.payload) for one in records)


def test_a_run_goes_by_earlier_ones(cli: Callable[..., Any], done: Path, cache: Path) -> None:
    options = ("--jobs", "1", "--report", "second.html", "--set", "sft.steps=3")
    told = cli("plan", *MINI, *options[-2:], "--estimate", "--jobs", "1", "--json").json
    (sft,) = (s for s in told["estimate"]["stages"] if s["name"] == "sft")
    assert sft["found"][0] == "from 1 earlier run"
    result = cli("run", *MINI, *options)
    assert result.code == 0, result.err
    assert "Estimate and what it took" in result.out
    made = Store(done / "posttrain-store").named("sft", "sft")[-1]
    assert made.provenance["estimate"]["found"][0] == "from 1 earlier run"
    assert made.provenance["estimate"]["tokens"] == pytest.approx(
        made.provenance["tokens"], rel=0.3
    )


def test_a_kind_of_ones_own_says_what_it_computes(
    cli: Callable[..., Any], place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).with_name("own_kind.py"), place)
    monkeypatch.delitem(sys.modules, "own_kind", raising=False)
    monkeypatch.syspath_prepend(str(place))
    options = ("--suite", "pairs.toml", "--estimate", "--device", "cpu", "--json")
    estimate = cli("plan", "own_kind.py", *options).json["estimate"]
    seconds = {stage["name"]: stage["seconds"] for stage in estimate["stages"]}
    # Fewer calls on the problems of one domain of two.
    assert seconds["first"] >= seconds["second"] > 0
    assert not any("cannot be counted" in text for s in estimate["stages"] for text in s["found"])


def test_what_does_not_fit_is_shown(cli: Callable[..., Any], cache: Path) -> None:
    result = cli("plan", *MINI, "--estimate", "--memory", "100M", "--device", "cpu")
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert "does not fit" in text and "--memory is 100M (105 MB)" in text
    # All models together have a few thousand parameters: nothing but more memory helps.
    assert "most of it for the process itself" in text and "bfloat16" not in text
    assert "the end waits for" in text and "up to" in text
