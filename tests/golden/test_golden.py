"""Loss curves of fixed runs, step by step, so that no change moves the numbers unnoticed.

Each file holds one metric of one stage, a line `step value` per step, values to six digits. One
machine repeats them exactly; another CPU rounds its sums otherwise, so they are compared with a
relative tolerance of 1e-4. The stages are short and their learning rates small: no sampled token
hangs on rounding, and the token counts, which would tell, are stored as well.

A change that is meant to move them raises the stage's version and writes the files anew:

    POSTTRAIN_WRITE_GOLDEN=1 python -m pytest tests/golden

and the commit says why they moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WRITE = "POSTTRAIN_WRITE_GOLDEN"
OPTIM: dict[str, Any] = {"steps": 5, "lr": 5e-4, "warmup_steps": 2}
ROLLOUT: dict[str, Any] = {"prompts_per_step": 8, "max_new_tokens": 6}
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sft": (OPTIM | {"batch_size": 16}, ("loss", "grad_norm")),
    "rl": (
        OPTIM | ROLLOUT | {"group_size": 4, "num_minibatches": 2, "kl": {"coef": 0.1}},
        ("reward", "entropy", "grad_norm", "kl_reference", "tokens"),
    ),
    "distill": (
        OPTIM | ROLLOUT | {"routes": {"short": "first", "words": "second"}},
        ("loss", "kl/short", "kl/words", "entropy", "grad_norm", "tokens"),
    ),
}


def read(path: Path) -> dict[int, float]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {int(step): float(value) for step, value in lines}


@pytest.mark.parametrize("kind", RUNS)
def test_the_curves_are_those_on_file(
    kind: str,
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    settings, metrics = RUNS[kind]
    inputs = {"start": models["start"], **domains}
    if kind == "distill":
        inputs |= {"teachers.first": models["one"], "teachers.second": models["two"]}
    lines = run_stage(kind, settings, inputs).lines
    for metric in metrics:
        path = HERE / f"{kind}.{metric.replace('/', '.')}.txt"
        found = {int(line["step"]): line[metric] for line in lines}
        if os.environ.get(WRITE):
            path.write_text("".join(f"{step} {value:.6g}\n" for step, value in found.items()))
        assert found == pytest.approx(read(path), rel=1e-4, abs=1e-6), path.name
