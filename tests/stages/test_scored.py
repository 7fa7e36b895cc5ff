"""Several draws as one batch: rows keep what belongs to them."""

from __future__ import annotations

import torch
from posttrain.rl.types import Rollouts, pad_rows
from posttrain.stages.rollouts import Scored
from posttrain.stages.scored import chosen_groups, joined

Row = tuple[str, list[int], float]


def scored(rows: list[Row], size: int = 2) -> Scored:
    """Rows of (domain, response, reward); prompts are the one token 9."""
    tokens_BT, length_B = pad_rows([[9, *response] for _, response, _ in rows], 0)
    width = int(length_B.max()) - 1
    logp = [[-0.1 * t for t in r] + [0.0] * (width - len(r)) for _, r, _ in rows]
    return Scored(
        rollouts=Rollouts(
            tokens_BT=tokens_BT,
            prompt_len_B=torch.ones(len(rows), dtype=torch.int64),
            response_len_B=length_B - 1,
            logp_BR=torch.tensor(logp),
            finished_B=torch.tensor([len(r) < 3 for _, r, _ in rows]),
        ),
        problems=[{"domain": domain} for domain, _, _ in rows],
        group_B=torch.arange(len(rows) // size).repeat_interleave(size),
        texts=[str(response) for _, response, _ in rows],
        reward_B=torch.tensor([reward for _, _, reward in rows]),
        verified_B=torch.tensor([reward for _, _, reward in rows]),
    )


FIRST: list[Row] = [("a", [1], 1.0), ("a", [2], 1.0), ("b", [3], 0.0), ("b", [4], 1.0)]
SECOND: list[Row] = [("a", [5, 6, 7], 0.0), ("a", [8], 0.5), ("b", [1, 1], 0.0), ("b", [2], 0.0)]


def test_joined_rows_are_those_of_the_parts() -> None:
    both = joined([scored(FIRST), scored(SECOND)])
    assert both.rollouts.responses() == [row[1] for row in FIRST + SECOND]
    assert both.group_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both.reward_B.tolist() == [row[2] for row in FIRST + SECOND]
    assert both.texts[4] == "[5, 6, 7]"
    assert [p["domain"] for p in both.problems] == list("aabbaabb")
    assert both.rollouts.finished_B.tolist() == [True] * 4 + [False] + [True] * 3
    flat = [-0.1 * token for _, response, _ in FIRST + SECOND for token in response]
    assert torch.allclose(both.rollouts.sampler_logp_N(), torch.tensor(flat))
    one = scored(FIRST)
    assert joined([one]) is one


def test_groups_with_unequal_rewards_come_first_and_domains_keep_their_share() -> None:
    both = joined([scored(FIRST), scored(SECOND)])
    one = chosen_groups(both, {"a": 1, "b": 1}, 2)
    assert one.texts == ["[3]", "[4]", "[5, 6, 7]", "[8]"]
    assert one.group_B.tolist() == [1, 1, 2, 2]
    assert one.rollouts.responses() == [[3], [4], [5, 6, 7], [8]]
    filled = chosen_groups(both, {"a": 1, "b": 2}, 2)
    assert filled.texts == ["[3]", "[4]", "[5, 6, 7]", "[8]", "[1, 1]", "[2]"]
    assert filled.reward_B.tolist() == [0.0, 1.0, 0.0, 0.5, 0.0, 0.0]
