"""What a stage takes of memory and leaves on the disk, by the parts of its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.backends.budget import (
    MAX_TOKENS,
    learner_parts,
    peak,
    plan_passes,
    reader_parts,
    row_bytes,
    sampler_parts,
    saved_bytes,
    step_checkpoint_bytes,
)
from posttrain.backends.budget import Part as Piece
from posttrain.engine.graph import role_of
from posttrain.estimate.costs import MOST_ROWS
from posttrain.estimate.parts import Part, Work
from posttrain.estimate.shapes import Model

Pieces = tuple[Piece, ...]
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
    learners: Pieces = ()
    """Those of what learns."""


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
    budget_bytes: int,
    sampling: int,
) -> Memory | None:
    """By the parts of the work; None where the sizes of a model are not known. A learner fits its
    passes into `budget_bytes`, rows are sampled in `sampling` bytes."""
    precision = str(config.get("precision", "float32"))
    learners: list[Pieces] = []
    samplers: list[Pieces] = []
    teachers: list[Pieces] = []
    others: list[Pieces] = []
    seen: set[tuple[str, str, bool]] = set()
    # Of the parts of one model the largest decides.
    for part in sorted(work.parts, key=lambda part: -part.rows * part.longest):
        model = models(part.edge)
        if model is None:
            return None
        key = (part.do, part.edge, part.policy)
        if key in seen:
            continue
        seen.add(key)
        tokens = max(1, min(MAX_TOKENS, round(part.read)))
        if part.do == "learn":
            learners.append(_learner(model, config, tokens, budget_bytes))
        elif part.do == "sample":
            own = not any(p.do == "learn" and p.edge == part.edge for p in work.parts)
            samplers.append(_sampler(part, model, precision, sampling, own=own))
        else:
            # What learns as an adapter leaves the weights below to whoever reads the same model.
            shared = config.get("lora") and any(
                p.do == "learn" and p.edge == part.edge for p in work.parts
            )
            read = reader_parts(
                model.shape,
                what=part.edge,
                precision=precision,
                tokens=tokens,
                own_weights=not (part.policy or shared),
            )
            (teachers if role_of(part.edge) == "teachers" else others).append(read)
    return _together(learners, samplers, teachers, others)


def _together(
    learners: list[Pieces], samplers: list[Pieces], teachers: list[Pieces], others: list[Pieces]
) -> Memory:
    """All learners and readers stay in memory; one sampler at a time is there, and of teachers, who
    rest, one at a time is awake."""
    learner = [piece for pieces in learners for piece in pieces]
    sampler = list(max(samplers, key=_largest, default=()))
    readers = [piece for pieces in others for piece in pieces]
    readers += max(teachers, key=_largest, default=())
    pieces = (*learner, *sampler, *readers)
    return Memory(
        learner=_largest(learner),
        sampler=_largest(sampler),
        readers=_largest(readers),
        peak=peak(pieces) if pieces else PLAIN_PROCESS,
        learners=tuple(learner),
    )


def _learner(model: Model, config: Mapping[str, Any], tokens: int, memory: int) -> Pieces:
    """With passes as short as they have to be to fit, as the learner has them."""
    optimizer, lora = config.get("optimizer") or {}, config.get("lora")
    how: dict[str, Any] = {
        "precision": str(config.get("precision", "float32")),
        "master": optimizer.get("master", "float32"),
        "states": optimizer.get("states", "float32"),
        "ema": optimizer.get("ema") is not None,
        "trained": trained_numbers(model, config) if lora else None,
        "adapter": bool(lora),
    }
    parts = learner_parts(model.shape, tokens=tokens, **how)
    plan = plan_passes(
        model.shape, memory, parts, precision=how["precision"], max_tokens=MAX_TOKENS
    )
    tokens = min(tokens, plan.max_tokens)
    again = plan.checkpoints(tokens)
    return learner_parts(model.shape, tokens=tokens, checkpointing=again, **how)


def trained_numbers(model: Model, config: Mapping[str, Any]) -> int:
    """How many numbers of the model learn: those of an adapter, or all."""
    lora = config.get("lora")
    if not lora:
        return model.parameters
    shape, chosen = model.shape, lora.get("targets", "all-linear")
    places = {
        "q_proj": (shape.hidden, shape.queries),
        "k_proj": (shape.hidden, shape.keys),
        "v_proj": (shape.hidden, shape.keys),
        "o_proj": (shape.queries, shape.hidden),
        "gate_proj": (shape.hidden, shape.intermediate),
        "up_proj": (shape.hidden, shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
    }
    taken = places if chosen == "all-linear" else {n: p for n, p in places.items() if n in chosen}
    each: int = sum(
        lora.get("rank", 16) * (a + b) + b * bool(lora.get("dora")) for a, b in taken.values()
    )
    return model.layers * each


def _sampler(part: Part, model: Model, precision: str, memory: int, *, own: bool) -> Pieces:
    length = round(part.longest)
    fitting = int(memory // row_bytes(model.shape, length, precision))
    rows = max(1, min(round(part.rows), MOST_ROWS, fitting))
    return sampler_parts(
        model.shape, precision=precision, rows=rows, length=length, own_weights=own
    )


def _largest(parts: Iterable[Piece]) -> int:
    return peak(parts, process=0)


def of_loading(model: Model) -> Memory:
    """A stage that loads a model and computes nothing with it: in float32, from its file."""
    weights = 4 * model.parameters + (0 if model.dtype == "float32" else model.bytes)
    return Memory(peak=PLAIN_PROCESS + weights)


def disk_of(
    work: Work, model: Model | None, config: Mapping[str, Any], memory: Memory | None
) -> Disk:
    """What the stage leaves in the store, and what its step checkpoints take meanwhile."""
    kept = work.kept_rows * (ROW_BYTES + TOKEN_BYTES * work.kept_tokens) + OTHER_FILES
    if work.saves and model is not None:
        save_dtype = config.get("save_dtype", "base")
        dtype = model.dtype if save_dtype == "base" else str(save_dtype)
        lora = config.get("lora")
        # An adapter is saved in the type in which it learned.
        kept += 4 * trained_numbers(model, config) if lora else saved_bytes(model.shape, dtype)
    learner = () if memory is None or not work.saves else memory.learners
    learner = tuple(piece for piece in learner if not piece.what.startswith("frozen"))
    return Disk(kept=round(kept), meanwhile=2 * step_checkpoint_bytes(learner))
