"""best: which of several models wins, what the artifact then holds, and what the record says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.checkpoint import load

BASE: dict[str, Any] = {"num_problems": 10, "max_new_tokens": 6, "bootstrap": 100}


@pytest.fixture
def best(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(candidates: Mapping[str, str], **changes: Any) -> Any:
        edges = {f"candidates.{name}": models[model] for name, model in candidates.items()}
        return run_stage("best", BASE | changes, edges | dict(domains))

    return run


def report(ran: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran.out / "best.json").read_text())
    return found


THREE = {"a": "start", "b": "one", "c": "two"}


def test_the_winner_has_the_best_score_and_its_weights(
    best: Callable[..., Any], models: Mapping[str, str]
) -> None:
    ran = best(THREE)
    scores = {name: row["value"] for name, row in report(ran)["candidates"].items()}
    assert len(set(scores.values())) == 3
    winner = max(scores, key=lambda name: scores[name])
    assert report(ran)["winner"] == ran.metrics["winner"] == winner
    assert ran.metrics["score"] == scores[winner]
    assert {f"score/{name}": value for name, value in scores.items()}.items() <= ran.metrics.items()
    for name, row in report(ran)["candidates"].items():
        assert row["low"] <= row["value"] <= row["high"]
        assert row["low"] < row["high"]
        assert row["value"] == pytest.approx(sum(row["rewards"].values()) / 2)
        assert ran.metrics[f"low/{name}"] == row["low"]
        assert ran.metrics[f"high/{name}"] == row["high"]
    ours, theirs = load(ran.out), load(models[THREE[winner]])
    for mine, its in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, its)
    # Hard links: the weights are on the disk once.
    assert (ran.out / "model.safetensors").samefile(
        Path(models[THREE[winner]]) / "model.safetensors"
    )
    assert "the best of several models" in (ran.out / "README.md").read_text()
    assert [line["step"] for line in ran.lines] == [1, 2, 3]


def test_of_equals_the_first_wins(best: Callable[..., Any]) -> None:
    """Two names of one model: the same draws, so the same scores."""
    assert best({"y": "one", "x": "one"}).metrics["winner"] == "y"
    ran = best({"x": "one", "y": "one"})
    assert ran.metrics["winner"] == "x"
    assert ran.metrics["score/x"] == ran.metrics["score/y"]


def test_every_setting_changes_the_scores(best: Callable[..., Any]) -> None:
    changes = [{}, {"seed": 1}, {"samples": 0}, {"num_problems": 8}, {"samples": 3}]
    changes += [{"max_new_tokens": 4}, {"length_weight": 0.2}, {"bootstrap": 150}]
    found = {json.dumps(report(best({"a": "one", "b": "two"}, **c))) for c in changes}
    assert len(found) == len(changes)


def test_length_costs_what_it_says(best: Callable[..., Any]) -> None:
    """Both domains have as many problems, so the mean length over rows is that over domains."""
    plain, dear = (report(best(THREE, length_weight=w))["candidates"] for w in (0.0, 0.5))
    for name, row in plain.items():
        cost = 0.5 * row["response_length"] / 6
        assert dear[name]["value"] == pytest.approx(row["value"] - cost)
        assert dear[name]["rewards"] == row["rewards"]
