"""Packing: every token that is needed is read once, and rows see their prompt and themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch

from posttrain.backends.cpu.packing import (
    MIN_WIDTH,
    WORTH_TWO,
    PackedPass,
    flat_passes,
    packed_passes,
)
from posttrain.backends.padded import PaddedPass, padded_passes
from posttrain.rl.batch import Batch

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


# The rows of a group as (tokens, sampled or not) after a prompt of 5: turns with a tool's text
# between them, text after the last turn, and an ordinary response.
TURNS: list[list[tuple[int, bool]]] = [
    [(4, True), (3, False), (2, True)],
    [(1, True), (9, False), (1, True), (1, False), (6, True), (5, False)],
    [(7, True)],
    [(2, False), (3, True)],
]


def batch(case: list[tuple[tuple[int, int], int]]) -> Batch:
    """Distinct tokens in every response, so that any mix-up shows."""
    prompts = [[100 + 50 * number + i for i in range(length)] for (number, length), _ in case]
    fresh = itertools.count(10_000)
    responses = [[next(fresh) for _ in range(length)] for _, length in case]
    return Batch.from_tokens(prompts, responses, pad_id=0)


def turns() -> Batch:
    """Three groups of rows with several sampled spans."""
    fresh = itertools.count(10_000)
    return Batch.from_spans(
        [
            [
                ([100 + 50 * group + i for i in range(5)], False),
                *(([next(fresh) for _ in range(length)], sampled) for length, sampled in spans),
            ]
            for group in range(3)
            for spans in TURNS
        ],
        pad_id=0,
    )


BATCHES: dict[str, Callable[[], Batch]] = {
    **{name: partial(batch, case) for name, case in CASES.items()},
    "turns": turns,
    "turns and their ends": lambda: turns().with_end_position(),
    "ends": lambda: batch(CASES["groups"]).with_end_position(),
}


def passes(rows: Batch, **options: int) -> list[PackedPass]:
    settings = {"max_tokens": 512, "hidden_size": HIDDEN} | options
    return list(packed_passes(rows, **settings))


def padded(rows: Batch, max_tokens: int = 512, group_rows: int = 1) -> list[PaddedPass]:
    return list(padded_passes(rows, max_tokens=max_tokens, group_rows=group_rows))


@pytest.mark.parametrize("name", BATCHES)
def test_a_sampled_token_is_predicted_where_all_before_it_is_visible(name: str) -> None:
    """What a predicting position sees is its own row up to there, in order, and nothing else."""
    rows = BATCHES[name]()
    seen = []
    for packed in passes(rows):
        mask = packed.mask(torch.float32)
        width = packed.tokens_CT.shape[1]
        causal_TT = torch.ones(width, width).tril().log()
        predicts = iter(packed.predicts_N.tolist())
        for row in packed.index_B.tolist():
            seen.append(row)
            tokens = rows.tokens_BT[row].tolist()
            for column in rows.sampled_BT[row].nonzero()[:, 0].tolist():
                number, position = divmod(next(predicts), width)
                visible_TT = causal_TT if mask is None else mask[number, 0]
                looked = (visible_TT[position] == 0).nonzero()[:, 0]
                assert packed.tokens_CT[number, looked].tolist() == tokens[:column]
                assert packed.position_CT[number, looked].tolist() == list(range(column))
        assert next(predicts, None) is None
        assert packed.index_B.tolist() == sorted(packed.index_B.tolist())
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("max_tokens", [1, 100, 512])
@pytest.mark.parametrize("name", BATCHES)
def test_padded_lines_hold_each_row_up_to_its_last_sampled_token(
    name: str, max_tokens: int
) -> None:
    rows = BATCHES[name]()
    seen = []
    for padded_pass in padded(rows, max_tokens):
        lines, width = padded_pass.tokens_BT.shape
        assert lines == 1 or lines * width <= max_tokens
        predicts = iter(padded_pass.predicts_N.tolist())
        for row in padded_pass.index_B.tolist():
            seen.append(row)
            tokens = rows.tokens_BT[row].tolist()
            for column in rows.sampled_BT[row].nonzero()[:, 0].tolist():
                line, position = divmod(next(predicts), width)
                assert position == column - 1
                line_T = padded_pass.tokens_BT[line].tolist()
                assert line_T[:column] == tokens[:column]
            # Nothing is read after what predicts the last sampled token.
            assert set(line_T[column:]) <= {0}
        assert next(predicts, None) is None
    assert sorted(seen) == list(range(len(rows)))


def test_a_prompt_is_read_once_for_its_group() -> None:
    needed = sum(len(packed.index_M) for packed in passes(batch(CASES["groups"])))
    assert needed == sum(
        (length if m == 0 else 0) + response - 1
        for m, ((_, length), response) in zip(
            itertools.cycle(range(4)), CASES["groups"], strict=False
        )
    )


def test_a_tool_s_text_is_read_and_text_after_the_last_turn_is_not() -> None:
    """Of each group the prompt once, and its rows up to the token before the last sampled one."""
    needed = sum(len(packed.index_M) for packed in passes(turns()))
    assert needed == 3 * (5 + 8 + 17 + 6 + 7 + 2)
    # The row that begins with text of another has that text in its prompt, which nobody shares.
    with_it = turns()
    assert with_it.prompt_len_B.tolist() == [5, 5, 5, 7] * 3
    ends = sum(len(packed.index_M) for packed in passes(turns().with_end_position()))
    assert ends == 3 * (5 + 9 + 23 + 7 + 7 + 3)


def test_only_neighbours_share_a_prompt() -> None:
    rows = batch(CASES["not neighbours"])
    assert sum(len(p.index_M) for p in passes(rows)) == 3 * 5 + 3 + 3 + 2


@pytest.mark.parametrize("max_tokens", [1, 100, 512])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_keeps_to_the_budget_or_has_one_bin(name: str, max_tokens: int) -> None:
    for packed in passes(batch(CASES[name]), max_tokens=max_tokens):
        bins, width = packed.tokens_CT.shape
        assert bins == 1 or bins * width <= max_tokens


def test_little_is_computed_for_nothing() -> None:
    """Groups of four with heavy-tailed responses, as many as a step samples."""
    generator = torch.Generator().manual_seed(0)
    for groups, hidden_size in ((64, 128), (8, 512)):
        lengths = torch.empty(groups * 4).exponential_(1 / 32, generator=generator)
        case = [((n // 4, 32), min(128, 1 + int(r))) for n, r in enumerate(lengths.tolist())]
        found = passes(batch(case), max_tokens=8192, hidden_size=hidden_size)
        computed = sum(packed.tokens_CT.numel() for packed in found)
        assert computed <= 1.1 * sum(len(packed.index_M) for packed in found)


def test_short_rows_share_bins_and_rows_beyond_the_limit_do_not() -> None:
    (short,) = passes(batch(CASES["short"]), max_tokens=10_000)
    assert short.shared and short.tokens_CT.shape[1] >= MIN_WIDTH
    limit = 4 * HIDDEN
    wide = passes(batch(CASES["beyond the limit"]), max_tokens=10_000)
    wide = [p for p in wide if p.tokens_CT.shape[1] > limit]
    assert wide and all(packed.mask(torch.float32) is None for packed in wide)


@pytest.mark.parametrize("pack", [True, False])
def test_a_block_of_rows_stays_in_one_pass(pack: bool) -> None:
    rows = batch([((n // 2, 4), 1 + (n * 37) % 400) for n in range(20)])
    packed = passes(rows, max_tokens=64, hidden_size=16, group_rows=2)
    for found in packed if pack else padded(rows, max_tokens=64, group_rows=2):
        index = found.index_B.tolist()
        assert all(row ^ 1 in index for row in index)


def test_the_same_batch_is_laid_out_the_same() -> None:
    for one, two in zip(*(passes(batch(CASES["heavy tail"])) for _ in range(2)), strict=True):
        assert torch.equal(one.tokens_CT, two.tokens_CT) and torch.equal(one.index_B, two.index_B)


def flat(rows: Batch, **options: int) -> list[tuple[PackedPass, ...]]:
    settings = {"max_tokens": 512, "hidden_size": HIDDEN} | options
    return list(flat_passes(rows, **settings))


@pytest.mark.parametrize("name", BATCHES)
def test_flat_passes_hold_every_row_once_and_what_predicts_it(name: str) -> None:
    rows = BATCHES[name]()
    seen = []
    for parts in flat(rows):
        for part in parts:
            tokens_S = part.tokens_CT.flatten()
            first = 0
            for row in part.index_B.tolist():
                seen.append(row)
                column_R = rows.sampled_BT[row].nonzero()[:, 0]
                predicts_R = part.predicts_N[first : first + len(column_R)]
                assert torch.equal(tokens_S[predicts_R], rows.tokens_BT[row, column_R - 1])
                assert set(predicts_R.tolist()) <= set(part.index_M.tolist())
                first += len(column_R)
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("max_tokens", [100, 300, 2048])
def test_flat_passes_are_of_like_size(max_tokens: int) -> None:
    rows = batch([((g, 8), 1 + (7 * g + 3 * m) % 30) for g in range(60) for m in range(2)])
    sizes = [
        sum(len(part.index_M) for part in parts) for parts in flat(rows, max_tokens=max_tokens)
    ]
    widest = max(part.tokens_CT.shape[1] for parts in flat(rows) for part in parts)
    assert sum(sizes) >= WORTH_TWO and len(sizes) >= max(2, sum(sizes) // max_tokens)
    assert max(sizes) <= max_tokens + widest
    assert max(sizes) - min(sizes) <= 2 * widest


def test_flat_passes_keep_blocks_whole() -> None:
    rows = batch([((n // 2, 4), 1 + (n * 37) % 400) for n in range(20)])
    for parts in flat(rows, max_tokens=64, group_rows=2):
        index = [row for part in parts for row in part.index_B.tolist()]
        assert all(row ^ 1 in index for row in index)
