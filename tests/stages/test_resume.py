"""kill -9 in the middle of sft, rl, dpo and distill, then the same command: the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from posttrain.engine.record import Artifact
from posttrain.engine.store import Store

PROGRAM = Path(__file__).with_name("pausing_stages.py")
# In the middle, with a checkpoint one step before, so that one step is made twice; and after the
# last step's checkpoint, when only the end of the stage is left.
PAUSES = ("sft-5", "sft-6", "rl-3", "dpo-5", "student-5")


def start(store: Path, models: Mapping[str, str], pauses: Path) -> subprocess.Popen[bytes]:
    words = [str(PROGRAM), str(store), models["start"], models["one"], str(pauses)]
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)


def kill_when_reached(process: subprocess.Popen[bytes], reached: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached.exists():
        assert process.poll() is None, "the run ended before its pause"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def artifacts(store: Path) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in Store(store).list()}


def log_of(artifact: Artifact) -> list[dict[str, float]]:
    lines = (artifact.path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_killed_stages_end_with_the_bits_of_those_left_alone(
    tmp_path: Path, models: Mapping[str, str]
) -> None:
    rows = [{"prompt": f"{i} apples", "answer": str(i), "demo": f"A{i}"} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pauses = tmp_path / "pauses"
    pauses.mkdir()

    assert start(tmp_path / "calm", models, pauses).wait() == 0
    for name in PAUSES:
        (pauses / name).touch()
    for name in PAUSES:
        kill_when_reached(start(tmp_path / "killed", models, pauses), pauses / f"{name}.reached")
    assert start(tmp_path / "killed", models, pauses).wait() == 0

    calm, killed = artifacts(tmp_path / "calm"), artifacts(tmp_path / "killed")
    assert calm.keys() == killed.keys()
    steps = {name: artifact.provenance["resumed_at_step"] for name, artifact in killed.items()}
    assert [steps[n] for n in ("sft", "rl", "dpo", "student")] == [6, 2, 4, 4]
    for name in ("sft", "rl", "dpo", "student"):
        ours, theirs = (a[name].path / "model.safetensors" for a in (calm, killed))
        assert ours.read_bytes() == theirs.read_bytes(), name
        assert log_of(calm[name]) == log_of(killed[name])
        assert [line["step"] for line in log_of(killed[name])] == [1, 2, 3, 4, 5, 6]
        assert calm[name].metrics == killed[name].metrics
        assert calm[name].fingerprint == killed[name].fingerprint
    assert not list((tmp_path / "killed" / "work").glob("*"))
