"""Part marks meet the decimal bounds that people write: .9 is .9, however often it is averaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.algorithms import Band, BestAgainstWorst, InTurn, TopShare
from posttrain.engine.jsonl import read_jsonl
from posttrain.rewards.comparisons import compared
from posttrain.rewards.judging import Responses, RewardFunction
from posttrain.rewards.spec import VerifierSpec
from posttrain.schedules import plateaus
from posttrain.stages.curation import choose
from posttrain.stages.pairs import fits
from posttrain.stages.problems import in_band
from posttrain.stages.select import top_share
from posttrain.stages.settings.base import Lengths
from posttrain.stages.settings.data import Filter, Pairs
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, domain_node

COUNT = 12
PROBLEMS = 60


@pytest.fixture(scope="module")
def part_marks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A domain in which every finished response scores .9."""
    path = tmp_path_factory.mktemp("marks") / "marks"
    path.mkdir()
    rows = [{"prompt": f"marks {n}", "answer": str(n)} for n in range(PROBLEMS)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "grade.py").write_text("def grade(response, problem):\n    return 0.9\n")
    verifier = VerifierSpec(name="python:grade.py:grade")
    node = domain_node(
        Domain(name="marks", source=Table(train="rows.jsonl"), verifier=verifier), path
    )
    build_domain(node.config, node.runtime, path, node.data)
    record = {"format": 1, "name": "marks", "kind": "domain", "fingerprint": "1" * 64}
    (path / "record.json").write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def inputs(models: Mapping[str, str], part_marks: str) -> dict[str, str]:
    return {"start": models["start"], "domains.marks": part_marks}


def whole_groups(rows: list[dict[str, Any]], size: int) -> set[str]:
    """The problems whose responses all ended."""
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return {group[0]["id"] for group in groups if all(row["finished"] for row in group)}


def test_a_mean_of_part_marks_retires_its_problem(
    run_stage: Callable[..., Any], inputs: Mapping[str, str]
) -> None:
    settings = {"steps": 1, "prompts_per_step": COUNT, "group_size": 3, "max_new_tokens": 4}
    ran = run_stage("rl", settings | {"draw": InTurn(retire_above=0.9)}, inputs)
    rows = list(read_jsonl(ran.out / "rollouts.jsonl"))
    assert {row["reward"] for row in rows if row["finished"]} == {0.9}
    whole = whole_groups(rows, 3)
    assert 0 < len(whole) < COUNT
    problems = len(list(read_jsonl(Path(inputs["domains.marks"]) / "train.jsonl")))
    assert ran.lines[0]["retired_share"] == pytest.approx(len(whole) / problems, abs=1e-6)


def test_pass_rates_are_those_of_the_marks(
    run_stage: Callable[..., Any], models: Mapping[str, str], part_marks: str
) -> None:
    settings = {"n": 3, "num_prompts": COUNT, "max_new_tokens": 4}
    ran = run_stage("profile", settings, {"model": models["start"], "domains.marks": part_marks})
    rows = list(read_jsonl(ran.out / "profile.jsonl"))
    # Of three responses none to all ended: 0, .3, .6 or .9, next to which no other float is.
    assert {0.9} < {row["rate"] for row in rows} <= {0.0, 0.3, 0.6, 0.9}
    rates = {("marks", row["id"], None): row["rate"] for row in rows}
    kept = choose(Filter(low=0.9), rows, rates, {})
    assert [row["rate"] for row in kept] == [0.9] * len(kept) != []


def test_a_gain_of_just_what_is_asked_is_enough() -> None:
    """.9 - .8 is .09999999999999998 in floats."""
    rates, others = {("d", "1", None): 0.9}, {("d", "1", None): 0.8}
    problem = {"domain": "d", "id": "1"}
    assert choose(Filter(min_gain=0.1), [problem], rates, others) == [problem]
    assert choose(Filter(min_gain=0.11), [problem], rates, others) == []


def test_a_margin_of_just_what_is_asked_is_enough() -> None:
    row = {"domain": "d", "id": "1", "prompt": "p", "num_tokens": 1, "finished": True}
    good = row | {"response": "a", "reward": 0.9}
    bad = row | {"response": "b", "reward": 0.8}
    assert fits(Pairs(how=BestAgainstWorst(min_margin=0.1)), good, bad)
    assert not fits(Pairs(how=BestAgainstWorst(min_margin=0.11)), good, bad)
    # Comparisons need more than the margin.
    found = {("d", "1", None): [good, bad]}
    assert len(compared(found, min_margin=0.0999)) == 1
    assert compared(found, min_margin=0.1) == []


def test_a_gate_is_passed_by_a_sum_that_reaches_it() -> None:
    """.7 + .2 is .8999999999999999 in floats."""
    gate = judges.gate(
        0.7 * judges.constant(1) + 0.2 * judges.constant(1),
        below=0.9,
        then=judges.constant(-1),
        otherwise=judges.constant(1),
    )
    responses = Responses(problems=[{}], texts=[""], group=[0], finished=[True], num_tokens=[1])
    scores, _ = RewardFunction(gate, {}).score(responses)
    assert scores == [1.0]


def test_a_rise_by_just_the_gain_is_no_plateau() -> None:
    """.11 - .1 is .009999999999999995 in floats."""
    assert plateaus([0.1, 0.11], patience=1, gain=0.01) == []
    assert plateaus([0.1, 0.1099], patience=1, gain=0.01) == [2]


def test_a_band_holds_its_ends() -> None:
    import numpy as np

    band = Band(low=0.3, high=0.9)
    rate_P = np.array([0.3, 0.9, 0.2999, 0.9001])
    assert in_band(rate_P, band.low, band.high).tolist() == [True, True, False, False]


def test_the_best_share_is_rounded_up_from_its_decimal() -> None:
    """.07 * 100 is 7.000000000000001 in floats, which rounds up to 8."""
    rows = [{"domain": "d", "id": str(n), "reward": n / 100} for n in range(100)]
    kept = top_share(TopShare(share=0.07), [[row] for row in rows])
    assert len(kept) == 7
    assert len(top_share(TopShare(share=0.071), [[row] for row in rows])) == 8


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    # 1.1 * 100 is 110.00000000000001 in floats.
    [(1.1, 100, 10, 11), (2.2, 50, 10, 11), (0.07, 100, 1, 7), (1, 10, 3, 4), (2.5, 8, 10, 2)],
)
def test_epochs_are_rounded_up_from_their_decimal(
    epochs: float, rows: int, batch: int, steps: int
) -> None:
    assert Lengths(epochs=epochs).num_steps(rows, batch) == steps
