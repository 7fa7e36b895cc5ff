"""Peak memory and time of a distillation step with eight teachers against one.

    python benchmarks/teachers_memory.py                       # a summary on the terminal
    python benchmarks/teachers_memory.py --out benchmarks/results
    python benchmarks/teachers_memory.py --size 50M --precisions bfloat16

Student and teachers are random Qwen3 models with a vocabulary of 49,152 and the shape of
SmolLM2-135M (or one of 50 million parameters), stored in bfloat16 as published checkpoints are. The
stage is the real one with the exact divergence over the whole vocabulary. Both sides have eight
domains and the same prompts, so the first step samples and reads the very same rows; on one side
all domains have one teacher, on the other each has its own. Every run is a fresh process, and what
is compared is the most memory that it ever had, and the seconds of the processor between its log
lines, which do not depend on what else the machine does.

The script runs with an older source tree, too: set PYTHONPATH to its src.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from suite.machine import machine
from suite.models import SMOLLM2, M, Size, new_model, random_words, text_of, tokenizer

DOMAINS = 8
LIMIT = 1.10
"""What the peak with eight teachers may be of that with one."""
SIZES = {
    "135M": SMOLLM2,
    "50M": replace(M, name="50M", vocabulary=49152),
}


def make_inputs(size: Size, root: Path, prompts: int) -> None:
    """A student, eight teachers and eight domains, as artifacts."""
    for number in range(DOMAINS + 1):
        path = root / ("start" if number == 0 else f"teacher{number - 1}")
        if not path.exists():
            new_model(size, seed=number).to(torch.bfloat16).save_pretrained(path)
            tokenizer(size).save_pretrained(path)
            write_record(path, "model")
    for number in range(DOMAINS):
        path = root / f"domain{number}"
        path.mkdir(exist_ok=True)
        tokens_BT = random_words(size, rows=prompts, tokens=32, seed=number)
        rows = [
            {"id": str(i), "domain": f"d{number}", "prompt": text_of(ids), "answer": ""}
            for i, ids in enumerate(tokens_BT.tolist())
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "train.jsonl").write_text(text)
        write_record(path, "domain")


def write_record(path: Path, kind: str) -> None:
    """As much of a record as a stage reads of its inputs."""
    record = {"format": 1, "name": path.name, "kind": kind, "fingerprint": "1" * 64}
    (path / "record.json").write_text(json.dumps(record))


def run_stage(asked: dict[str, Any]) -> None:
    """One stage in this process, in the work directory that is asked for."""
    from posttrain.engine.process import Job
    from posttrain.stages.config import build_config
    from posttrain.stages.context import Context
    from posttrain.stages.worker import run_job

    root, work = Path(asked["root"]), Path(asked["work"])
    (work / "out").mkdir(parents=True)
    inputs = {"start": str(root / "start")}
    routes = {}
    for number in range(DOMAINS):
        inputs[f"domains.d{number}"] = str(root / f"domain{number}")
        routes[f"d{number}"] = f"t{number % asked['teachers']}"
    for number in range(asked["teachers"]):
        inputs[f"teachers.t{number}"] = str(root / f"teacher{number}")
    settings = {
        "steps": asked["steps"],
        "lr": 1e-5,
        "warmup_steps": 0,
        "prompts_per_step": asked["prompts"],
        "samples_per_prompt": 2,
        "max_new_tokens": asked["tokens"],
        "num_minibatches": asked["minibatches"],
        "routes": routes,
        "precision": asked["precision"],
    }
    job = Job(
        name="student",
        kind="distill",
        version=1,
        fingerprint="0" * 64,
        config=build_config("distill", "student", settings).to_json(),
        data={},
        runtime={},
        inputs=inputs,
        work=str(work),
        out=str(work / "out"),
        threads=asked["threads"],
        hashes=str(work / "hashes.json"),
    )
    seconds: list[float] = []
    log = Context.log

    def timed(self: Context, *args: Any, **metrics: Any) -> None:
        seconds.append(time.process_time())
        log(self, *args, **metrics)

    Context.log = timed  # type: ignore[method-assign]
    run_job(job)
    (work / "processor.json").write_text(json.dumps(seconds))


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """The stage in a fresh process: its peak memory, its seconds per step, what it logged."""
    with tempfile.TemporaryDirectory(prefix="teachers-memory-", dir=asked["root"]) as scratch:
        work = Path(scratch) / "work"
        command = [sys.executable, __file__, "--stage", json.dumps(asked | {"work": str(work)})]
        subprocess.run(command, check=True)
        facts = json.loads((work / "facts.json").read_text())
        processor = json.loads((work / "processor.json").read_text())
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    between = len(lines) - 1
    return {
        "peak_bytes": facts["peak_memory"],
        "seconds_per_step": (processor[-1] - processor[0]) / between,
        "seconds_to_the_first_line": processor[0],
        "wall_per_step": (lines[-1]["seconds"] - lines[0]["seconds"]) / between,
        "tokens": lines[-1]["tokens"],
        "tokens_of_step_1": lines[0]["tokens"],
        "first_loss": lines[0]["loss"],
    }


def compare(asked: dict[str, Any], precisions: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each precision: one teacher and eight, one after the other."""
    rows = []
    for precision in precisions:
        one, eight = (
            measured(asked | {"precision": precision, "teachers": teachers})
            for teachers in (1, DOMAINS)
        )
        assert one["tokens_of_step_1"] == eight["tokens_of_step_1"]
        rows.append(
            {
                "precision": precision,
                "peak": eight["peak_bytes"] / one["peak_bytes"],
                "met": eight["peak_bytes"] <= LIMIT * one["peak_bytes"],
                "seconds": eight["seconds_per_step"] / one["seconds_per_step"],
                "one": one,
                "eight": eight,
            }
        )
        print(in_words(rows[-1]), flush=True)
    return rows


def in_words(row: dict[str, Any]) -> str:
    """A row of the table."""
    one, eight = row["one"], row["eight"]
    return (
        f"| {row['precision']} | {one['peak_bytes'] / 1e9:.2f} GB | "
        f"{eight['peak_bytes'] / 1e9:.2f} GB | {row['peak']:.3f} | "
        f"{one['seconds_per_step']:.1f} s | {eight['seconds_per_step']:.1f} s | "
        f"{row['seconds']:.2f} |"
    )


HEAD = (
    "| precision | peak, 1 teacher | peak, 8 | ratio | step, 1 teacher | step, 8 | ratio |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="135M")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=16, help="per step, two responses each")
    parser.add_argument("--tokens", type=int, default=128, help="of a response at most")
    parser.add_argument("--steps", type=int, default=3, help="two at least")
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, help="where the models are kept between runs")
    parser.add_argument("--out", type=Path, help="directory for a JSON file and a page")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_stage(json.loads(given.stage))
        return
    with tempfile.TemporaryDirectory(prefix="teachers-memory-") as scratch:
        root = given.models or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        make_inputs(SIZES[given.size], root, given.prompts)
        asked = {
            "root": str(root.resolve()),
            "prompts": given.prompts,
            "tokens": given.tokens,
            "steps": given.steps,
            "minibatches": given.minibatches,
            "threads": given.threads,
        }
        print(HEAD)
        rows = compare(asked, given.precisions)
    if given.out:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        settings = {k: v for k, v in asked.items() if k != "root"} | {"size": given.size}
        result = {"date": date, "machine": machine(), "settings": settings, "rows": rows}
        name = f"teachers_memory_{date}"
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        table = "\n".join([HEAD, *map(in_words, rows)])
        page = (
            f"# Eight teachers against one, {date}\n\n{given.size}, vocabulary 49,152, "
            f"{given.prompts} prompts x 2, at most {given.tokens} tokens, {given.threads} "
            f"thread(s), full vocabulary.\n\n{table}\n"
        )
        (given.out / f"{name}.md").write_text(page)


if __name__ == "__main__":
    main()
