"""What a stage takes of memory and leaves on the disk, by the parts of its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.backends import budget
from posttrain.estimate.costs import MOST_ROWS
from posttrain.estimate.parts import Part, Work
from posttrain.estimate.shapes import Model

PLAIN_PROCESS = 400 * 2**20
"""A stage without a model: what all stages import is in its process too."""
ROW_BYTES, TOKEN_BYTES = 200, 3
"""A row of rollouts or of data on the disk: its names and numbers, and each token of its texts."""
OTHER_FILES = 20_000
"""Config, tokenizer, log and record of a small model, without a large tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a stage takes at most."""

    learner: int = 0
    sampler: int = 0
    readers: int = 0
    """Teachers, references and judges together."""
    peak: int = PLAIN_PROCESS
    """All at once, with the process itself."""
    parts: tuple[budget.Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes that a stage writes."""

    kept: int
    """In the store for good."""
    meanwhile: int = 0
    """Its step checkpoints, the older and the newer one."""


def memory_of(
    work: Work,
    models: Callable[[str], Model | None],
    config: Mapping[str, Any],
    *,
    sampling: int,
) -> Memory | None:
    """By the parts of the work; None where the sizes of a model are not known. Rows are sampled in
    `sampling` bytes."""
    learner: list[budget.Part] = []
    sampler: list[budget.Part] = []
    readers: list[budget.Part] = []
    precision = str(config.get("precision", "float32"))
    learning = {part.edge for part in work.parts if part.do == "learn"}
    seen: set[tuple[str, str]] = set()
    for part in sorted(work.parts, key=lambda part: -part.rows * part.longest):
        model = models(part.edge)
        if model is None:
            return None
        if (part.do, part.edge) in seen:
            continue
        seen.add((part.do, part.edge))
        shape, own = model.shape, part.edge not in learning
        tokens = max(1, min(budget.MAX_TOKENS, round(part.read)))
        if part.do == "learn":
            optimizer = config.get("optimizer") or {}
            ema = optimizer.get("ema") is not None
            learner += budget.learner_parts(shape, precision=precision, ema=ema, tokens=tokens)
        elif part.do == "score":
            readers += budget.reader_parts(
                shape, what=part.edge, precision=precision, tokens=tokens, own_weights=own
            )
        else:
            sampler += _sampler(part, model, precision, sampling, own=own)
    parts = (*learner, *sampler, *readers)
    return Memory(
        learner=_largest(learner),
        sampler=_largest(sampler),
        readers=_largest(readers),
        peak=budget.peak(parts) if parts else PLAIN_PROCESS,
        parts=parts,
    )


def _sampler(
    part: Part, model: Model, precision: str, memory: int, *, own: bool
) -> tuple[budget.Part, ...]:
    length = round(part.longest)
    fitting = int(memory // budget.row_bytes(model.shape, length, precision))
    rows = max(1, min(round(part.rows), MOST_ROWS, fitting))
    return budget.sampler_parts(
        model.shape, precision=precision, rows=rows, length=length, own_weights=own
    )


def _largest(parts: list[budget.Part]) -> int:
    return budget.peak(parts, process=0) if parts else 0


def disk_of(
    work: Work, model: Model | None, config: Mapping[str, Any], memory: Memory | None
) -> Disk:
    """What the stage leaves in the store, and what its step checkpoints take meanwhile."""
    kept = work.kept_rows * (ROW_BYTES + TOKEN_BYTES * work.kept_tokens) + OTHER_FILES
    if work.saves and model is not None:
        save_dtype = config.get("save_dtype", "base")
        dtype = model.dtype if save_dtype == "base" else str(save_dtype)
        kept += budget.saved_bytes(model.shape, dtype)
    parts = () if memory is None or not work.saves else memory.parts
    learner = [p for p in parts if "optimiser" in p.what or p.what.startswith("weights in")]
    return Disk(kept=round(kept), meanwhile=2 * budget.step_checkpoint_bytes(learner))
