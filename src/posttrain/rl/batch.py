"""The one form that data has between sampler and loss: rows of tokens with named columns.

A row is a prompt and what follows it. Which of its tokens the policy sampled, and is to learn from,
says a mask: usually all after the prompt, but a tool's answer between two turns stands in the row
and was not sampled. Whatever else is known about rows or about sampled tokens is a column with a
name, and every operation on rows takes the columns along: choosing rows, cutting minibatches,
splitting into forward passes, moving to a device. So no stage computes where a token stands, and a
loss is a function of the batch that it is given.

The suffix of a column's name says what it has one entry for:

    reward_B, group_B             one per row
    advantage_N, old_logp_N       one per sampled token, row after row
    teacher_hidden_NE             the same, with further axes
    nucleus_ids_F                 as many per sampled token as `nucleus_count_N` says

Right padding is a choice: with causal attention a padded position is never seen by a real one, so
scoring and learning need no attention mask at all.

Legend: B rows, T positions of a row, N sampled tokens of all rows, F entries of a ragged column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.rl.seeds import step_seed

Span = tuple[Sequence[int], bool]
"""Token ids that stand together in a row, and whether the policy sampled them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of tokens, which of them were sampled, the problem of each row, and named columns.

    Example: two rows, prompts of 3 and 2 tokens, responses of 2 and 3::

        tokens_BT     [[7, 8, 9, 4, 2], [5, 6, 4, 4, 4]]
        prompt_len_B  [3, 2]        length_B [5, 5]
        sampled_BT    [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
        batch["reward_B"] = torch.tensor([1.0, 0.0])
        batch["old_logp_N"] = torch.tensor([-.1, -.2, -.3, -.1, -.4])

    `batch[name]` reads a column and `batch[name] = tensor` adds one. The tensors of rows may be on
    another device than those of columns; a loss is given all of them on its own.
    """

    tokens_BT: Tensor
    """int64, the tokens of each row, then padding."""
    prompt_len_B: Tensor
    """int64, tokens before the first that the policy may have sampled. Neighbouring rows with the
    same prompt are read together."""
    length_B: Tensor
    """int64, tokens of each row without padding."""
    sampled_BT: Tensor
    """bool, True where the policy sampled the token; False in prompts and padding."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """The problem that each row answers, or nothing where rows answer none."""
    texts: list[str] = field(default_factory=list)
    """The text of each row's response, or nothing where nobody needs it."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Name to tensor; see the top of the file."""

    @classmethod
    def from_tokens(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        pad_id: int,
        problems: Sequence[dict[str, Any]] = (),
    ) -> Batch:
        """One row for each prompt with its response, every token of which counts as sampled.

        Raises ValueError for a prompt without a token: nothing would predict the first sampled one.
        """
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        _refuse_empty(len(prompt) for prompt in prompts)
        tokens_BT, length_B = pad_rows(rows, pad_id)
        prompt_len_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        return cls(
            tokens_BT=tokens_BT,
            prompt_len_B=prompt_len_B,
            length_B=length_B,
            sampled_BT=between(prompt_len_B, length_B, tokens_BT.shape[1]),
            problems=list(problems),
        )

    @classmethod
    def from_spans(
        cls,
        rows: Sequence[Sequence[Span]],
        *,
        pad_id: int,
        problems: Sequence[dict[str, Any]] = (),
    ) -> Batch:
        """One row for each list of spans: several turns of the policy with other text between.

        What stands before the first sampled span of a row is its prompt. Raises ValueError for a
        row without a sampled token, or with nothing before the first one.
        """
        tokens_BT, length_B = pad_rows([[t for ids, _ in row for t in ids] for row in rows], pad_id)
        marks = [[int(sampled) for ids, sampled in row for _ in ids] for row in rows]
        for number, mark in enumerate(marks):
            if 1 not in mark:
                raise ValueError(f"row {number} has no sampled token; every row needs one")
        prompt_lens = [mark.index(1) for mark in marks]
        _refuse_empty(prompt_lens)
        sampled_BT, _ = pad_rows(marks, 0)
        return cls(
            tokens_BT=tokens_BT,
            prompt_len_B=torch.tensor(prompt_lens, dtype=torch.int64),
            length_B=length_B,
            sampled_BT=sampled_BT.bool(),
            problems=list(problems),
        )

    def __len__(self) -> int:
        return int(self.tokens_BT.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the rows are; a column may be elsewhere."""
        return self.tokens_BT.device

    @cached_property
    def sampled_len_B(self) -> Tensor:
        """int64, number of sampled tokens of each row."""
        return self.sampled_BT.sum(1)

    @cached_property
    def num_tokens(self) -> int:
        """Number of sampled tokens of all rows."""
        return int(self.sampled_len_B.sum())

    @cached_property
    def row_N(self) -> Tensor:
        """int64, the row of each sampled token, row after row."""
        row_B = torch.arange(len(self), device=self.device)
        # [B] -> [N]: the number of a row once for each of its sampled tokens.
        return row_B.repeat_interleave(self.sampled_len_B)

    @cached_property
    def targets_N(self) -> Tensor:
        """int64, the sampled tokens themselves, row after row."""
        # [B, T] -> [N]: a mask picks row after row, from left to right.
        return self.tokens_BT[self.sampled_BT]

    @property
    def last_B(self) -> Tensor:
        """int64, where the last sampled token of each row stands in an `_N` tensor."""
        return self.sampled_len_B.cumsum(0) - 1

    def responses(self) -> list[list[int]]:
        """The sampled token ids of every row."""
        targets = self.targets_N.tolist()
        ends = self.sampled_len_B.cumsum(0).tolist()
        return [targets[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Tensor:
        """A column. Raises KeyError with the names that there are."""
        if name not in self.columns:
            raise KeyError(f"the batch has no column {name!r}; it has {', '.join(self.columns)}")
        return self.columns[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Add or replace a column. Raises ValueError for a name without a suffix, or a wrong size.

        A ragged column comes after its counts.
        """
        wanted = self._size_of(name)
        if len(value) != wanted:
            raise ValueError(
                f"column {name!r} has {len(value)} entries; this batch of {len(self)} rows and "
                f"{self.num_tokens} sampled tokens needs {wanted}"
            )
        self.columns[name] = value

    def _size_of(self, name: str) -> int:
        axis = axis_of(name)
        if axis == "B":
            return len(self)
        if axis == "N":
            return self.num_tokens
        return int(self[counts_of(name)].sum())

    def select(self, index_B: Tensor) -> Batch:
        """The rows at `index_B` (int64 or bool), trimmed to the longest of them, with columns."""
        if index_B.dtype == torch.bool:
            index_B = index_B.nonzero()[:, 0]
        index_B = index_B.to(self.device)
        # One column more than the longest row where its mask says so; see `with_end_position`.
        width = int(self._width_B[index_B].max()) if len(index_B) else 0
        picked = index_B.tolist() if self.problems or self.texts else []
        # [B] -> [N]: where the sampled tokens of these rows stand in an `_N` column.
        at_N = ragged_index(self.sampled_len_B, index_B)
        columns: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            if axis_of(name) == "F":
                count_N = self[counts_of(name)].to(self.device)
                # [N] -> [F]: a token is to its entries what a row is to its tokens.
                where = ragged_index(count_N, at_N)
            else:
                where = index_B if axis_of(name) == "B" else at_N
            columns[name] = column[where.to(column.device)]
        return Batch(
            tokens_BT=self.tokens_BT[index_B, :width],
            prompt_len_B=self.prompt_len_B[index_B],
            length_B=self.length_B[index_B],
            sampled_BT=self.sampled_BT[index_B, :width],
            problems=[self.problems[row] for row in picked] if self.problems else [],
            texts=[self.texts[row] for row in picked] if self.texts else [],
            columns=columns,
        )

    @cached_property
    def _width_B(self) -> Tensor:
        """int64, how many positions of each row are text or marked as sampled."""
        position_T = torch.arange(1, self.tokens_BT.shape[1] + 1, device=self.device)
        # The last marked position of each row, counted from 1. `amax` refuses rows of width 0.
        marked_B = (self.sampled_BT * position_T).amax(1) if len(position_T) else self.length_B
        return torch.maximum(self.length_B, marked_B)

    def minibatches(self, number: int, *, seed: int, step: int) -> Iterator[Batch]:
        """The rows of a step in `number` equal shares, drawn by (seed, step); all of them for 1.

        Rows keep their order within a share; a share that would be empty is left out.
        """
        if number == 1:
            yield self
            return
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        order_B = torch.randperm(len(self), generator=generator)
        for share_B in order_B.tensor_split(number):
            if len(share_B):
                # Sorted, because neighbours with one prompt are read together.
                yield self.select(share_B.sort().values)

    def with_end_position(self) -> Batch:
        """The same rows with one position more, which counts as sampled and is never read.

        The hidden state that "predicts" it is that of the last token of the row, where a reward is
        read (`last_B`). Columns per token do not fit any more and are left out.
        """
        width = int(self.length_B.max()) + 1 if len(self) else 0
        tokens_BT = pad(self.tokens_BT, (0, max(0, width - self.tokens_BT.shape[1])))
        sampled_BT = pad(self.sampled_BT, (0, max(0, width - self.sampled_BT.shape[1])))
        # [B, T]: one more True in each row, right after its last token.
        sampled_BT = sampled_BT.scatter(1, self.length_B[:, None], True)
        columns = {name: c for name, c in self.columns.items() if axis_of(name) == "B"}
        return replace(self, tokens_BT=tokens_BT, sampled_BT=sampled_BT, columns=columns)

    def with_prompts(self, prompts: Sequence[Sequence[int] | None], pad_id: int = 0) -> Batch:
        """The same rows after other prompts, token ids; None leaves a row's own.

        The n-th sampled token stays the n-th: only the context before it differs. Columns stay.
        """
        starts, lengths = self.prompt_len_B.tolist(), self.length_B.tolist()
        tokens, marks = self.tokens_BT.tolist(), self.sampled_BT.tolist()
        rows, sampled, prompt_lens = [], [], []
        for row, mark, start, length, prompt in zip(
            tokens, marks, starts, lengths, prompts, strict=True
        ):
            own = row[:start] if prompt is None else list(prompt)
            rows.append([*own, *row[start:length]])
            sampled.append([0] * len(own) + mark[start:length])
            prompt_lens.append(len(own))
        tokens_BT, length_B = pad_rows(rows, pad_id)
        return replace(
            self,
            tokens_BT=tokens_BT,
            prompt_len_B=torch.tensor(prompt_lens, dtype=torch.int64),
            length_B=length_B,
            sampled_BT=pad_rows(sampled, 0)[0].bool(),
            # A dict of its own: a column added to one batch must not appear in the other.
            columns=dict(self.columns),
        )

    def without(self, *names: str) -> Batch:
        """The same rows without these columns, whether there or not."""
        columns = {name: c for name, c in self.columns.items() if name not in names}
        return replace(self, columns=columns)

    def to(self, device: torch.device) -> Batch:
        """The same batch with rows and columns on a device."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            prompt_len_B=self.prompt_len_B.to(device),
            length_B=self.length_B.to(device),
            sampled_BT=self.sampled_BT.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Minibatch:
    """The rows of one optimiser step that are learned from."""

    number: int
    """Which of the minibatches of its batch it is; others may have been left out."""
    rows: Batch
    count: float
    """What the summed loss is divided by."""
    num_tokens: int
    """Sampled tokens of all that it counts, also of rows that were left out."""


def split(
    batch: Batch, parts: int, *, seed: int, step: int, by_token: bool, per_kept: bool
) -> list[Minibatch]:
    """The minibatches of a step, of the rows that column `train_B` (bool) says; a minibatch without
    any is left out.

    All rows of the batch are split and counted, and then some are left out: a row that is left out
    counts as one whose loss is 0, so that leaving rows out saves their forward and backward pass
    and changes no other row's gradient. With `per_kept` they are left out first. The count is that
    of `posttrain.losses.ops.aggregation_weights`: sampled tokens where the mean is over tokens
    (`by_token`), else rows.
    """
    rows = batch.select(batch["train_B"]) if per_kept else batch
    if len(rows) == 0:
        return []
    found = []
    for number, part in enumerate(rows.minibatches(parts, seed=seed, step=step)):
        train_B = part["train_B"]
        kept = part if bool(train_B.all()) else part.select(train_B)
        if len(kept):
            count = float(part.num_tokens if by_token else len(part))
            rows_of_it = kept.without("train_B")
            found.append(
                Minibatch(number=number, rows=rows_of_it, count=count, num_tokens=part.num_tokens)
            )
    return found


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after another, with the columns that all of them have.

    Values of `group_B` are numbered on, so that groups of two batches stay apart.
    """
    if len(batches) == 1:
        return batches[0]
    width = max(batch.tokens_BT.shape[1] for batch in batches)
    shared = [name for name in batches[0].columns if all(name in batch for batch in batches)]
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in shared}
    if "group_B" in columns:
        columns["group_B"] = torch.cat(list(_numbered_on(batch["group_B"] for batch in batches)))

    def widened(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return Batch(
        tokens_BT=widened(batch.tokens_BT for batch in batches),
        prompt_len_B=torch.cat([batch.prompt_len_B for batch in batches]),
        length_B=torch.cat([batch.length_B for batch in batches]),
        sampled_BT=widened(batch.sampled_BT for batch in batches),
        problems=[problem for batch in batches for problem in batch.problems],
        texts=[text for batch in batches for text in batch.texts],
        columns=columns,
    )


def _numbered_on(groups: Iterable[Tensor]) -> Iterator[Tensor]:
    first = 0
    for group_B in groups:
        yield group_B + first
        first += int(group_B.max()) + 1


def _refuse_empty(prompt_lens: Iterable[int]) -> None:
    for number, length in enumerate(prompt_lens):
        if length == 0:
            raise ValueError(
                f"row {number} has no token before its first sampled one, which nothing would "
                f"predict; begin the row with a token, such as the one for the beginning of a text"
            )


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad token lists: `(tokens_BT, length_B)`, both int64."""
    length_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    num_columns = int(length_B.max()) if len(rows) else 0
    padded = [list(row) + [pad_id] * (num_columns - len(row)) for row in rows]
    # Without rows torch.tensor has a single axis; the shape is then [0, 0].
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), num_columns), length_B


def between(first_B: Tensor, end_B: Tensor, width: int) -> Tensor:
    """bool `[B, width]`, True at positions from `first_B` up to and without `end_B`."""
    position_T = torch.arange(width, device=first_B.device)
    # [T] against [B, 1] -> [B, T].
    return (position_T >= first_B[:, None]) & (position_T < end_B[:, None])


def axis_of(name: str) -> str:
    """`B`, `N` or `F`: what a column has entries for. Raises ValueError for another suffix."""
    # Only the first letter of a suffix: `_NE` has one entry for each sampled token.
    axis = name.rpartition("_")[2][:1]
    if axis not in ("B", "N", "F"):
        raise ValueError(
            f"column {name!r}: its suffix says what it has one entry for; _B for rows, _N for "
            "sampled tokens, _F for a ragged column"
        )
    return axis


def counts_of(name: str) -> str:
    """The column with the number of entries per token of a ragged one: `a_ids_F`, `a_count_N`."""
    return name.removesuffix("_F").rpartition("_")[0] + "_count_N"


def ragged_index(count_B: Tensor, index_B: Tensor) -> Tensor:
    """Where the entries of the rows `index_B` stand, row `b` having `count_B[b]` of them.

    Works for tokens of rows and for entries of tokens alike.
    """
    # Sums without the row itself: where its entries begin, in the column and in the result.
    start_B, count = count_B.cumsum(0) - count_B, count_B[index_B]
    offset_N = torch.arange(int(count.sum()), device=count.device)
    # 0, 1, 2 ... anew for each of the rows.
    offset_N -= (count.cumsum(0) - count).repeat_interleave(count)
    return start_B[index_B].repeat_interleave(count) + offset_N
