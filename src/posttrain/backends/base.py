"""The seam between a stage and the machinery: what a stage may ask of a learner, sampler or scorer.

A stage asks its context for them (`ctx.learner`, `ctx.sampler`, `ctx.scorer`) and calls only what
stands here, so another backend needs no change to any stage. `backends/local.py` is the reference
that every other backend must agree with.

A loss is a function at the top of a module and its settings, so that it can be sent to another
process as it is. There are two kinds: most losses need the log-probabilities of the sampled tokens
and nothing else (`TokenLoss`); the exact divergence, values and rewards work from hidden states and
the output head (`HeadLoss`). Either returns sums over tokens or rows, never means: the learner
divides once by the count of the whole step, so the split into forward passes changes nothing but
rounding. So one step may also be shared by several processes: each adds up the gradients of some
rows, divided by the counts of all; gradients and metrics are summed; and each takes the same step.

Models may live in other processes. Then what goes in and comes out is a copy: weights get from a
learner to another model by `sync`, and only there.

Legend: B rows, N sampled tokens (row after row), D hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from posttrain.backends.budget import Part
from posttrain.losses.divergence import ClosedHead
from posttrain.rl.batch import Batch

if TYPE_CHECKING:  # it imports this module, through checkpoint.py
    from posttrain.backends.chat import Chat

Metrics = dict[str, Tensor]
"""Detached sums over tokens or rows; they add up when a batch is split."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output projection of a model: `logits = hidden @ weight_VD.T + bias_V`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """See `ClosedHead.shape`."""
        vocabulary, width = self.weight_VD.shape
        return vocabulary, width

    @property
    def dtype(self) -> torch.dtype:
        """See `ClosedHead.dtype`."""
        return self.weight_VD.dtype

    @property
    def has_bias(self) -> bool:
        """See `ClosedHead.has_bias`."""
        return self.bias_V is not None

    def open(self) -> Head:
        """See `HeadSource.open`: there is nothing to be read."""
        return self

    def detached(self) -> Head:
        """The same as a constant, so that it can be sent elsewhere."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return Head(weight_VD=self.weight_VD.detach(), bias_V=bias_V)


class HeadSource(ClosedHead, Protocol):
    """A `Head`, or what is sent in its place and reads it where it is used. Can be pickled."""

    def open(self) -> Head:
        """The head as a constant; it goes with the last that holds it."""
        ...


@dataclass(frozen=True)
class TokenLoss:
    """A loss of the log-probabilities and entropies of the sampled tokens."""

    function: Callable[[Any, Tensor, Tensor, Batch], tuple[Tensor, Metrics]]
    """`function(settings, logp_N, entropy_N, batch) -> (loss sum, metric sums)`, at the top of a
    module; `logp_N` carries the gradient, `entropy_N` does not. Every tensor and column of the
    batch is on the device of `logp_N`."""
    settings: Any = None
    """The first argument of `function`; can be pickled."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax, as they were for the sample."""


@dataclass(frozen=True)
class HeadLoss:
    """A loss of the hidden states that predict the sampled tokens, and of the output head."""

    function: Callable[[Any, Tensor, Head, Batch], tuple[Tensor, Metrics]]
    """`function(settings, hidden_ND, head, batch) -> (loss sum, metric sums)`, at the top of a
    module; `hidden_ND` and `head` carry the gradient."""
    settings: Any = None
    """The first argument of `function`; can be pickled. Tensors in it, such as the heads of
    teachers, are constants."""


Loss = TokenLoss | HeadLoss


@dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """A further loss, on rows of its own, in one optimiser step."""

    name: str
    """Its metrics are `name/metric`."""
    batch: Batch
    loss: Loss
    count: float
    weight: float = 1.0
    """`weight * sum(loss) / count` is added to what is descended."""
    group_rows: int = 1

    def share(self, loss_sum: Tensor) -> Tensor:
        """What some rows add to the number that is descended; without a name it is the main
        loss."""
        if not self.name:
            return loss_sum / self.count
        return loss_sum * (self.weight / self.count)


class Sampling(Protocol):
    """One call to a sampler while it goes on."""

    def __iter__(self) -> Iterator[Tensor]:
        """Sample to the end; yields `row_B`, the rows that have just ended, as they end.

        On the local backend, which rows come together depends on what is sampled and on nothing
        else.
        """
        ...

    def batch(self, row_B: Tensor | None = None) -> Batch:
        """The rows `row_B`, all of which have ended, or all rows once the iteration is over.

        Columns: `sampler_logp_N` (float32, under the distribution that was sampled from),
        `finished_B` (bool, True where a stop token ended the row, not the limit) and, with `top_p`
        below 1, the nucleus of every token: `nucleus_count_N` and `nucleus_ids_F`.
        """
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

    @property
    def chat(self) -> Chat:
        """Text to tokens of the model, and back."""
        ...

    def sync(self, policy: Learner) -> None:
        """Sample from the present weights of `policy` from now on."""
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
        """`group_size` responses to each prompt, in the order of the prompts, row by row as they
        end.

        `temperature` 0 is greedy decoding. With `top_p` below 1 each token is drawn from the fewest
        likeliest tokens with that probability together. Log-probs are those of the distribution
        that was sampled from (temperature and `top_p` included; at temperature 0, which goes
        without `top_p`, those of the model itself). Raises ConfigError if a prompt leaves no room
        for a response.
        """
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> Batch:
        """The same as `stream`, when all rows have ended."""
        ...


class Scorer(Protocol):
    """Reads a model that is not learning at the positions that predict the sampled tokens."""

    @property
    def chat(self) -> Chat:
        """Text to tokens of the model, and back."""
        ...

    @property
    def head(self) -> Head:
        """The output layer; of a model with a score, such as a reward model, that of one row.

        As it is now: of a model that learns or is synced, ask for it again.
        """
        ...

    @property
    def head_at_rest(self) -> HeadSource:
        """The same for the settings of a loss, without waking the model: where it can rest in a
        file, what reads it from there."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether nothing learns in it: no weight asks for a gradient or is a learner's."""
        ...

    def rest(self) -> None:
        """Give the memory of the weights back until the next call that reads them, which has the
        very same ones. Nobody may be reading; a second time does nothing, and neither does it
        where the weights are a learner's."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """`hidden_ND`, the last hidden states that predict the sampled tokens. No gradient.

        On the device of `head`; rows are on the CPU.
        """
        ...

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """`logp_N` of the sampled tokens, on the CPU; over the nucleus where the batch has one."""
        ...

    def top_k(self, batch: Batch, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`(ids_NK, logp_NK)`, the `k` likeliest tokens at each position of a sampled token.

        On the device of `head`.
        """
        ...

    def restrict(self, absent: Collection[int]) -> None:
        """Give these ids no probability from now on: another model of the stage has no token for
        them. Text may still have them, see `Chat.refuse`."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """`score_N`, the number of a model with a score at each position, float32, on the CPU."""
        ...

    def sync(self, policy: Learner) -> None:
        """Take over the present weights of `policy`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The weights by name, for a step checkpoint of a stage that calls `sync`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        ...


class Learner(Protocol):
    """Holds the trainable model and its optimiser."""

    @property
    def chat(self) -> Chat:
        """Text to tokens of the model, and back."""
        ...

    def update(
        self,
        batch: Batch,
        loss: Loss,
        *,
        count: float,
        lr: float,
        group_rows: int = 1,
        aux: Sequence[AuxLoss] = (),
    ) -> dict[str, float]:
        """One optimiser step on `sum(loss) / count`, plus the losses in `aux`, clipped as one;
        returns the metric sums and `grad_norm`.

        The split into forward passes is the learner's business and changes nothing but rounding;
        each block of `group_rows` adjacent rows reaches the loss together and in order.
        """
        ...

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """`logp_N` of the sampled tokens under the current weights, on the CPU. No gradient."""
        ...

    def restrict(self, absent: Collection[int]) -> None:
        """As `Scorer.restrict`, and the same for every sampler and scorer of this learner that is
        made afterwards."""
        ...

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """Take these values for the updates that follow."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser moments and moving average by name, for a step checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; the next update is then as if nothing had happened. Each
        tensor is asked for once, so that a file may be read one by one."""
        ...

    def hold(self, read: Event) -> None:
        """Before the next change of what `state` gave, wait for this event: somebody reads it."""
        ...

    def finish(self) -> None:
        """For the end of a stage: where there is a moving average it takes the place of the
        weights, in what is saved and in what is read. There is no update afterwards."""
        ...

    def save(self, out: Path) -> None:
        """Write the model to a directory, in the form that transformers reads."""
        ...

    def num_parameters(self) -> int:
        """How many numbers the model has, frozen ones among them."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """How an adapter begins; see `posttrain.LoRA` for what each means."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("all-linear",)
    dora: bool = False
    rslora: bool = False
    seed: int = 0
    """Of the numbers that its first matrices begin with."""


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """What a learner is made with. AdamW; see the settings of a stage for what each means."""

    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    dtype: torch.dtype = torch.float32
    """Type in which the model computes; see `master` for the weights that learn."""
    trainable: tuple[str, ...] = ("*",)
    """Globs of parameter names; the weights that none of them matches stay as they are."""
    ema: float | None = None
    save_dtype: str = "base"
    """Type of the numbers that `save` writes, such as "bfloat16"; "base": those of the files of the
    checkpoint, tensor by tensor."""
    master: str = "float32"
    """What a step changes: "float32" weights, or with "stochastic" the very weights of type `dtype`
    that compute, rounded up or down at random."""
    states: str = "float32"
    """Type of the optimiser's moments, "float32" or "int8"."""
    seed: int = 0
    """What is drawn to round follows from it."""
    lora: LoraSettings | None = None
    """Learn an adapter beside the weights, which stay as they are; `save` then writes the adapter
    alone. A checkpoint that is an adapter with these settings goes on with it."""


class Backend(Protocol):
    """Makes learners, samplers and scorers. A stage gets them from its context, never from here."""

    exact: bool
    """Whether the same call of the same model on the same rows gives the same bits every time."""

    def learner(self, checkpoint: Path, settings: LearnerSettings, *, scalar: bool) -> Learner:
        """A learner on a checkpoint; `scalar` for a model with a score in place of logits.

        Raises ConfigError for a checkpoint that cannot be read, or a glob of `trainable` that
        matches no parameter.
        """
        ...

    def sampler(self, source: Path | Learner, *, dtype: torch.dtype) -> Sampler:
        """A sampler of a checkpoint, or of a learner's present weights.

        `dtype` is what a checkpoint is to be computed in; a learner computes as it was told.
        """
        ...

    def scorer(self, source: Path | Learner, *, dtype: torch.dtype, scalar: bool) -> Scorer:
        """A frozen model of a checkpoint, or what a learner's model is at each call.

        The latter reads the learner's own weights without a copy. `dtype` and `scalar` are for a
        checkpoint, as those of a sampler and of a learner.
        """
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """What its models take of memory, by estimation, for messages; nothing if it cannot
        tell."""
        ...

    def close(self) -> None:
        """End what the backend has started, such as processes; its models serve nobody any more."""
        ...
