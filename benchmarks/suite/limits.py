"""What the machine allows: measured arithmetic and bandwidth against what a model needs.

The needs are the least that the task asks for: every prompt once per group, no padding, logits only
where they are used, no recomputation. A share of the limit of 100 % cannot be reached.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from suite.measure import Options
from suite.models import PROMPT_TOKENS, M, S, Size
from suite.rows import Row, alone

NAME = "limits.json"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Best of what was measured, at the number of threads of the run."""

    flops: float
    """float32 matrix products, operations per second, at the best of three shapes."""
    read: dict[str, float]
    """Bytes per second of reading as many bytes as the weights of each size of model."""


def known(options: Options) -> Limits:
    """The limits of this run; measured by whoever asks first."""
    path = options.folder / NAME
    if not path.exists():
        path.write_text(json.dumps(asdict(measure(options))))
    return Limits(**json.loads(path.read_text()))


def measure(options: Options) -> Limits:
    """Measure arithmetic and bandwidth."""
    shapes = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048))
    flops = max(product(*shape) for shape in shapes[: 1 if options.quick else 3])
    return Limits(flops=flops, read={size.name: read(4 * size.parameters) for size in (S, M)})


def product(rows: int, inner: int, columns: int) -> float:
    """Operations per second of one shape of matrix product."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return 2 * rows * inner * columns / best(lambda: torch.mm(left, right, out=out))


def read(num_bytes: int) -> float:
    """Bytes per second of a sum over a vector of that many bytes."""
    vector = torch.randn(num_bytes // 4)
    return num_bytes / best(lambda: vector.sum())


def best(work: Callable[[], object], *, budget: float = 1.0) -> float:
    """The shortest of as many repetitions as fit into `budget` seconds."""
    work()
    shortest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < budget:
        start = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


# -- what a task needs -----------------------------------------------------------------------------


def forward_flops(size: Size, *, tokens: int, context: int, logits: int) -> float:
    """One forward pass: `tokens` through the layers, `logits` of them through the head.

    `context` is the number of (query, key) pairs.
    """
    attention = 4 * size.layers * size.heads * size.head_dim * context
    return 2.0 * size.block_parameters * tokens + attention + 2.0 * size.head_parameters * logits


def tree(lengths: Sequence[int], prompts: int) -> tuple[int, int]:
    """`(tokens, context)` of prompts read once per group and of the responses' inputs.

    A response of n tokens has n - 1 inputs: its last token predicts nothing.
    """
    tokens = prompts * PROMPT_TOKENS + sum(lengths) - len(lengths)
    own = PROMPT_TOKENS * (PROMPT_TOKENS + 1) // 2 * prompts
    context = own + sum((n - 1) * PROMPT_TOKENS + (n - 1) * n // 2 for n in lengths)
    return tokens, context


def sampling_seconds(limits: Limits, size: Size, lengths: Sequence[int], prompts: int) -> float:
    """Arithmetic, or the weights read once per token of the longest response, whichever is more."""
    tokens, context = tree(lengths, prompts)
    flops = forward_flops(size, tokens=tokens, context=context, logits=sum(lengths))
    weights = 4 * size.parameters * max(lengths) / limits.read[size.name]
    return max(flops / limits.flops, weights)


def learning_seconds(
    limits: Limits, size: Size, lengths: Sequence[int], prompts: int, *, teacher: bool
) -> float:
    """Forward and backward of the student, and a forward of a teacher of its size."""
    tokens, context = tree(lengths, prompts)
    flops = forward_flops(size, tokens=tokens, context=context, logits=sum(lengths))
    return (4 if teacher else 3) * flops / limits.flops


def run(options: Options) -> list[Row]:
    """Rows that only inform."""
    limits = known(options)
    rows = [alone("limit: float32 matrix product", "GFLOP/s", [limits.flops / 1e9])]
    rows += [
        alone(f"limit: reading the weights of {name}", "GB/s", [rate / 1e9])
        for name, rate in limits.read.items()
    ]
    return rows
