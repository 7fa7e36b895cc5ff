"""What becomes of small updates: float32 weights, or bfloat16 ones rounded in one of two ways.

    python benchmarks/masters.py MODEL --steps 24
    python benchmarks/masters.py MODEL --out benchmarks/results

A real checkpoint learns rows of gsm_symbolic with worked answers, the model computing in bfloat16,
at two learning rates and in four ways: with float32 weights, with bfloat16 weights that are rounded
at random (`optimizer.master = "stochastic"`), with bfloat16 weights that are rounded to the nearest
(what `model.bfloat16()` and an optimiser do; no setting of posttrain), and with float32 weights and
moments in 8 bits. All see the same rows. What is told: the loss on other rows before and after, the
share of bfloat16 weights that differ from the start, how far they went along the way of the float32
weights (1: as far), and seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from torch import Tensor

from posttrain.backends import optimizer
from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.local import LocalBackend
from posttrain.backends.local_learner import LocalLearner
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import demo_batch, token_cross_entropy
from suite.machine import machine

BATCH, HELD_OUT = 4, 12
LOSS = TokenLoss(token_cross_entropy, 1.0)
WAYS: dict[str, dict[str, str]] = {
    "float32 weights": {},
    "rounded at random": {"master": "stochastic"},
    "rounded to nearest": {"master": "stochastic"},
    "float32 weights, int8 moments": {"states": "int8"},
}


def batches(learner: LocalLearner, count: int, seed: int, size: int) -> list[Batch]:
    """So many batches of conversations."""
    found = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=count * size)
    rows = [{"prompt": one["question"], "demo": one["metadata"]["answer_cot"]} for one in found]
    return [
        demo_batch(rows[first : first + size], learner.chat) for first in range(0, len(rows), size)
    ]


def to_nearest(weight: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """In place of `round_into`."""
    weight.copy_(exact)


def train(model: Path, way: str, lr: float, steps: int) -> dict[str, Any]:
    """One line of the table, and the weights that there are at its end."""
    settings = LearnerSettings(
        betas=(0.9, 0.98),
        weight_decay=0.0,
        max_grad_norm=1.0,
        dtype=torch.bfloat16,
        **WAYS[way],
    )
    learner = LocalBackend().learner(model, settings)
    start = [copy.detach().clone() for copy in learner.copies]
    (held_out,) = batches(learner, 1, 99, HELD_OUT)
    before = -float(learner.logprobs(held_out).mean())
    seconds = []
    rounding = optimizer.round_into
    optimizer.round_into = to_nearest if way == "rounded to nearest" else rounding
    for batch in batches(learner, steps, 1, BATCH):
        began = time.perf_counter()
        learner.update(batch, LOSS, count=batch.num_tokens, lr=lr)
        seconds.append(time.perf_counter() - began)
    optimizer.round_into = rounding
    after = -float(learner.logprobs(held_out).mean())
    moved = [(c.detach().float() - s.float()) for c, s in zip(learner.copies, start, strict=True)]
    exact = [(w.detach().float() - s.float()) for w, s in zip(learner.weights, start, strict=True)]
    changed = sum(int((m != 0).sum()) for m in moved) / sum(m.numel() for m in moved)
    return {
        "way": way,
        "lr": lr,
        "before": before,
        "after": after,
        "changed": changed,
        "moved": moved,
        "exact": exact,
        "seconds": sorted(seconds)[len(seconds) // 2],
    }


def along(moved: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """How far `moved` went in the direction of `exact`, as a share of it."""
    dot = sum(float((m * e).sum(dtype=torch.float64)) for m, e in zip(moved, exact, strict=True))
    return dot / sum(float(e.square().sum(dtype=torch.float64)) for e in exact)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = [
        "| lr | weights | loss before | after | bfloat16 weights that changed | along | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['lr']:g} | {r['way']} | {r['before']:.4f} | {r['after']:.4f} | {r['changed']:.2%} | "
        f"{r['along']:.3f} | {r['seconds']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-6])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--out", type=Path, help="directory for the result")
    given = parser.parse_args()
    rows = []
    for lr in given.lr:
        exact: Sequence[Tensor] = ()
        for way in given.ways:
            row = train(given.model, way, lr, given.steps)
            # Of the way with float32 weights, which is the first.
            exact = exact or row["exact"]
            row["along"] = along(row.pop("moved"), exact)
            del row["exact"]
            rows.append(row)
            print(page(rows[-1:]).splitlines()[-1], flush=True)
    if given.out:
        place = given.out / f"masters_{datetime.now(UTC):%Y-%m-%d}"
        told = {"conditions": machine(), "steps": given.steps, "rows": rows}
        place.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        place.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
