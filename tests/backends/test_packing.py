"""Rows that share bins: every position has one owner, and rows see only themselves."""

from __future__ import annotations

import pytest
import torch

from posttrain.backends.packing import MAX_SHARED_WIDTH, MIN_WIDTH, pack

CASES = [
    [1],
    [5, 9],
    [96, 1, 95, 1, 50, 46],
    [97, 20, 30, 77],
    [MAX_SHARED_WIDTH, 3, 4],
    [MAX_SHARED_WIDTH + 1, 3, 4],
    [7] * 200,
]


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_every_row_lies_whole_in_one_bin(lengths: list[int]) -> None:
    bins = pack(torch.tensor(lengths))
    width = bins.row_CT.shape[1]
    assert width >= max(lengths)
    rows, positions = bins.row_CT.flatten(), bins.position_CT.flatten()
    for row, length in enumerate(lengths):
        start = int(bins.start_B[row])
        assert start // width == (start + length - 1) // width
        assert (rows == row).nonzero()[:, 0].tolist() == list(range(start, start + length))
        assert positions[start : start + length].tolist() == list(range(length))
    assert int((rows >= 0).sum()) == sum(lengths)


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_a_position_sees_its_own_row_up_to_itself(lengths: list[int]) -> None:
    bins = pack(torch.tensor(lengths))
    mask = bins.mask()
    if mask is None:
        # Causal attention is enough where each row has a bin of its own.
        assert bins.row_CT.shape[0] == len(lengths)
        assert all(int(start) % bins.row_CT.shape[1] == 0 for start in bins.start_B)
        return
    for number in range(min(3, bins.row_CT.shape[0])):
        row_T = bins.row_CT[number].tolist()
        for position, row in enumerate(row_T):
            if row >= 0:
                seen = mask[number, 0, position].nonzero()[:, 0].tolist()
                first = row_T.index(row)
                assert seen == list(range(first, position + 1))


def test_short_rows_share_and_long_ones_do_not() -> None:
    assert pack(torch.tensor([7] * 200)).row_CT.shape[0] == -(-200 // (MIN_WIDTH // 7))
    assert not pack(torch.tensor([MAX_SHARED_WIDTH + 1, 3, 4])).shared
    assert not pack(torch.tensor([90, 91])).shared
