"""dpo on single responses, desirable or not: KTO (arXiv 2402.01306) without pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError

RunStage = Callable[..., Any]
BASE: dict[str, Any] = {"steps": 4, "batch_size": 24, "lr": 0.003, "warmup_steps": 1}
Rows = list[dict[str, Any]]


def pairs(count: int = 12) -> Rows:
    words = ["ab", "cde", "f", "gh", "edcb"]
    return [
        {"id": str(i), "domain": "mine", "prompt": f"{words[i % 5]}{i}"}
        | {"chosen": words[i % 5].upper(), "rejected": f"{words[(i + 1) % 5]}xy"}
        for i in range(count)
    ]


def single(pair: dict[str, Any], side: str) -> dict[str, Any]:
    row = {name: pair[name] for name in ("id", "domain", "prompt")}
    return row | {"response": pair[side], "desirable": side == "chosen"}


def singles(rows: Rows) -> Rows:
    """All desirable responses, then all others: a response then meets the same other prompts as in
    pairs, those of the pairs before and after it."""
    return [single(pair, side) for side in ("chosen", "rejected") for pair in rows]


@pytest.fixture
def learn(run_stage: RunStage, models: Mapping[str, str], tmp_path: Path) -> Callable[..., Any]:
    def run(rows: Rows, work: Path | None = None, **changes: Any) -> Any:
        folder = tmp_path / f"data-{len(list(tmp_path.glob('data-*')))}"
        folder.mkdir()
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = {"format": 1, "name": "mine", "kind": "preferences", "fingerprint": "2" * 64}
        (folder / "record.json").write_text(json.dumps(record))
        inputs = {"start": models["start"], "data": str(folder), "reference": models["two"]}
        return run_stage("dpo", BASE | {"loss": {"kind": "kto"}} | changes, inputs, work)

    return run


def test_pairs_given_as_single_rows_learn_the_same(learn: Callable[..., Any]) -> None:
    """KTO is a sum over responses, so what 12 pairs say in a step 24 single rows say as well, up to
    the order of the sums: loss, baseline, rewards and, after four steps, the weights."""
    loss = {"kind": "kto", "desirable_weight": 1.5}
    paired = learn(pairs(), batch_size=12, loss=loss)
    alone = learn(singles(pairs()), batch_size=24, loss=loss)
    names = ("loss", "kl_baseline", "margin", "reward_chosen", "reward_rejected", "grad_norm")
    names += ("logp_chosen", "logp_rejected", "tokens")
    for one, other in zip(paired.lines, alone.lines, strict=True):
        found = [{name: line[name] for name in names} for line in (one, other)]
        assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    assert max(abs(line["kl_baseline"]) for line in alone.lines) > 0.01
    ours, theirs = alone.weights(), paired.weights()
    assert all((ours[name] - theirs[name]).abs().max() < 2e-4 for name in theirs)


def test_the_loss_counts_every_row_by_its_label(learn: Callable[..., Any]) -> None:
    """The first step before any weight changed, by hand: with reward r = beta * score and z the
    baseline, desirable rows give 1 - sigmoid(r - beta z) and the others 1 - sigmoid(beta z - r);
    the loss is their mean over rows, 7 desirable ones among 10.

    Each row alone in a step says its own reward; z is the baseline of all.
    """
    rows = [
        single(pair, "rejected" if i % 3 == 2 else "chosen") for i, pair in enumerate(pairs(10))
    ]
    beta = 0.1
    line = learn(rows, steps=1, batch_size=10, loss={"kind": "kto", "beta": beta}).lines[0]
    z = line["kl_baseline"]
    rewards = {}
    for row in rows:
        # A second prompt, so that there is a baseline; the shares leave it out.
        other = row | {"id": "other", "prompt": "zz", "domain": "other"}
        shares = {"mine": 1, "other": 0}
        ran = learn([row, other], steps=1, batch_size=1, domain_shares=shares)
        kind = "chosen" if row["desirable"] else "rejected"
        rewards[row["id"]] = ran.lines[0][f"reward_{kind}"]
        assert "margin" not in ran.lines[0] and "margin" not in ran.metrics

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    signs = {row["id"]: 1 if row["desirable"] else -1 for row in rows}
    away = {name: signs[name] * (rewards[name] - beta * z) for name in rewards}
    assert line["loss"] == pytest.approx(sum(sigmoid(-x) for x in away.values()) / 10, rel=1e-4)
    assert line["accuracy"] == pytest.approx(sum(x > 0 for x in away.values()) / 10)
    assert 0 < line["accuracy"] < 1
    means = {sign: [rewards[name] for name in rewards if signs[name] == sign] for sign in (1, -1)}
    assert [len(values) for values in means.values()] == [7, 3]
    good, bad = (sum(values) / len(values) for values in means.values())
    assert line["reward_chosen"] == pytest.approx(good, rel=1e-4)
    assert line["reward_rejected"] == pytest.approx(bad, rel=1e-4)
    assert line["margin"] == pytest.approx(good - bad, rel=1e-4)


def test_it_learns_to_tell_them_apart(learn: Callable[..., Any]) -> None:
    ran = learn(singles(pairs())[:18], steps=30, batch_size=6)
    assert ran.lines[-1]["loss"] < ran.lines[0]["loss"]
    assert ran.metrics["accuracy"] > 0.8
    assert ran.metrics["margin"] > 0.5


def test_a_stopped_stage_ends_with_the_same_bits(
    learn: Callable[..., Any], goes_on: Callable[..., Any]
) -> None:
    calm, resumed = goes_on(
        lambda work: learn(singles(pairs()), batch_size=5, work=work), saved=2, killed=3
    )
    assert calm.metrics == resumed.metrics


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "simpo", "ipo"])
def test_other_losses_need_pairs(learn: Callable[..., Any], loss: str) -> None:
    with pytest.raises(ConfigError, match=f"loss = '{loss}' learns from pairs.*loss = 'kto'"):
        learn(singles(pairs()), loss={"kind": loss})
