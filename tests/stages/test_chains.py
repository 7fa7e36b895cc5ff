"""rl on chains of responses: what a segment reads, who is judged, and what the rows share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain.rl.types import Rollouts, pad_rows
from posttrain.stages.chains import chain_responses
from posttrain.stages.credit import credit
from posttrain.stages.rollouts import Scored

from posttrain import judges
from posttrain.engine.errors import ConfigError
from posttrain.rl.advantage import advantages
from posttrain.stages.config import build_config

BASE = {
    "steps": 2,
    "prompts_per_step": 4,
    "group_size": 3,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
    "segments": 2,
}


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(**changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains})

    return run


def parts_of(rows: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("chain", ["{prompt} {response}", "so {response}"])
def test_a_segment_reads_the_response_before_it(rl: Callable[..., Any], chain: str) -> None:
    ran = rl(segments=3, chain=chain)
    rows = read(ran.out / "rollouts.jsonl")
    assert len(rows) == 2 * 4 * 3 * 3
    for number, links in enumerate(parts_of(rows, 3)):
        assert [row["segment"] for row in links] == [0, 1, 2]
        assert {row["chain"] for row in links} == {number % 12}
        assert len({row["id"] for row in links}) == 1
        assert len({row["reward"] for row in links}) == 1
        own = links[0]["prompt"]
        for before, row in pairwise(links):
            expected = chain.format(prompt=own, response=before["response"])
            assert row["prompt"] == expected
    groups = [{row["id"] for row in part} for part in parts_of(rows, 9)]
    assert all(len(ids) == 1 for ids in groups)
    for line in ran.lines:
        assert line["chain_length"] == pytest.approx(3 * line["response_length"], abs=1e-3)
        step = [row for row in rows if row["step"] == line["step"] - 1]
        assert line["reward"] == pytest.approx(sum(r["reward"] for r in step) / len(step), abs=1e-5)


def test_the_last_segment_s_answer_is_the_reward(rl: Callable[..., Any]) -> None:
    rows = read(rl(steps=4).out / "rollouts.jsonl")
    chains = list(parts_of(rows, 2))
    cut = [last for _, last in chains if not last["finished"]]
    assert cut and all(row["reward"] == 0 for row in cut)
    assert any(last["reward"] > 0 for _, last in chains)


def test_length_judges_see_the_whole_chain(rl: Callable[..., Any]) -> None:
    spec = (judges.finished() - 0.1 * judges.length(budget=5)).to_json()
    rows = read(rl(reward=spec).out / "rollouts.jsonl")
    totals = set()
    for first, last in parts_of(rows, 2):
        tokens = first["num_tokens"] + last["num_tokens"]
        totals.add(tokens)
        assert first["score"] == last["score"]
        over = max(0, tokens - 5) / 5
        assert last["score"] == pytest.approx(last["finished"] - 0.1 * over, abs=1e-5)
    assert len(totals) > 1 and max(totals) > 6, "no chain is longer than a response can be"


def scored(rewards: list[float], segments: int) -> Scored:
    """Two groups of chains; the n-th row has a response of n % 3 + 1 tokens."""
    responses = [[5] * (n % 3 + 1) for n in range(len(rewards) * segments)]
    tokens_BT, length_B = pad_rows([[9, *response] for response in responses], 0)
    group_B = torch.arange(2).repeat_interleave(len(responses) // 2)
    reward_B = torch.tensor(rewards).repeat_interleave(segments)
    return Scored(
        rollouts=Rollouts(
            tokens_BT=tokens_BT,
            prompt_len_B=torch.ones_like(length_B),
            response_len_B=length_B - 1,
            logp_BR=torch.zeros(len(responses), int(length_B.max()) - 1),
            finished_B=torch.arange(len(responses)) % 2 == 0,
        ),
        problems=[{"id": str(n)} for n in range(len(responses))],
        group_B=group_B,
        texts=[str(n) for n in range(len(responses))],
        reward_B=reward_B,
        verified_B=reward_B,
    )


@pytest.mark.parametrize(
    "advantage", ["group_mean", "group_zscore", "leave_one_out", "batch", "global"]
)
def test_advantages_are_over_chains_not_rows(advantage: str) -> None:
    """Statistics of three chains per group, whatever the number of rows that a chain has."""
    rewards = [1.0, 0.0, 0.0, 0.5, 1.0, 0.0]
    config = build_config("rl", "policy", {"steps": 2, "segments": 2, "advantage": advantage})
    batch = scored(rewards, 2)
    kept_B = torch.ones(12, dtype=torch.bool)
    weight_B = torch.ones(12)
    found = credit(config, None, batch, kept_B, kl_N=None, kl_weight_B=weight_B)
    group_C = torch.tensor([0, 0, 0, 1, 1, 1])
    expected_C = advantages(torch.tensor(rewards), group_C, mode=advantage)
    expected_B = expected_C.repeat_interleave(2)
    torch.testing.assert_close(found.advantage_N, expected_B[batch.rollouts.row_N()])


def test_the_kl_of_all_segments_lowers_a_chain_s_reward() -> None:
    """0.1 nats per token and a coefficient of 2: rows of 1, 2, 3, 1, ... tokens make chains of 3, 4
    and 5 tokens, whose rewards of 0 become -0.6, -0.8 and -1.0."""
    values = {"steps": 2, "segments": 2, "advantage": "group_mean", "kl_coef": 2.0}
    config = build_config("rl", "policy", values | {"kl_in": "reward"})
    batch = scored([0.0] * 6, 2)
    kl_N = torch.full((batch.rollouts.num_tokens,), 0.1)
    kept_B, weight_B = torch.ones(12, dtype=torch.bool), torch.ones(12)
    found = credit(config, None, batch, kept_B, kl_N=kl_N, kl_weight_B=weight_B)
    expected_B = torch.tensor([0.2, 0.2, 0.0, 0.0, -0.2, -0.2] * 2)
    torch.testing.assert_close(
        found.advantage_N, expected_B[batch.rollouts.row_N()], atol=1e-6, rtol=0
    )


def test_judges_get_the_last_response_and_all_tokens() -> None:
    batch = chain_responses(scored([1.0, 0.0, 0.5, 0.0], 3), 3)
    assert batch.texts == ["2", "5", "8", "11"]
    assert batch.group == [0, 0, 1, 1]
    assert batch.num_tokens == [6, 6, 6, 6]
    assert batch.verdicts == [1.0, 0.0, 0.5, 0.0]
    assert batch.finished == [True, False, True, False]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"chain": "x {response}"}, "it is not read with segments = 1"),
        ({"segments": 2, "advantage": "gae"}, "segments = 2 with advantage = gae"),
        ({"segments": 2, "chain": "{prompt}"}, "is no template for the next prompt"),
        ({"segments": 2, "chain": "{response} {answer}"}, "nothing else in braces"),
        ({"segments": 2, "chain": "{response!r}"}, "nothing else in braces"),
        ({"segments": 2, "chain": "{response"}, "is no template"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "policy", {"steps": 4, **values})
