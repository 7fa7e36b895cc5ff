"""A second backend: models in other processes behind pipes, and rows split over two learners.

It proves that stages ask for nothing but what `posttrain.backends.base` says. Everything that goes
through a pipe is pickled, so nothing is shared with the stage: no tensor, no model, no closure.

- Two processes learn. Each has the whole model and adds up the gradients of its share of the rows;
  they are summed here, and each process takes the same step.
- One process samples, from weights of its own that `sync` sends.
- One process scores checkpoints. What a learner's model says is asked of the first learner.

Inside each process the local backend computes. Processes start when they are first needed.

Legend: B rows, N sampled tokens, D hidden size, K top-k.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import (
    AuxLoss,
    Head,
    HeadSource,
    Learner,
    LearnerSettings,
    Loss,
    Metrics,
)
from posttrain.backends.budget import Part
from posttrain.backends.chat import Chat
from posttrain.backends.local import LocalBackend, LocalLearner, LocalSampler, LocalScorer
from posttrain.rl.batch import Batch

NUM_LEARNERS = 2


@dataclass(frozen=True)
class Kept:
    """Stands for an object that the process at the other end keeps."""

    number: int


def serve(connection: Connection) -> None:
    """The loop of a process: call the function that comes with its arguments, send what it returns.

    In place of a `Kept` the function is given the object. Ends when the pipe is closed.
    """
    torch.set_num_threads(1)
    kept: list[Any] = []
    while True:
        try:
            function, args, settings, keep = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        args = [kept[arg.number] if isinstance(arg, Kept) else arg for arg in args]
        try:
            answer = function(*args, **settings)
            if keep:
                kept.append(answer)
                answer = Kept(len(kept) - 1)
            reply = pickle.dumps((answer, None))
        except Exception as error:
            reply = pickle.dumps((None, error))
        connection.send_bytes(reply)


class Process:
    """A process that calls functions for this one."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        # Stages ask from several threads.
        self.lock = Lock()

    def send(self, function: Callable[..., Any], *args: Any, keep: bool, **settings: Any) -> None:
        """Begin a call. A tensor is copied as it is pickled; `Connection.send` would share it."""
        self.connection.send_bytes(pickle.dumps((function, args, settings, keep)))

    def receive(self) -> Any:
        """The end of a call: what the function returned. Raises what it raised."""
        answer, error = pickle.loads(self.connection.recv_bytes())
        if error is not None:
            raise error
        return answer

    def call(
        self, function: Callable[..., Any], *args: Any, keep: bool = False, **settings: Any
    ) -> Any:
        """What `function(*args, **settings)` returns there, or with `keep` what stands for it."""
        with self.lock:
            self.send(function, *args, keep=keep, **settings)
            return self.receive()


class Processes:
    """The processes of a backend; each starts when it is first asked for."""

    def __init__(self) -> None:
        self.started: list[Process] = []

    @cached_property
    def learners(self) -> list[Process]:
        """Those that learn."""
        return [self._start() for _ in range(NUM_LEARNERS)]

    @cached_property
    def sampler(self) -> Process:
        """The one that samples."""
        return self._start()

    @cached_property
    def scorer(self) -> Process:
        """The one that scores."""
        return self._start()

    def _start(self) -> Process:
        self.started.append(Process())
        return self.started[-1]

    def close(self) -> None:
        """End all that were started."""
        for process in self.started:
            process.connection.close()
        for process in self.started:
            process.process.join()


class PipeBackend:
    """A `Backend` whose models live in other processes."""

    exact = True

    def __init__(
        self,
        *,
        device: str = "cpu",
        compile: bool = False,
        workers: object = None,
        processes: Processes | None = None,
    ) -> None:
        """`processes` that are given stay when the backend is closed."""
        assert (device, compile) == ("cpu", False), "a test of the seam, and of nothing else"
        self.own = Processes()
        self.processes = self.own if processes is None else processes

    def learner(self, checkpoint: Path, settings: LearnerSettings, *, scalar: bool) -> PipeLearner:
        """See `Backend.learner`."""
        return PipeLearner(self.processes.learners, checkpoint, settings, scalar)

    def sampler(self, source: Path | Learner, *, dtype: torch.dtype) -> PipeSampler:
        """See `Backend.sampler`."""
        if isinstance(source, Path):
            return PipeSampler(self.processes.sampler, source, dtype)
        assert isinstance(source, PipeLearner)
        sampler = PipeSampler(self.processes.sampler, source.checkpoint, source.settings.dtype)
        sampler.sync(source)
        sampler.process.call(restrict, sampler.kept, source.absent)
        return sampler

    def scorer(self, source: Path | Learner, *, dtype: torch.dtype, scalar: bool) -> PipeScorer:
        """See `Backend.scorer`."""
        if isinstance(source, Path):
            process = self.processes.scorer
            return PipeScorer(process, process.call(make_scorer, source, dtype, scalar, keep=True))
        assert isinstance(source, PipeLearner)
        first = source.processes[0]
        return PipeScorer(first, first.call(scorer_of, source.kept[0], keep=True))

    @property
    def parts(self) -> Sequence[Part]:
        """See `Backend.parts`."""
        return ()

    def close(self) -> None:
        """See `Backend.close`."""
        self.own.close()


class PipeLearner:
    """A `Learner` in several processes that share the rows of every update."""

    def __init__(
        self,
        processes: Sequence[Process],
        checkpoint: Path,
        settings: LearnerSettings,
        scalar: bool,
    ) -> None:
        self.processes, self.checkpoint, self.settings = processes, checkpoint, settings
        made_with = (checkpoint, settings, scalar)
        self.kept = [process.call(make_learner, *made_with, keep=True) for process in processes]
        self.chat: Chat = self._first(chat_of)
        self.absent: set[int] = set()

    def restrict(self, absent: Collection[int]) -> None:
        """See `Learner.restrict`."""
        self.absent |= set(absent)
        self._all(restrict, absent)
        self.chat.restrict(absent)

    def _first(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        return self.processes[0].call(function, self.kept[0], *args, **settings)

    def _each(
        self, function: Callable[..., Any], shares: Sequence[tuple[Any, ...]], **settings: Any
    ) -> list[Any]:
        """Call a function in all processes at once, with a share of the arguments each."""
        with ExitStack() as stack:
            for process in self.processes:
                stack.enter_context(process.lock)
            for process, kept, share in zip(self.processes, self.kept, shares, strict=True):
                process.send(function, kept, *share, keep=False, **settings)
            return [process.receive() for process in self.processes]

    def _all(self, function: Callable[..., Any], *args: Any, **settings: Any) -> list[Any]:
        """Call a function in all processes at once, with the same arguments."""
        return self._each(function, [args] * len(self.processes), **settings)

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
        """See `Learner.update`."""
        further = [
            [replace(part, batch=rows) for rows in split(part.batch, part.group_rows)]
            for part in aux
        ]
        shares = [
            (rows, loss, [parts[number] for parts in further])
            for number, rows in enumerate(split(batch, group_rows))
        ]
        sums: dict[str, float] = {}
        total: list[Tensor | None] = []
        for metrics, gradients in self._each(
            accumulate, shares, count=count, group_rows=group_rows
        ):
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            total = [
                plus(*pair)
                for pair in zip(total or [None] * len(gradients), gradients, strict=True)
            ]
        norms = self._all(step, total, lr)
        assert len(set(norms)) == 1, "every process takes the same step"
        return sums | {"grad_norm": norms[0]}

    def weights(self) -> list[Tensor]:
        """What it computes with, for a sampler or scorer to take over."""
        weights: list[Tensor] = self._first(weights_of)
        return weights

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """See `Learner.logprobs`."""
        shares = [(rows,) for rows in split(batch, 1)]
        return torch.cat(self._each(LocalLearner.logprobs, shares, temperature=temperature))

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        """See `Learner.set_hyperparameters`."""
        self._all(
            LocalLearner.set_hyperparameters,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
        )

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`; the processes have the same."""
        tensors: dict[str, Tensor] = self._first(LocalLearner.state)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Learner.restore`."""
        self._all(LocalLearner.restore, dict(tensors))

    def hold(self, read: Event) -> None:
        """See `Learner.hold`; what `state` gave are copies."""

    def finish(self) -> None:
        """See `Learner.finish`."""
        self._all(LocalLearner.finish)

    def save(self, out: Path) -> None:
        """See `Learner.save`."""
        self._first(LocalLearner.save, out)

    def num_parameters(self) -> int:
        """See `Learner.num_parameters`."""
        return int(self._first(LocalLearner.num_parameters))


class PipeSampler:
    """A `Sampler` in a process of its own, with weights of its own."""

    def __init__(self, process: Process, checkpoint: Path, dtype: torch.dtype) -> None:
        self.process = process
        self.kept: Kept = process.call(make_sampler, checkpoint, dtype, keep=True)
        self.chat: Chat = process.call(chat_of, self.kept)

    def sync(self, policy: Learner) -> None:
        """See `Sampler.sync`."""
        assert isinstance(policy, PipeLearner)
        self.process.call(take_over, self.kept, policy.weights())

    def stream(self, prompts: Sequence[Sequence[int]], **settings: Any) -> PipeSampling:
        """See `Sampler.stream`; all rows end at once."""
        return PipeSampling(self.sample(prompts, **settings), settings["group_size"])

    def sample(self, prompts: Sequence[Sequence[int]], **settings: Any) -> Batch:
        """See `Sampler.sample`."""
        batch: Batch = self.process.call(LocalSampler.sample, self.kept, prompts, **settings)
        return batch


class PipeSampling:
    """A `Sampling` of rows that have all come already."""

    def __init__(self, rows: Batch, group_size: int) -> None:
        self.rows, self.group_size = rows, group_size

    def __iter__(self) -> Iterator[Tensor]:
        """See `Sampling.__iter__`."""
        yield torch.arange(len(self.rows))

    def batch(self, row_B: Tensor | None = None) -> Batch:
        """See `Sampling.batch`."""
        return self.rows if row_B is None else self.rows.select(row_B)

    def responses(self, row_B: Tensor) -> list[list[int]]:
        """See `Sampling.responses`."""
        return self.rows.select(row_B).responses()

    def num_tokens(self, rows: Sequence[int]) -> int:
        """See `Sampling.num_tokens`."""
        prompt = int(self.rows.prompt_len_B[rows[0]])
        return prompt + int(self.rows.sampled_len_B[list(rows)].sum())

    def finished(self, row_B: Tensor) -> Tensor:
        """See `Sampling.finished`."""
        return self.rows["finished_B"][row_B]


class PipeScorer:
    """A `Scorer` in another process."""

    def __init__(self, process: Process, kept: Kept) -> None:
        self.process, self.kept = process, kept
        self.chat: Chat = self._ask(chat_of)

    def _ask(self, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        return self.process.call(function, self.kept, *args, **settings)

    @property
    def head(self) -> Head:
        """See `Scorer.head`."""
        head: Head = self._ask(head_of)
        return head

    @property
    def head_at_rest(self) -> HeadSource:
        """See `Scorer.head_at_rest`; the learners see the same files."""
        head: HeadSource = self._ask(head_at_rest_of)
        return head

    @property
    def frozen(self) -> bool:
        """See `Scorer.frozen`."""
        return bool(self._ask(is_frozen))

    def rest(self) -> None:
        """See `Scorer.rest`."""
        self._ask(LocalScorer.rest)

    def hidden(self, batch: Batch) -> Tensor:
        """See `Scorer.hidden`."""
        hidden_ND: Tensor = self._ask(LocalScorer.hidden, batch)
        return hidden_ND

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """See `Scorer.logprobs`."""
        logp_N: Tensor = self._ask(LocalScorer.logprobs, batch, temperature=temperature)
        return logp_N

    def top_k(self, batch: Batch, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `Scorer.top_k`."""
        ids_NK, logp_NK = self._ask(LocalScorer.top_k, batch, k, temperature=temperature)
        return ids_NK, logp_NK

    def scores(self, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        score_N: Tensor = self._ask(LocalScorer.scores, batch)
        return score_N

    def restrict(self, absent: Collection[int]) -> None:
        """See `Scorer.restrict`."""
        self._ask(restrict, absent)
        self.chat.restrict(absent)

    def sync(self, policy: Learner) -> None:
        """See `Scorer.sync`."""
        assert isinstance(policy, PipeLearner)
        self._ask(take_over, policy.weights())

    def state(self) -> dict[str, Tensor]:
        """See `Scorer.state`."""
        tensors: dict[str, Tensor] = self._ask(LocalScorer.state)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Scorer.restore`."""
        self._ask(LocalScorer.restore, dict(tensors))


def split(batch: Batch, group_rows: int) -> list[Batch]:
    """The rows of a batch for each learner; blocks of `group_rows` stay whole."""
    blocks_G = torch.arange(len(batch)).split(group_rows) if len(batch) else ()
    number_G = torch.arange(len(blocks_G)).tensor_split(NUM_LEARNERS)
    none = torch.empty(0, dtype=torch.int64)
    return [batch.select(torch.cat([none, *(blocks_G[g] for g in part)])) for part in number_G]


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients; None is that of a weight that no row has touched."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


# What the processes do. `LocalLearner.save` and the like are called as they are.


def make_learner(checkpoint: Path, settings: LearnerSettings, scalar: bool) -> LocalLearner:
    return LocalBackend().learner(checkpoint, settings, scalar=scalar)


def make_sampler(checkpoint: Path, dtype: torch.dtype) -> LocalSampler:
    return LocalBackend().sampler(checkpoint, dtype=dtype)


def make_scorer(checkpoint: Path, dtype: torch.dtype, scalar: bool) -> LocalScorer:
    return LocalBackend().scorer(checkpoint, dtype=dtype, scalar=scalar)


def scorer_of(learner: LocalLearner) -> LocalScorer:
    return LocalBackend().scorer(learner)


def chat_of(model: LocalLearner | LocalSampler | LocalScorer) -> Chat:
    return model.chat


def restrict(model: LocalLearner | LocalSampler | LocalScorer, absent: Collection[int]) -> None:
    model.chat.restrict(absent)


def head_of(scorer: LocalScorer) -> Head:
    return scorer.head


def head_at_rest_of(scorer: LocalScorer) -> HeadSource:
    return scorer.head_at_rest


def is_frozen(scorer: LocalScorer) -> bool:
    return scorer.frozen


def accumulate(
    learner: LocalLearner, rows: Batch, loss: Loss, aux: Sequence[AuxLoss], **settings: Any
) -> tuple[Metrics, list[Tensor | None]]:
    metrics = learner.accumulate(rows, loss, aux=aux, **settings)
    return metrics, [parameter.grad for parameter in learner.parameters]


def step(learner: LocalLearner, gradients: Sequence[Tensor | None], lr: float) -> float:
    for parameter, gradient in zip(learner.parameters, gradients, strict=True):
        parameter.grad = gradient
    return learner.step(lr)


def weights_of(learner: LocalLearner) -> list[Tensor]:
    return [parameter.detach() for parameter in learner.model.parameters()]


@torch.no_grad()
def take_over(reader: LocalSampler | LocalScorer, weights: Sequence[Tensor]) -> None:
    if isinstance(reader, LocalScorer):
        reader.will_change()
    for parameter, weight in zip(reader.model.parameters(), weights, strict=True):
        parameter.copy_(weight)
