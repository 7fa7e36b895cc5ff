"""Everything of `make gpu` that a CPU can show: every part runs, and what is counted is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from suite.models import Size

SCRIPT = Path(gpu.__file__)


def test_operations_of_a_learned_token() -> None:
    """A layer without an MLP, one head of width 2, hidden 4, 3 words: 4 * 2 * 4 weights of
    attention and 12 of the head; rows of 5 tokens see 3 positions in the mean, or 5."""
    size = Size(
        name="x",
        vocabulary=3,
        hidden=4,
        layers=1,
        heads=1,
        key_value_heads=1,
        head_dim=2,
        intermediate=0,
    )
    assert gpu.flops(size, 5, causal=True) == 6 * (32 + 12) + 12 * 2 * 3
    assert gpu.flops(size, 5, causal=False) == 6 * (32 + 12) + 12 * 2 * 5


def test_the_shape_is_that_of_qwen3() -> None:
    """Qwen3-0.6B has 596,049,920 parameters, norms among them; here they are left out."""
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert gpu.QWEN3.parameters + norms == 596_049_920


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("gpu_*.json")
    rows = json.loads(found.read_text())["rows"]
    assert len(rows) == 4 + 1 + 1 + 2
    assert all(row["ours"] and row["ours"] > 0 for row in rows), rows
    assert found.with_suffix(".md").read_text().count("\n| ") == len(rows) + 2 - 1


def test_without_a_card_it_says_so() -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1 and "--device cpu --tiny" in done.stderr
