"""What a running stage has: its inputs, its models, its steps, its log and its checkpoints.

Models come from a backend that the stage never names: `ctx.learner`, `ctx.sampler`, `ctx.scorer`.

A step checkpoint holds weights and optimiser moments; there is no random state to keep, because
every stage draws from generators seeded by (seed, step). That is why a resumed stage ends with the
same bits as one that was never stopped.

A thread of its own writes the tensors, one checkpoint at a time; the loop goes on meanwhile, up to
where it would change what is being written (`step_state.py`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain.algorithms import LoRA
from posttrain.backends.base import (
    Backend,
    Learner,
    LearnerSettings,
    LoraSettings,
    Sampler,
    Scorer,
)
from posttrain.backends.prompting import in_modes
from posttrain.engine.atomic import fsync
from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.graph import named
from posttrain.engine.jsonl import read_jsonl
from posttrain.engine.work import METRICS, STEP, add_warning, write_step
from posttrain.schedules import History
from posttrain.stages.samples import SampleLog
from posttrain.stages.settings.base import Training
from posttrain.stages.step_state import CheckpointGroup, Resumable, SavedTensors, to_write
from posttrain.values import Settings

if TYPE_CHECKING:
    from posttrain.backends.chat import Chat

SECONDS_BETWEEN_CHECKPOINTS = 10.0


S = TypeVar("S", bound=Settings)


@runtime_checkable
class Replayed(Protocol):
    """Something whose state follows from the settings of the steps that are done, such as what was
    drawn from the data."""

    def replay(self, settings: Any, done: int, total: int, history: History) -> None:
        """Become what it was after `done` of `total` steps."""
        ...


def _lora(settings: Training) -> LoraSettings | None:
    """How an adapter begins, where a stage trains one."""
    lora: LoRA | None = getattr(settings, "lora", None)
    if lora is None:
        return None
    seed: int = getattr(settings, "seed", 0)
    targets = (lora.targets,) if isinstance(lora.targets, str) else tuple(lora.targets)
    return LoraSettings(**dict(lora) | {"targets": targets}, seed=seed)


class Context:
    """The job's inputs and outputs, seen from inside the stage."""

    def __init__(
        self,
        *,
        name: str,
        work: Path,
        inputs: Mapping[str, str],
        threads: int,
        backend: Backend | None = None,
        workers: ThreadPoolExecutor | None = None,
        runtime: Mapping[str, Any] | None = None,
        sample_every: int | None = None,
    ) -> None:
        """`backend` makes the models of the stage; a stage that has none needs none. `workers` are
        threads for what can be done beside each other, where the stage has cores to spare.
        `runtime` is what its node says and is no part of its identity; `sample_every` is for
        `samples`."""
        self.name = name
        self.runtime = dict(runtime or {})
        self._backend = backend
        self.workers = workers
        self.work = work
        self.out = work / "out"
        self.samples = SampleLog(self.out, sample_every)
        """What people read of what the stage does, every some steps."""
        self.inputs = {edge: Path(path) for edge, path in inputs.items()}
        self.threads = threads
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        """Of the newest step, also where a resumed stage finds no step left to do."""
        self.facts: dict[str, Any] = {}
        """What the stage adds to the provenance of what it makes (JSON)."""
        self.kept: dict[str, Any] = {}
        """What its step checkpoint keeps beside tensors (JSON); a resumed stage finds it again."""
        self._history: dict[str, list[float]] = {}
        self._seconds = 0.0
        self._began = time.monotonic()
        self._saved = time.monotonic()
        self._metrics = work / METRICS
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        """The checkpoint that is being written."""
        self.resources = ExitStack()
        """What the stage opened; `close` closes it, and the backend last."""
        if backend is not None:
            self.resources.callback(backend.close)
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def backend(self) -> Backend:
        """What makes learners, samplers and scorers."""
        assert self._backend is not None, f"stage {self.name!r} was given no backend"
        return self._backend

    def learner(
        self,
        settings: Training,
        source: str | Path = "start",
        *,
        scalar: bool = False,
        whole: bool = False,
    ) -> Learner:
        """A learner on the checkpoint of an edge or a directory, as the settings say.

        `scalar` is for a model with a score in place of logits (a reward model, a critic); `whole`
        lets all weights learn, without a moving average. Raises ConfigError for a checkpoint that
        cannot be read, or a glob of `trainable` that matches no parameter.
        """
        optimizer = settings.optimizer
        made_with = LearnerSettings(
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            dtype=getattr(torch, settings.precision),
            trainable=("*",) if whole else tuple(settings.trainable),
            ema=None if whole else optimizer.ema,
            save_dtype=settings.save_dtype,
            master=optimizer.master,
            states=optimizer.states,
            seed=settings.seed,
            lora=None if whole else _lora(settings),
        )
        return self.backend.learner(self._directory(source), made_with, scalar=scalar)

    def sampler(self, source: str | Path | Learner, *, precision: str = "float32") -> Sampler:
        """A sampler of the checkpoint of an edge or a directory, or of a learner's weights."""
        dtype = getattr(torch, precision)
        return self.backend.sampler(self._directory(source), dtype=dtype)

    def scorer(
        self, source: str | Path | Learner, *, precision: str = "float32", scalar: bool = False
    ) -> Scorer:
        """A frozen model of an edge or a directory, or what a learner's model is at each call."""
        dtype = getattr(torch, precision)
        return self.backend.scorer(self._directory(source), dtype=dtype, scalar=scalar)

    def chat(self, edge: str) -> Chat:
        """Text to tokens of the model of an edge, and back, without loading its weights."""
        # It imports transformers, which stages without a model do without.
        from posttrain.backends.checkpoint import read_chat

        return read_chat(self.inputs[edge])

    def _directory(self, source: Any) -> Any:
        return self.inputs[source] if isinstance(source, str) else source

    def steps(
        self, settings: S, total: int, *, replayed: Sequence[Replayed] = (), **parts: Any
    ) -> Iterator[tuple[int, S]]:
        """The 0-based steps that are left of `total`, with the settings of each step.

        Before the first one the stage goes on from its newest checkpoint: `parts`, things with a
        state by name, get theirs back, and what is `replayed` goes through the steps that are done.
        After every step the state is saved if the last time is long enough ago. None as a part is
        left out.
        """
        parts = {name: part for name, part in parts.items() if part is not None}
        group = CheckpointGroup(parts)
        # The history of metrics comes first: schedules of the steps gone through may read it.
        first = self.resume(group)
        self.samples.resume(first)
        for part in replayed:
            part.replay(settings, first, total, self.history)
        for step in range(first, total):
            self._check_logged(settings, step)
            step_settings = settings.at(step, total, self.history)
            optimizer = getattr(step_settings, "optimizer", None)
            for part in parts.values():
                # A reference has a state, but no optimiser.
                if optimizer is not None and hasattr(part, "set_hyperparameters"):
                    part.set_hyperparameters(
                        weight_decay=optimizer.weight_decay,
                        max_grad_norm=optimizer.max_grad_norm,
                    )
            yield step, step_settings
            self.checkpoint(step + 1, group)

    def _check_logged(self, settings: Settings, step: int) -> None:
        """Raise ConfigError for a schedule that reads a metric which the stage does not log."""
        if step == 0 or not getattr(settings, "LOGS_ALL", True):
            return
        for path, schedule in settings.schedules.items():
            metric = schedule.metric
            # What is logged by domain, with a slash, need not be there in every step.
            if metric is not None and "/" not in metric and not self.history(metric):
                raise ConfigError(
                    f"the schedule of {path} reads the metric {metric!r}, which this stage does "
                    "not log; choose one of its metrics (docs/metrics.md), such as loss"
                )

    def close(self) -> None:
        """Close what the stage opened, and its backend, also when it failed."""
        self.resources.close()

    @property
    def domains(self) -> dict[str, Path]:
        """Domain name to the artifact with its problems, by name."""
        # By name, because a domain's position is part of the seed of what is drawn from it.
        return dict(sorted(named(self.inputs, "domains").items()))

    def problems(self, domain: str, split: str, modes: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The problems of one split of a domain, each in each of `modes` (`in_modes`).

        Of the training split, those that the stage of the edge `prompts` has chosen, if there is
        one. Raises ConfigError where there is none.
        """
        path = self.domains[domain] / f"{split}.jsonl"
        chosen = split == "train" and "prompts" in self.inputs
        if chosen:
            path = self.inputs["prompts"] / "prompts.jsonl"
        rows = list(read_jsonl(path))
        if chosen:
            rows = [row for row in rows if row["domain"] == domain]
        if not rows:
            fix = "" if split == "train" else f"; leave {split} = 0 out of the suite, or the domain"
            raise ConfigError(f"domain {domain!r}: its {split} split has no problems{fix}")
        return in_modes(rows, modes)

    def log(self, step: int, total: int, *, tokens: int, **metrics: float) -> None:
        """Add a line to metrics.jsonl; `tokens` is what this step processed."""
        self.tokens += tokens
        # Rounded before it is remembered: a resumed stage has its history from the file.
        self.metrics = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        line = {
            "step": step,
            "total": total,
            "tokens": self.tokens,
            "seconds": round(self._seconds + time.monotonic() - self._began, 3),
        } | self.metrics
        self._remember(self.metrics)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def warn(self, text: str, *, about: str | None = None) -> None:
        """Tell the user something that is no error, in one sentence with its numbers and the fix.

        It stays: it is shown while the stage runs and whenever its result is used. The same text,
        or the first of several texts `about` one thing, is told once, also where the stage goes on
        after a stop.
        """
        add_warning(self.work, text, about)

    def history(self, metric: str) -> list[float]:
        """The logged values of a metric so far, oldest first; those before a resume are there."""
        return self._history.get(metric, [])

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)

    def resume(self, learner: Resumable) -> int:
        """Load the newest step checkpoint if there is one; returns the number of steps done."""
        marker = self.work / STEP
        if not marker.exists():
            # Lines of an attempt that ended before its first checkpoint.
            self._metrics.unlink(missing_ok=True)
            return 0
        state = json.loads(marker.read_text())
        path = self.work / state["directory"] / "state.safetensors"
        try:
            learner.restore(SavedTensors(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise StageError(
                f"the step checkpoint {path} cannot be read ({error}); remove {self.work} to start "
                "this stage anew"
            ) from error
        self.tokens, self._seconds = state["tokens"], state["seconds"]
        self.metrics = state["metrics"]
        # Those of earlier versions kept nothing.
        self.kept = state.get("kept", {})
        # Lines of steps after the checkpoint will be written again.
        if self._metrics.exists():
            os.truncate(self._metrics, state["metrics_bytes"])
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))
        return int(state["step"])

    def checkpoint(self, step: int, learner: Resumable) -> None:
        """Begin to save the state after `step` steps, if the last checkpoint is old enough.

        The learner may go on at once. Does nothing while a checkpoint is being written. Raises what
        the one before it failed with.
        """
        if self._pending is not None and not self._pending.done():
            return
        self.finish()
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS:
            self._begin(step, learner)

    def save(self, step: int, learner: Resumable) -> None:
        """Save the state after `step` steps; it is whole on the disk when this returns."""
        self.finish()
        self._begin(step, learner)
        self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _begin(self, step: int, learner: Resumable) -> None:
        """Hand the state to the writer."""
        read = Event()
        tensors = to_write(learner, read)
        state = {
            "directory": f"step-{step}",
            "tokens": self.tokens,
            "metrics": self.metrics,
            "kept": copy.deepcopy(self.kept),
            "seconds": self._seconds + time.monotonic() - self._began,
            "metrics_bytes": self._metrics.stat().st_size if self._metrics.exists() else 0,
        }
        self._pending = self._writer.submit(self._write, step, tensors, state, read)

    def _write(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], read: Event
    ) -> None:
        """Write a checkpoint; the previous one stays until this one is whole. `read` is set when
        the tensors were read, or could not be written."""
        fresh = self.work / state["directory"]
        # Left by a write that a kill cut short.
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            save_file(tensors, fresh / "state.safetensors")
        finally:
            read.set()
        # The marker must not reach the disk before what it points at.
        fsync(fresh / "state.safetensors")
        fsync(fresh)
        write_step(self.work, step, **state)
        # Nor must the old checkpoint go before the new marker is there.
        fsync(self.work)
        for old in self.work.glob("step-*"):
            if old != fresh:
                shutil.rmtree(old)
        # From the end of a write, so that a slow disk is not written to all the time.
        self._saved = time.monotonic()
