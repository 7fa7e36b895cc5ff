"""Rows with named columns: what every operation does to tokens, masks and columns.

Legend: B rows, T positions of a row, N sampled tokens of all rows, F entries of a ragged column.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.rl.batch import (
    Batch,
    axis_of,
    between,
    concatenate,
    counts_of,
    pad_rows,
    ragged_index,
)


def example() -> Batch:
    """The one of the docstring, with a ragged column: {3, 7}, {5}, {1}, {2, 4, 6}, {} by token."""
    batch = Batch.from_tokens(
        [[7, 8, 9], [5, 6]], [[4, 2], [4, 4, 4]], pad_id=0, problems=[{"id": "a"}, {"id": "b"}]
    )
    batch["reward_B"] = torch.tensor([1.0, 0.0])
    batch["old_logp_N"] = torch.tensor([-0.1, -0.2, -0.3, -0.1, -0.4])
    batch["nucleus_count_N"] = torch.tensor([2, 1, 1, 3, 0])
    batch["nucleus_ids_F"] = torch.tensor([3, 7, 5, 1, 2, 4, 6])
    batch["hidden_NE"] = torch.arange(10.0).view(5, 2)
    return batch


def turns() -> Batch:
    """Two turns with a tool's text between them, two with text after them, and one."""
    batch = Batch.from_spans(
        [
            [([1, 2], False), ([11, 12], True), ([3], False), ([13], True)],
            [([4], False), ([14], True), ([5, 6], False), ([15, 16], True), ([7], False)],
            [([8, 9], False), ([17, 18, 19], True)],
        ],
        pad_id=0,
    )
    batch["number_N"] = batch.targets_N.clone()
    batch["group_B"] = torch.tensor([0, 0, 1])
    return batch


def bits(mask_BT: Tensor) -> list[str]:
    return ["".join(str(int(mark)) for mark in row) for row in mask_BT]


def test_the_docstring_s_example() -> None:
    batch = example()
    assert batch.tokens_BT.tolist() == [[7, 8, 9, 4, 2], [5, 6, 4, 4, 4]]
    assert bits(batch.sampled_BT) == ["00011", "00111"]
    assert (batch.length_B.tolist(), batch.sampled_len_B.tolist()) == ([5, 5], [2, 3])
    assert batch.num_tokens == 5 and len(batch) == 2
    assert batch.targets_N.tolist() == [4, 2, 4, 4, 4]
    assert batch.row_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.last_B.tolist() == [1, 4]
    assert batch.responses() == [[4, 2], [4, 4, 4]]


def test_several_spans() -> None:
    batch = turns()
    assert bits(batch.sampled_BT) == ["0011010", "0100110", "0011100"]
    assert batch.prompt_len_B.tolist() == [2, 1, 2] and batch.length_B.tolist() == [6, 7, 5]
    assert batch.responses() == [[11, 12, 13], [14, 15, 16], [17, 18, 19]]
    assert batch.last_B.tolist() == [2, 5, 8]
    with pytest.raises(ValueError, match="row 1 has no sampled token"):
        Batch.from_spans([[([1], False), ([2], True)], [([1], False)]], pad_id=0)


def test_something_stands_before_the_first_sampled_token() -> None:
    with pytest.raises(ValueError, match="row 1 has no token before its first sampled one"):
        Batch.from_spans([[([1], False), ([2], True)], [([1], True)]], pad_id=0)
    with pytest.raises(ValueError, match="row 0 has no token before its first sampled one"):
        Batch.from_tokens([[]], [[1]], pad_id=0)


def test_columns_have_the_size_that_their_name_says() -> None:
    batch = example()
    with pytest.raises(ValueError, match=r"'kl_N' has 2 entries; this batch of 2 rows and 5 samp"):
        batch["kl_N"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'reward_B' has 5 entries.*needs 2"):
        batch["reward_B"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"'nucleus_ids_F' has 6 entries.*needs 7"):
        batch["nucleus_ids_F"] = torch.zeros(6)
    with pytest.raises(ValueError, match="'reward': its suffix says"):
        batch["reward"] = torch.zeros(2)
    with pytest.raises(KeyError, match="no column 'kl_N'; it has reward_B, old_logp_N"):
        batch["kl_N"]
    assert "reward_B" in batch and "kl_N" not in batch
    assert axis_of("hidden_NE") == "N" and counts_of("nucleus_ids_F") == "nucleus_count_N"


@pytest.mark.parametrize("index_B", [torch.tensor([1]), torch.tensor([False, True])])
def test_a_row_takes_its_columns_along(index_B: Tensor) -> None:
    row = example().select(index_B)
    assert row.tokens_BT.tolist() == [[5, 6, 4, 4, 4]] and row.problems == [{"id": "b"}]
    assert row["reward_B"].tolist() == [0.0]
    assert row["old_logp_N"].tolist() == pytest.approx([-0.3, -0.1, -0.4])
    assert row["nucleus_count_N"].tolist() == [1, 3, 0]
    assert row["nucleus_ids_F"].tolist() == [1, 2, 4, 6]
    assert row["hidden_NE"].tolist() == [[4, 5], [6, 7], [8, 9]]


def test_selected_rows_come_in_the_order_asked_for_and_may_repeat() -> None:
    batch = turns()
    picked = batch.select(torch.tensor([2, 0, 2]))
    assert picked.tokens_BT.shape == (3, 6), "trimmed to the longest"
    assert picked["number_N"].tolist() == [17, 18, 19, 11, 12, 13, 17, 18, 19]
    assert torch.equal(picked["number_N"], picked.targets_N)
    assert picked["group_B"].tolist() == [1, 0, 1]
    assert len(batch.select(torch.zeros(3, dtype=torch.bool))) == 0


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_minibatches_share_out_all_rows_once(number: int) -> None:
    batch = concatenate([turns(), turns().select(torch.tensor([0]))])
    batch["row_B"] = torch.arange(4)
    shares = list(batch.minibatches(number, seed=3, step=7))
    assert len(shares) == min(number, 4)
    rows = [share["row_B"].tolist() for share in shares]
    assert all(share == sorted(share) for share in rows)
    assert sorted(row for share in rows for row in share) == [0, 1, 2, 3]
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    for share in shares:
        assert torch.equal(share["number_N"], share.targets_N)
    again = [share["row_B"].tolist() for share in batch.minibatches(number, seed=3, step=7)]
    assert again == rows
    others = {
        str([s["row_B"].tolist() for s in batch.minibatches(2, seed=3, step=n)]) for n in range(9)
    }
    assert len(others) > 1


def test_the_end_position_is_sampled_and_no_token_of_a_row() -> None:
    ended = turns().with_end_position()
    assert bits(ended.sampled_BT) == ["00110110", "01001101", "00111100"]
    assert ended.length_B.tolist() == [6, 7, 5], "it is not read"
    assert ended.last_B.tolist() == [3, 7, 11]
    assert list(ended.columns) == ["group_B"]
    row = ended.select(torch.tensor([2]))
    assert row.tokens_BT.tolist() == [[8, 9, 17, 18, 19, 0]] and bits(row.sampled_BT) == ["001111"]
    # Where nothing was sampled it is the only one.
    empty = Batch.from_tokens([[7, 8, 9]], [[]], pad_id=0).with_end_position()
    assert bits(empty.sampled_BT) == ["0001"] and empty.last_B.tolist() == [0]


def test_other_prompts_leave_the_sampled_tokens_and_columns() -> None:
    batch = turns()
    changed = batch.with_prompts([[21, 22, 23, 24], None, []], pad_id=0)
    assert changed.tokens_BT.tolist() == [
        [21, 22, 23, 24, 11, 12, 3, 13],
        [4, 14, 5, 6, 15, 16, 7, 0],
        [17, 18, 19, 0, 0, 0, 0, 0],
    ]
    assert bits(changed.sampled_BT) == ["00001101", "01001100", "11100000"]
    assert torch.equal(changed.targets_N, batch.targets_N)
    assert changed.prompt_len_B.tolist() == [4, 1, 0] and changed.length_B.tolist() == [8, 7, 3]
    assert torch.equal(changed["number_N"], batch["number_N"])


def test_concatenated_batches_have_the_columns_of_all_and_groups_of_their_own() -> None:
    one, two = turns(), turns().select(torch.tensor([2, 1]))
    one["only_B"] = torch.zeros(3)
    for batch, index in ((one, [0, 1, 2]), (two, [2, 1])):
        batch.texts.extend("abc"[i] for i in index)
        batch.problems.extend({"id": i} for i in index)
    both = concatenate([one, two])
    assert both["group_B"].tolist() == [0, 0, 1, 3, 2]
    assert set(both.columns) == {"number_N", "group_B"}
    assert torch.equal(both["number_N"], both.targets_N)
    assert both.responses() == one.responses() + two.responses()
    assert both.texts == list("abccb") and [p["id"] for p in both.problems] == [0, 1, 2, 2, 1]
    assert concatenate([one]) is one
    narrow = concatenate([one.select(torch.tensor([2])), one])
    assert narrow.tokens_BT.shape == (4, 7) and bits(narrow.sampled_BT)[0] == "0011100"


def test_columns_can_be_left_out_and_moved() -> None:
    batch = example()
    without = batch.without("reward_B", "absent_N")
    assert "reward_B" not in without and "reward_B" in batch
    assert batch.to(torch.device("meta"))["old_logp_N"].device.type == "meta"
    assert batch.to(torch.device("meta")).device.type == "meta"


def test_helpers() -> None:
    tokens_BT, length_B = pad_rows([[1, 2], [], [3]], 9)
    assert tokens_BT.tolist() == [[1, 2], [9, 9], [3, 9]] and length_B.tolist() == [2, 0, 1]
    assert pad_rows([], 0)[0].shape == (0, 0)
    assert bits(between(torch.tensor([1, 0]), torch.tensor([3, 0]), 4)) == ["0110", "0000"]
    index_N = ragged_index(torch.tensor([2, 0, 3]), torch.tensor([2, 1, 0]))
    assert index_N.tolist() == [2, 3, 4, 0, 1]
