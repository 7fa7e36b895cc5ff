"""Signs that a stage does little: what is told, with which numbers, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.checkpoint import read_chat
from posttrain.engine.work import read_warnings
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.signs import Responses, RlWatch, cut_responses, few_kept

NewContext = Callable[..., Context]


def rows(domain: str, *rewards: float) -> list[dict[str, Any]]:
    return [{"domain": domain, "reward": reward, "finished": True} for reward in rewards]


def rl(**settings: Any) -> Any:
    return build_config("rl", "rl", {"steps": 20, "group_size": 2} | settings)


@pytest.mark.parametrize(
    ("kept", "total", "told"),
    [(1, 40, "it keeps 1 of 40 rows (2.5 %); raise k"), (2, 40, None), (0, 15, None)],
)
def test_few_kept(new_context: NewContext, kept: int, total: int, told: str | None) -> None:
    ctx = new_context()
    few_kept(ctx, kept, total, "rows", "raise k")
    assert read_warnings(ctx.work) == ([told] if told else [])


def test_rewards_that_never_differ_within_a_prompt(new_context: NewContext) -> None:
    ctx = new_context()
    watch = RlWatch(ctx)
    for step in range(12):
        # Of "sums" the two groups are flat at 0 and at 0.5, "copies" has one that is not.
        watch.observe(rl(), rows("sums", 0, 0, 0.5, 0.5) + rows("copies", 1, 1, 0, 1))
        assert len(read_warnings(ctx.work)) == (step >= 9)
    (told,) = read_warnings(ctx.work)
    assert told.startswith(
        "domain 'sums': in 10 steps one after another the responses to a prompt had the same "
        "reward (0 to 0.5), from which nothing is learned; check that"
    )


@pytest.mark.parametrize(("reward", "fix"), [(0, "r.profile"), (1, "choose harder prompts")])
def test_the_fix_follows_from_the_reward(new_context: NewContext, reward: int, fix: str) -> None:
    ctx = new_context()
    watch = RlWatch(ctx)
    for _ in range(10):
        watch.observe(rl(), rows("sums", reward, reward))
    (told,) = read_warnings(ctx.work)
    assert f"({reward})" in told and fix in told


def test_one_step_with_a_difference_starts_the_count_anew(new_context: NewContext) -> None:
    ctx = new_context()
    watch = RlWatch(ctx)
    for step in range(18):
        watch.observe(rl(), rows("sums", 0, step == 8))
    assert read_warnings(ctx.work) == []


def test_without_groups_responses_are_compared_over_prompts(new_context: NewContext) -> None:
    ctx = new_context()
    watch = RlWatch(ctx)
    settings = rl(advantage="global")
    for _ in range(10):
        watch.observe(settings, rows("sums", 0, 0, 1, 1) + rows("copies", 0, 0, 0, 0))
    (told,) = read_warnings(ctx.work)
    assert told.startswith("domain 'copies'") and "all responses had" in told


def test_a_judges_score_counts_in_place_of_the_reward(new_context: NewContext) -> None:
    ctx = new_context()
    watch = RlWatch(ctx)
    for _ in range(10):
        scored = [row | {"score": i} for i, row in enumerate(rows("sums", 0, 0))]
        watch.observe(rl(), scored)
    assert read_warnings(ctx.work) == []


@pytest.mark.parametrize(
    ("shares", "total", "steps"),
    [([0.4] * 12, 20, "1 to 10"), ([0.4] * 2, 2, "1 to 2"), ([0.6] * 12, 20, None)],
)
def test_cut_responses(
    new_context: NewContext,
    models: Mapping[str, str],
    shares: list[float],
    total: int,
    steps: str | None,
) -> None:
    chat = read_chat(models["one"])
    ctx = new_context()
    for step in range(len(shares)):
        cut_responses(ctx, shares[: step + 1], total, 64, chat)
    told = read_warnings(ctx.work)
    assert [text.partition(": ")[0] for text in told] == (
        [f"60 % of the responses of steps {steps} were cut off at max_new_tokens = 64"]
        if steps
        else []
    )
    assert all("is '<|end|>' (4) or '!' (6) or" in text for text in told)


class Sampled(dict[str, torch.Tensor]):
    """The columns of a batch."""

    problems: list[dict[str, str]]


def batch(domain: str, finished: list[bool], reward: list[float]) -> Any:
    found = Sampled(finished_B=torch.tensor(finished), reward_B=torch.tensor(reward))
    found.problems = [{"domain": domain}] * len(finished)
    return found


def test_responses_of_a_stage_that_samples(
    new_context: NewContext, models: Mapping[str, str]
) -> None:
    ctx = new_context({"model": models["one"]})
    seen = Responses()
    seen.add(batch("cut", [True, False, False], [1.0, 0.0, 0.0]))
    for _ in range(2):
        seen.add(batch("flat", [True] * 8, [0.0] * 8))
        seen.add(batch("good", [True] * 8, [0.0] * 7 + [1.0]))
    seen.tell(ctx, 32, dict.fromkeys(("cut", "flat", "good"), "model"))
    told = read_warnings(ctx.work)
    assert [text.partition(";")[0].partition(": they")[0] for text in told] == [
        "domain 'cut': 2 of 3 responses were cut off at max_new_tokens = 32",
        "domain 'flat': all 16 responses have the reward 0",
    ]


def test_stages_tell_of_what_they_see(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    edges: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """rl, distill, sample and profile of a model that ends few responses within 2 tokens."""

    def told(kind: str, settings: dict[str, Any], inputs: Mapping[str, str]) -> str:
        return "\n".join(read_warnings(run_stage(kind, settings, inputs).out.parent))

    short = {"max_new_tokens": 1}
    steps = {"steps": 1, "prompts_per_step": 4} | short
    routes = {"short": ["one"], "words": ["one"]}
    one = {"models.one": models["one"], **domains}
    assert "of step 1 were cut off" in told("rl", steps | {"group_size": 2}, edges("rl"))
    routed = steps | {"routes": {"short": "t", "words": "t"}}
    assert "of step 1 were cut off" in told("distill", routed, edges("distill"))
    assert "cut off at max_new_tokens = 1" in told(
        "sample", short | {"k": 2, "num_prompts": 8, "routes": routes}, one
    )
    assert "cut off at max_new_tokens = 1" in told(
        "profile", short | {"n": 2, "num_prompts": 8}, {"model": models["one"], **domains}
    )


def test_data_operators_tell_when_they_keep_next_to_nothing(
    run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    row = {"domain": "d", "prompt": "p", "answer": "a", "finished": True, "num_tokens": 3}
    row |= {"ids": [5, 4], "ids_of": "0" * 16}
    sampled = [
        row | {"id": str(n // 2), "response": f"r{n}", "reward": float(n == 0)} for n in range(64)
    ]
    demos = [{"id": str(n), "domain": "d", "prompt": "p", "demo": "same"} for n in range(64)]
    for name, content in (("rollouts", sampled), ("data", demos)):
        text = "".join(json.dumps(one) + "\n" for one in content)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def told(kind: str, settings: dict[str, Any], edge: str) -> list[str]:
        return read_warnings(run_stage(kind, settings, {edge: str(tmp_path)}).out.parent)

    (kept,) = told("select", {"how": "correct"}, "rollouts")
    assert kept.startswith("it keeps 1 of 32 problems (3.1 %); sample from a better model")
    (kept,) = told("pairs", {"how": "best_against_worst"}, "rollouts")
    assert kept.startswith("it keeps 1 of 32 problems (3.1 %); raise k")
    (kept,) = told("dedup", {}, "data")
    assert kept.startswith("it keeps 1 of 64 rows (1.6 %); check what repeats")
    assert told("select", {"how": {"kind": "top_share", "share": 0.01}}, "rollouts") == []
