"""What a running stage may do with its directories: log, checkpoint, resume, read its inputs.

A step checkpoint holds weights and optimiser moments; there is no random state to keep, because
every stage draws from generators seeded by (seed, step). That is why a resumed stage ends with the
same bits as one that was never stopped.

The loop only copies the tensors; a thread of its own writes them, one checkpoint at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.engine.atomic import fsync
from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.work import METRICS, STEP, write_step
from posttrain.modes import in_modes

SECONDS_BETWEEN_CHECKPOINTS = 10.0


class Resumable(Protocol):
    """Something whose whole state is named tensors; see `LocalLearner`."""

    def state(self) -> dict[str, Tensor]:
        """All tensors."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        ...


class Context:
    """The job's inputs and outputs, seen from inside the stage."""

    def __init__(
        self,
        *,
        name: str,
        work: Path,
        inputs: Mapping[str, str],
        threads: int,
        device: torch.device | None = None,
        compile: bool = False,
    ) -> None:
        """`device` is where models compute, the CPU by default; `compile` is for the learner."""
        self.name = name
        self.device = torch.device("cpu") if device is None else device
        self.compile = compile
        self.work = work
        self.out = work / "out"
        self.inputs = {edge: Path(path) for edge, path in inputs.items()}
        self.threads = threads
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        """Of the newest step, also where a resumed stage finds no step left to do."""
        self._history: dict[str, list[float]] = {}
        self._seconds = 0.0
        self._began = time.monotonic()
        self._saved = time.monotonic()
        self._metrics = work / METRICS
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        """The checkpoint that is being written."""
        self.resources = ExitStack()
        """What the stage opened; `close` closes it."""
        self.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def workers(self) -> ThreadPoolExecutor | None:
        """Threads for what can be done beside each other, where the stage has more cores than one
        operation uses; None otherwise. With no core to spare threads would only take turns."""
        count = self.threads // torch.get_num_threads()
        if count < 2 or self.device.type != "cpu":
            return None
        return self.resources.enter_context(ThreadPoolExecutor(count, thread_name_prefix="work"))

    def close(self) -> None:
        """Close what the stage opened, also when it failed."""
        self.resources.close()

    @property
    def domains(self) -> dict[str, Path]:
        """Domain name to the artifact with its problems, by name."""
        prefix = "domains."
        found = {e.removeprefix(prefix): p for e, p in self.inputs.items() if e.startswith(prefix)}
        return dict(sorted(found.items()))

    def problems(self, domain: str, split: str, modes: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The problems of one split of a domain, each in each of `modes` (`in_modes`).

        Of the training split, those that the stage of the edge `prompts` has chosen, if there is
        one. Raises ConfigError where there is none.
        """
        path = self.domains[domain] / f"{split}.jsonl"
        chosen = split == "train" and "prompts" in self.inputs
        if chosen:
            path = self.inputs["prompts"] / "prompts.jsonl"
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        if chosen:
            rows = [row for row in rows if row["domain"] == domain]
        if not rows:
            raise ConfigError(f"domain {domain!r}: its {split} split has no problems")
        return in_modes(rows, modes)

    def log(self, step: int, total: int, *, tokens: int, **metrics: float) -> None:
        """Add a line to metrics.jsonl; `tokens` is what this step processed."""
        self.tokens += tokens
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
            self._metrics.unlink(missing_ok=True)
            return 0
        state = json.loads(marker.read_text())
        path = self.work / state["directory"] / "state.safetensors"
        try:
            learner.restore(load_file(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise StageError(
                f"the step checkpoint {path} cannot be read ({error}); remove {self.work} to start "
                "this stage anew"
            ) from error
        self.tokens, self._seconds = state["tokens"], state["seconds"]
        self.metrics = state["metrics"]
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
        """Copy the state and hand it to the writer."""
        # The next step changes weights and moments where they lie.
        tensors = {
            name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in learner.state().items()
        }
        state = {
            "directory": f"step-{step}",
            "tokens": self.tokens,
            "metrics": self.metrics,
            "seconds": self._seconds + time.monotonic() - self._began,
            "metrics_bytes": self._metrics.stat().st_size if self._metrics.exists() else 0,
        }
        self._pending = self._writer.submit(self._write, step, tensors, state)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; the previous one stays until this one is whole."""
        fresh = self.work / state["directory"]
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        save_file(tensors, fresh / "state.safetensors")
        # The marker must not reach the disk before what it points at.
        fsync(fresh / "state.safetensors")
        fsync(fresh)
        write_step(self.work, step, **state)
        fsync(self.work)
        for old in self.work.glob("step-*"):
            if old != fresh:
                shutil.rmtree(old)
        self._saved = time.monotonic()
