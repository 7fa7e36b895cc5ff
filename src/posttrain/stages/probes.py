"""Whether the teachers of a distillation are still the ones that it began with.

A teacher that loses its weights, as when it wakes without them, says -ln V of every token: the loss
falls, the student goes to the uniform distribution, and nothing fails (Relax, issue 287). So each
teacher scores one row of fixed tokens before the first step, again every `PROBE_EVERY` steps and
after the last, and has to give the same numbers. A stage that goes on from a step checkpoint has to
find the teachers that it learned from before: the same files, and the same numbers.

Legend: N tokens of the probe that are scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import Scorer
from posttrain.backends.outside.files import is_model_file, model_files
from posttrain.engine.errors import StageError
from posttrain.engine.fingerprint import file_digest
from posttrain.engine.record import RECORD
from posttrain.rl.batch import Batch

PROBE_EVERY = 10
"""Steps between two probes."""
PROBE_TOKENS = 32
"""Tokens of the probe, or as many as the model has positions."""
NEAR = 0.2
"""Nats by which the log-probability of a token of the probe may change on average, where the
backend promises no bits or another machine goes on. For SmolLM2-135M other kernels change it by
2e-6 in float32 and by .03 in bfloat16; lost weights change it by 3.6."""


def due(step: int, total: int) -> bool:
    """Whether teachers are probed in this step, the 0-based one of `total`."""
    return (step + 1) % PROBE_EVERY == 0 or step + 1 == total


class Probe:
    """The probe of one teacher, with what it gave at first."""

    def __init__(self, name: str, scorer: Scorer, checkpoint: Path, *, exact: bool) -> None:
        """`checkpoint` is where the teacher was read from; `exact` asks for the same bits each
        time. Raises StageError for a teacher that is not frozen."""
        if not scorer.frozen:
            raise StageError(
                f"teacher {name!r} is not frozen: some of its weights are trained or belong to a "
                "model that is; a teacher has to stay as it is. Give the stage a checkpoint of its "
                "own"
            )
        self.name, self.exact = name, exact
        self._scorer = scorer
        # Ids instead of a text: every tokenizer has them, and they lie all over the vocabulary.
        ids = sorted(scorer.chat.ids)
        most = min(PROBE_TOKENS, scorer.chat.max_positions or PROBE_TOKENS)
        row = [ids[place * (len(ids) - 1) // most] for place in range(most)]
        self._rows = Batch.from_tokens([row[:1]], [row[1:]], pad_id=0)
        self._first_N = scorer.logprobs(self._rows)
        self._files = files_of(checkpoint)

    def again(self) -> None:
        """Raise StageError unless the teacher gives what it gave at first."""
        logp_N = self._scorer.logprobs(self._rows)
        distance = _distance(logp_N, self._first_N)
        if torch.equal(logp_N, self._first_N) or (not self.exact and distance <= NEAR):
            return
        now, first = float(logp_N.mean()), float(self._first_N.mean())
        lost = -math.log(len(self._scorer.chat.ids))
        raise StageError(
            f"teacher {self.name!r} has changed while the stage ran: the log-probabilities of its "
            f"{len(logp_N)} probe tokens are {distance:.3g} nats off on average (mean now "
            f"{now:.3f}, at first {first:.3f}; a model without weights says {lost:.3f}). Its "
            "weights were lost or exchanged when they were read again, or something trained them. "
            "See whether its files were written meanwhile (posttrain verify), and run again: the "
            "stage goes on from its last step checkpoint"
        )

    def identity(self) -> dict[str, Any]:
        """What a step checkpoint keeps of the teacher (JSON)."""
        return {"files": self._files, "probe": self._first_N.tolist()}

    def check(self, found: Mapping[str, Any], work: Path) -> None:
        """Raise StageError unless the `identity` in the step checkpoint of the stage that works in
        `work` is that of this teacher."""
        files = found["files"]
        names = sorted(files.keys() | self._files.keys())
        other = [name for name in names if files.get(name) != self._files.get(name)]
        before_N = torch.tensor(found["probe"])
        why = ""
        if other:
            why = f"other bytes in {', '.join(other)}"
        elif len(before_N) != len(self._first_N):
            why = "it has other tokens"
        elif (distance := _distance(self._first_N, before_N)) > NEAR:
            why = (
                f"its files are the same, and yet the log-probabilities of its probe are "
                f"{distance:.3g} nats off on average: what it is built on is another (the base "
                "of an adapter)"
            )
        if why:
            raise StageError(
                f"teacher {self.name!r} is not the one that this stage has learned from up to its "
                f"step checkpoint: {why}. Put the former teacher back, or remove {work} to begin "
                "the stage anew with this one"
            )


def files_of(checkpoint: Path) -> dict[str, str]:
    """The sha256 of each file that is part of a model, by its record; of a directory without one,
    which no stage is given, of the files as they are."""
    try:
        record = json.loads((checkpoint / RECORD).read_bytes())
    except FileNotFoundError:
        return {name: file_digest(checkpoint / name) for name in model_files(checkpoint)}
    files: Mapping[str, Mapping[str, Any]] = record.get("files", {})
    # Not its card, logs and samples, which whoever makes the same model writes anew.
    return {name: str(entry["sha256"]) for name, entry in files.items() if is_model_file(name)}


def _distance(one_N: Tensor, other_N: Tensor) -> float:
    """The mean distance of two scores of the probe; infinite where one is no number."""
    distance = (one_N.double() - other_N.double()).abs().mean()
    return float(distance.nan_to_num(nan=float("inf")))
