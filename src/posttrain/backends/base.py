"""The seam between a stage and the machinery: three Protocols that a stage may call.

`backends/local.py` and `backends/sampler.py` are the reference that any other backend must agree
with; a stage names them in one place, where it builds them, and calls only what stands here.

Legend: N flat response tokens (row after row), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.rl.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output projection of a model: `logits = hidden @ weight_VD.T + bias_V`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows of one forward pass: which they are in the batch, and the rollouts themselves.

    Both are on the learner's device.
    """

    index_B: Tensor
    """int64, the rows' positions in the whole batch."""
    rollouts: Rollouts


Metrics = dict[str, Tensor]
LossFunction = Callable[[Tensor, Head, MicroBatch], tuple[Tensor, Metrics]]
"""`(hidden_ND, head, micro_batch) -> (loss sum, metric sums)`. Both are sums, never means."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A further loss, on rows of its own, in one optimiser step."""

    name: str
    """Its metrics are `name/metric`."""
    rollouts: Rollouts
    loss: LossFunction
    count: float
    weight: float = 1.0
    """`weight * sum(loss) / count` is added to what is descended."""
    group_rows: int = 1


class Sampling(Protocol):
    """One call to a sampler while it goes on."""

    def __iter__(self) -> Iterator[Tensor]:
        """Sample to the end; yields `row_B`, the rows that have just ended, as they end.

        Which rows come together depends on what is sampled and on nothing else.
        """
        ...

    def rollouts(self, row_B: Tensor | None = None) -> Rollouts:
        """The rows `row_B`, all of which have ended, or all rows once the iteration is over."""
        ...

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """Response token ids of the rows `row_B`, all of which have ended; stop token included."""
        ...

    def num_tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows of one group, all of which have ended; their prompt counts once."""
        ...

    def finished(self, row_B: Tensor) -> Tensor:
        """bool for each of the rows `row_B`: whether a stop token ended it, not the limit."""
        ...


class Sampler(Protocol):
    """Draws responses."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Rollouts:
        """`group_size` responses to each prompt, in the order of the prompts.

        `temperature` 0 is greedy decoding. With `top_p` below 1 each token is drawn from the fewest
        likeliest tokens with that probability together, and rollouts carry these as `kept`.
        Log-probs in the result are those of the distribution that was sampled from (temperature and
        `top_p` included; at temperature 0, which goes without `top_p`, those of the model itself).
        """
        ...

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Sampling:
        """The same as `sample`, row by row as they end."""
        ...


class Scorer(Protocol):
    """Reads a frozen model at the positions that predict response tokens."""

    head: Head

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """`hidden_ND`, the last hidden states that predict the response tokens. No gradient.

        On the device of `head`; rollouts are on the CPU.
        """
        ...


class Learner(Protocol):
    """Holds the trainable model and its optimiser."""

    device: torch.device
    """Where a loss is computed; its constants must be there, rollouts are on the CPU."""

    def update(
        self,
        rollouts: Rollouts,
        loss: LossFunction,
        *,
        count: float,
        lr: float,
        group_rows: int = 1,
        also: Sequence[Part] = (),
    ) -> dict[str, float]:
        """One optimiser step on `sum(loss) / count`, plus the parts in `also`, clipped as one;
        returns the metric sums and `grad_norm`.

        The split into micro-batches is the learner's business and changes nothing but rounding;
        each block of `group_rows` adjacent rows reaches `loss` together and in order.
        """
        ...

    def logprobs(self, rollouts: Rollouts, *, temperature: float) -> Tensor:
        """`logp_N` of the response tokens under the current weights, on the CPU. No gradient."""
        ...
