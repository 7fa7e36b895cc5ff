"""Packing: every token that is needed is read once, and rows see their prompt and themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from posttrain.backends.packing import (
    MIN_WIDTH,
    WORTH_TWO,
    Packed,
    flat_passes,
    forward_passes,
)
from posttrain.rl.types import Rollouts
from posttrain.stages.batches import sequences

# Prompts as (number, length), responses as lengths; neighbours with one number share the prompt.
CASES: dict[str, list[tuple[tuple[int, int], int]]] = {
    "one": [((0, 1), 1)],
    "two prompts": [((0, 3), 5), ((1, 4), 9)],
    "groups": [((g, 3 + g), 1 + (5 * g + m) % 7) for g in range(6) for m in range(4)],
    "heavy tail": [((g, 8), 1 + (g * g * m) % 90) for g in range(12) for m in range(4)],
    "not neighbours": [((0, 5), 4), ((1, 5), 4), ((0, 5), 3)],
    "beyond the limit": [((0, 10), 200), ((0, 10), 300), ((1, 10), 5), ((1, 10), 700)],
    "short": [((n, 3), 5) for n in range(50)],
}
HIDDEN = 64


def batch(case: list[tuple[tuple[int, int], int]]) -> Rollouts:
    """Distinct tokens in every response, so that any mix-up shows."""
    prompts = [[100 + 50 * number + i for i in range(length)] for (number, length), _ in case]
    fresh = itertools.count(10_000)
    responses = [[next(fresh) for _ in range(length)] for _, length in case]
    return sequences(prompts, responses, pad_id=0)


def passes(name: str, **options: int) -> list[Packed]:
    settings = {"max_tokens": 512, "hidden_size": HIDDEN} | options
    return list(forward_passes(batch(CASES[name]), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_response_token_is_predicted_where_all_before_it_is_visible(
    name: str, pack: bool
) -> None:
    """What a predicting position sees is its own row up to there, in order, and nothing else."""
    rollouts = batch(CASES[name])
    seen = []
    for packed in passes(name, pack=pack):
        mask = packed.mask(torch.float32)
        width = packed.tokens_CT.shape[1]
        causal_TT = torch.ones(width, width).tril().log()
        flat = 0
        for row in packed.index_B.tolist():
            seen.append(row)
            start, length = int(rollouts.prompt_len_B[row]), int(rollouts.response_len_B[row])
            tokens = rollouts.tokens_BT[row].tolist()
            for offset in range(length):
                bin_number, at = divmod(int(packed.predicts_N[flat]), width)
                flat += 1
                visible_TT = causal_TT if mask is None else mask[bin_number, 0]
                looked = (visible_TT[at] == 0).nonzero()[:, 0]
                assert packed.tokens_CT[bin_number, looked].tolist() == tokens[: start + offset]
                positions = packed.position_CT[bin_number, looked].tolist()
                assert positions == list(range(start + offset))
        assert flat == len(packed.predicts_N)
        assert packed.index_B.tolist() == sorted(packed.index_B.tolist())
    assert sorted(seen) == list(range(len(rollouts)))


def test_a_prompt_is_read_once_for_its_group() -> None:
    needed = sum(len(packed.at_M) for packed in passes("groups"))
    assert needed == sum(
        (length if m == 0 else 0) + response - 1
        for m, ((_, length), response) in zip(
            itertools.cycle(range(4)), CASES["groups"], strict=False
        )
    )
    alone = sum(len(packed.at_M) for packed in passes("groups", pack=False))
    assert alone == sum(length + response - 1 for (_, length), response in CASES["groups"])


def test_only_neighbours_share_a_prompt() -> None:
    assert sum(len(p.at_M) for p in passes("not neighbours")) == 3 * 5 + 3 + 3 + 2


@pytest.mark.parametrize("max_tokens", [1, 100, 512])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_keeps_to_the_budget_or_has_one_bin(name: str, max_tokens: int) -> None:
    for packed in passes(name, max_tokens=max_tokens):
        bins, width = packed.tokens_CT.shape
        assert bins == 1 or bins * width <= max_tokens


def test_little_is_computed_for_nothing() -> None:
    """Groups of four with heavy-tailed responses, as many as a step samples."""
    generator = torch.Generator().manual_seed(0)
    for groups, hidden_size in ((64, 128), (8, 512)):
        lengths = torch.empty(groups * 4).exponential_(1 / 32, generator=generator)
        case = [((n // 4, 32), min(128, 1 + int(r))) for n, r in enumerate(lengths.tolist())]
        found = list(forward_passes(batch(case), max_tokens=8192, hidden_size=hidden_size))
        computed = sum(packed.tokens_CT.numel() for packed in found)
        assert computed <= 1.1 * sum(len(packed.at_M) for packed in found)


def test_short_rows_share_bins_and_rows_beyond_the_limit_do_not() -> None:
    (short,) = passes("short", max_tokens=10_000)
    assert short.shared and short.tokens_CT.shape[1] >= MIN_WIDTH
    limit = 4 * HIDDEN
    wide = [
        p for p in passes("beyond the limit", max_tokens=10_000) if p.tokens_CT.shape[1] > limit
    ]
    assert wide and all(packed.mask(torch.float32) is None for packed in wide)


@pytest.mark.parametrize("pack", [True, False])
def test_a_block_of_rows_stays_in_one_pass(pack: bool) -> None:
    case = [((n // 2, 4), 1 + (n * 37) % 400) for n in range(20)]
    for packed in forward_passes(batch(case), max_tokens=64, hidden_size=16, block=2, pack=pack):
        rows = packed.index_B.tolist()
        assert all(row ^ 1 in rows for row in rows)


def test_the_same_batch_is_laid_out_the_same() -> None:
    for one, two in zip(passes("heavy tail"), passes("heavy tail"), strict=True):
        assert torch.equal(one.tokens_CT, two.tokens_CT) and torch.equal(one.index_B, two.index_B)


def flat(case: list[tuple[tuple[int, int], int]], **options: int) -> list[tuple[Packed, ...]]:
    settings = {"max_tokens": 512, "hidden_size": HIDDEN} | options
    return list(flat_passes(batch(case), **settings))


@pytest.mark.parametrize("name", CASES)
def test_flat_passes_hold_every_row_once_and_what_predicts_it(name: str) -> None:
    rollouts = batch(CASES[name])
    seen = []
    for parts in flat(CASES[name]):
        for part in parts:
            tokens_S = part.tokens_CT.flatten()
            flat_at = 0
            for row in part.index_B.tolist():
                seen.append(row)
                start, length = int(rollouts.prompt_len_B[row]), int(rollouts.response_len_B[row])
                expected = rollouts.tokens_BT[row, start - 1 : start + length - 1].tolist()
                predicts_R = part.predicts_N[flat_at : flat_at + length]
                assert tokens_S[predicts_R].tolist() == expected
                assert set(predicts_R.tolist()) <= set(part.at_M.tolist())
                flat_at += length
    assert sorted(seen) == list(range(len(rollouts)))


@pytest.mark.parametrize("max_tokens", [100, 300, 2048])
def test_flat_passes_are_of_like_size(max_tokens: int) -> None:
    case = [((g, 8), 1 + (7 * g + 3 * m) % 30) for g in range(60) for m in range(2)]
    sizes = [sum(len(part.at_M) for part in parts) for parts in flat(case, max_tokens=max_tokens)]
    widest = max(part.tokens_CT.shape[1] for parts in flat(case) for part in parts)
    assert sum(sizes) >= WORTH_TWO and len(sizes) >= max(2, sum(sizes) // max_tokens)
    assert max(sizes) <= max_tokens + widest
    assert max(sizes) - min(sizes) <= 2 * widest


def test_flat_passes_keep_blocks_whole() -> None:
    case = [((n // 2, 4), 1 + (n * 37) % 400) for n in range(20)]
    for parts in flat(case, max_tokens=64, block=2):
        rows = [row for part in parts for row in part.index_B.tolist()]
        assert all(row ^ 1 in rows for row in rows)
