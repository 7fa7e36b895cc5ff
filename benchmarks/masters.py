"""What becomes of small updates: float32 weights, or bfloat16 ones rounded in one of two ways.

    python benchmarks/masters.py                             # a model of 0.8 million parameters
    python benchmarks/masters.py --model DIRECTORY --steps 24
    python benchmarks/masters.py --out benchmarks/results

A model learns a second task, computing in bfloat16, at two learning rates and in four ways: with
float32 weights, with bfloat16 weights that are rounded at random (`optimizer.master =
"stochastic"`), with bfloat16 weights that are rounded to the nearest (what `model.bfloat16()` and
an optimiser do; no setting of posttrain), and with float32 weights and moments in 8 bits. All see
the same rows. What is told: the loss on other rows before and after, the share of bfloat16 weights
that differ from the start, how far they went along the way of the float32 weights (1: as far), and
seconds of a step.

The small model is made first: it learns sums in float32, is saved in bfloat16, and then learns
products. A checkpoint that is given learns gsm_symbolic with worked answers.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from torch import Tensor

from posttrain.backends import optimizer
from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import save
from posttrain.backends.local import LocalBackend
from posttrain.backends.local_learner import LocalLearner
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import demo_batch, token_cross_entropy
from suite.machine import machine

SMALL = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32}
SMALL_STEPS, SMALL_LR, SMALL_BATCH = 200, 2e-3, 16
LOSS = TokenLoss(token_cross_entropy, 1.0)
WAYS: dict[str, dict[str, str]] = {
    "float32 weights": {},
    "rounded at random": {"master": "stochastic"},
    "rounded to nearest": {"master": "stochastic"},
    "float32 weights, int8 moments": {"states": "int8"},
}


Rows = list[dict[str, str]]


def worked(count: int, seed: int) -> Rows:
    """Problems with worked answers."""
    found = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=count)
    return [{"prompt": one["question"], "demo": one["metadata"]["answer_cot"]} for one in found]


def sums(count: int, seed: int) -> Rows:
    """What the small model has learned before."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(count)]
    return [{"prompt": f"{a}+{b}", "demo": str(a + b)} for a, b in pairs]


def products(count: int, seed: int) -> Rows:
    """What it is to learn."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(100), draw.randrange(2, 10)) for _ in range(count)]
    return [{"prompt": f"{a}*{b}", "demo": str(a * b)} for a, b in pairs]


def batches(learner: LocalLearner, rows: Rows, size: int) -> list[Batch]:
    """Batches of so many rows."""
    firsts = range(0, len(rows), size)
    return [demo_batch(rows[first : first + size], learner.chat) for first in firsts]


def small_model(folder: Path) -> Path:
    """A directory with a model that knows sums."""
    tokenizer = character_tokenizer([])
    fresh = new_model(tokenizer, intermediate_size=512, max_positions=64, seed=0, **SMALL)
    save(fresh, folder / "fresh")
    settings = LearnerSettings(
        betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0, save_dtype="bfloat16"
    )
    learner = LocalBackend().learner(folder / "fresh", settings)
    for batch in batches(learner, sums(SMALL_STEPS * SMALL_BATCH, 5), SMALL_BATCH):
        learner.update(batch, LOSS, count=batch.num_tokens, lr=SMALL_LR)
    learner.save(folder / "small")
    return folder / "small"


def to_nearest(weight: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """In place of `round_into`."""
    weight.copy_(exact)


def train(
    model: Path, way: str, lr: float, steps: int, rows: Callable[[int, int], Rows], size: int
) -> dict[str, Any]:
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
    (held_out,) = batches(learner, rows(3 * size, 99), 3 * size)
    before = -float(learner.logprobs(held_out).mean())
    seconds = []
    rounding = optimizer.round_into
    optimizer.round_into = to_nearest if way == "rounded to nearest" else rounding
    for batch in batches(learner, rows(steps * size, 1), size):
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
    parser.add_argument("--model", type=Path, help="a checkpoint; without it a small one is made")
    parser.add_argument("--steps", type=int, help="24 of a checkpoint, 150 of the small model")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 1e-6])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--out", type=Path, help="directory for the result")
    given = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        model = given.model or small_model(Path(folder))
        steps = given.steps or (24 if given.model else 150)
        rows, size = (worked, 4) if given.model else (products, SMALL_BATCH)
        for lr in given.lr:
            exact: Sequence[Tensor] = ()
            for way in given.ways:
                row = train(model, way, lr, steps, rows, size)
                # Of the way with float32 weights, which is the first.
                exact = exact or row["exact"]
                row["along"] = along(row.pop("moved"), exact)
                del row["exact"]
                table.append(row)
                print(page(table[-1:]).splitlines()[-1], flush=True)
    if given.out:
        place = given.out / f"masters_{datetime.now(UTC):%Y-%m-%d}"
        told = {"conditions": machine(), "steps": steps, "rows": table}
        place.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        place.with_suffix(".md").write_text(page(table))


if __name__ == "__main__":
    main()
