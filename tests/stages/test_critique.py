"""A policy that learns to judge from its own verified rollouts, beside its rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import Recipe, judges, schedules
from posttrain.algorithms import Critique
from posttrain.backends.checkpoint import load
from posttrain.backends.local import chat_of
from posttrain.engine.errors import ConfigError
from posttrain.rewards.comparisons import build_comparisons
from posttrain.stages.config import build_config
from posttrain.stages.judging import comparison_prompt, verdict_ids
from posttrain.stages.rows import by_problem
from posttrain.suites.load import load_suite

BASE: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 8,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.01,
    "warmup_steps": 1,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(work: Path | None = None, **changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains}, work)

    return run


def rows_of(ran: Any, step: int) -> list[dict[str, Any]]:
    rows = map(json.loads, (ran.out / "rollouts.jsonl").read_text().splitlines())
    return [row for row in rows if row["step"] == step]


@pytest.mark.parametrize("template", [None, "which? {a} or {b}"])
def test_the_metrics_are_those_of_the_start_on_its_own_rollouts(
    rl: Callable[..., Any], models: Mapping[str, str], template: str | None
) -> None:
    """Of the first step, whose only update has not moved the weights; the question is that of the
    judge in the reward."""
    reward = judges.verifier() + 0.0 * judges.itself(template=template)
    ran = rl(reward=reward.to_json(), critique=Critique(0.5, pairs=999), steps=1)
    rows = build_comparisons(by_problem(rows_of(ran, 0)), template=template)
    start = load(models["start"])
    chat = chat_of(start)
    first, second = verdict_ids(chat)
    losses, right = [], []
    for row in rows:
        ids = torch.tensor([chat.prompt(row["prompt"])])
        with torch.no_grad():
            logp_V = start.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        good, bad = (first, second) if row["answer"] == "1" else (second, first)
        losses.append(-float(logp_V[good]))
        right.append(bool(logp_V[good] > logp_V[bad]))
    (line,) = ran.lines
    assert line["critique_pairs"] == len(rows) > 4
    assert line["critique_loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-4)
    assert line["critique_accuracy"] == pytest.approx(sum(right) / len(rows))


def test_the_verdicts_are_learned(rl: Callable[..., Any]) -> None:
    """Rewards alone leave the loss where it is: it is only measured with a weight near 0. Late
    steps have a pair or two each, so many are looked at."""
    learned = rl(critique=Critique(5.0), steps=30)
    measured = rl(critique=Critique(1e-9), steps=30)
    first = learned.lines[0]["critique_loss"]
    late, untaught = (
        [line["critique_loss"] for line in ran.lines[15:] if "critique_loss" in line]
        for ran in (learned, measured)
    )
    assert first == measured.lines[0]["critique_loss"]
    assert sum(late) / len(late) < 0.5 * sum(untaught) / len(untaught)
    assert sum(late) / len(late) < 0.5 * first


def test_pairs_are_limited_and_shared_out_over_the_updates(rl: Callable[..., Any]) -> None:
    every = rl(critique=Critique(0.1, pairs=999), steps=1).lines[0]["critique_pairs"]
    some = rl(critique=Critique(0.1, pairs=2), num_minibatches=3, steps=1)
    assert every > 6
    assert some.lines[0]["critique_pairs"] == 6


def test_other_domains_are_not_compared(rl: Callable[..., Any]) -> None:
    ran = rl(critique=Critique(0.1, pairs=999, domains=("words",)))
    for line in ran.lines:
        rows = rows_of(ran, int(line["step"]) - 1)
        own = build_comparisons(by_problem(row for row in rows if row["domain"] == "words"))
        assert line["critique_pairs"] == len(own) < len(build_comparisons(by_problem(rows)))


def test_nothing_to_compare_is_nothing_to_learn(rl: Callable[..., Any], same: Any) -> None:
    """Without randomness all responses to a prompt are alike."""
    cold = {"temperature": 1e-4, "advantage": "global"}
    with_critique, plain = rl(critique=Critique(0.5), **cold), rl(**cold)
    assert [line["critique_pairs"] for line in with_critique.lines] == [0.0] * 4
    assert same(with_critique, plain)


def test_a_stopped_stage_goes_on_to_the_same_bits(
    rl: Callable[..., Any], goes_on: Callable[..., Any], same: Any
) -> None:
    """Stopped after step 3, whose checkpoint is that of step 2; the weight rises, pairs are few."""
    settings: dict[str, Any] = {
        "critique": Critique(schedules.linear(0.0, 1.0), pairs=3),
        "num_minibatches": 2,
    }
    whole, _ = goes_on(lambda work: rl(work, **settings), saved=2, killed=3)
    assert [line["setting/critique/weight"] for line in whole.lines] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )
    assert not same(whole, rl(num_minibatches=2))


def test_long_responses_lose_their_beginnings(make_model: Callable[..., Any]) -> None:
    model = make_model(positions=64)
    chat, problem = chat_of(model), {"prompt": "words abc", "answer": "abc"}
    a, b = "a" * 50 + "xyz", "uvw"
    ids = comparison_prompt(chat, None, problem, (a, b))
    assert len(ids) == 63
    text = model.tokenizer.decode(ids)
    assert "axyz|uvw" in text
    assert "a" * 50 not in text
    roomy = chat_of(make_model(positions=128))
    assert len(comparison_prompt(roomy, None, problem, (a, b))) > 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critique": {"pairs": 4}}, r"field 'critique\.weight': a value is needed"),
        ({"critique": {"weight": -1.0}}, r"'critique\.weight': -1\.0 is not allowed"),
        ({"critique": {"weight": 0.1, "pairs": 0}}, r"'critique\.pairs': 0 is not allowed"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", {"steps": 2} | settings)


def test_a_domain_that_the_stage_does_not_have() -> None:
    r = Recipe(*load_suite("core"))
    asked = Critique(0.1, domains=r.domains[-1:])
    with pytest.raises(ConfigError, match=r"field 'critique\.domains'"):
        r.rl(start=r.base("tiny"), prompts=r.prompts(r.domains[:1]), steps=2, critique=asked)
