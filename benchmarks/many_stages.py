"""A recipe of 60 stages, and how long the commands take once all of them are cached.

    python benchmarks/many_stages.py            # builds the store in a temporary directory, times
    python benchmarks/many_stages.py --out benchmarks/results

The stages are as small as they can be: what is measured is the engine and the command line, not the
arithmetic. Per domain a chain of 13 specialists, each made from the one before; then one student of
the last four, and its evaluation. Every command is a new process, as a user starts it, and the
commands take turns. Also a recipe for itself: `posttrain run benchmarks/many_stages.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain import Recipe, Stage

NUM_STAGES = 60
LIMIT_SECONDS = 1.5
"""What the second run of all stages may take."""

CHAIN = 13
"""Specialists per domain: 4 domains, 4 x 13 specialists, base, sft, student and evaluation."""
SHAPE = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "max_positions": 64,
}
SHORT = {"max_new_tokens": 4}


def recipe(r: Recipe, length: int = CHAIN) -> Stage:
    """A chain of `length` specialists per domain, alternating sft and rl, and their student."""
    demos = r.demos(r.domains)
    base = r.pretrain(data=demos, steps=1, batch_size=2, **SHAPE)
    sft = r.sft(start=base, data=demos, steps=1, batch_size=2)
    teachers = {domain: chain(r, domain, sft, length) for domain in r.domains}
    student = r.distill(
        start=sft,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=1,
        prompts_per_step=4,
        **SHORT,
    )
    return r.evaluate(
        student, teachers=teachers, init=sft, num_problems=2, samples=1, bootstrap=100, **SHORT
    )


def chain(r: Recipe, domain: str, start: Stage, length: int) -> Stage:
    """Specialists of one domain, each made from the one before."""
    rollout: dict[str, Any] = {"prompts_per_step": 2, "group_size": 2, **SHORT}
    for number in range(length):
        name = f"{domain}_{number:02}"
        if number % 2 == 0:
            start = r.sft(start=start, data=r.demos(domain), steps=1, batch_size=2, name=name)
        else:
            start = r.rl(start=start, prompts=r.prompts(domain), steps=1, name=name, **rollout)
    return start


def measure(repetitions: int = 5, jobs: int = 2) -> dict[str, Any]:
    """Make all stages in an empty store, then time each command `repetitions` times, in turn.

    Returns `num_stages`, `first_seconds` (the run that makes everything), `limit_seconds`,
    `cached_again`, and under `commands`, for each command line, `median`, `minimum`, `maximum` and
    all `seconds` of wall time. `run` is the whole second run with the report as it stands; `run,
    new report` writes the page again, as it is after --report names another file.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = ("--store", f"{folder}/store")
        words = [sys.executable, "-m", "posttrain"]
        target = [str(Path(__file__).resolve()), *place]
        report = ("--report", f"{folder}/report.html")
        _, first_seconds = timed([*words, "run", *target, *report, "--jobs", str(jobs)])
        commands = {
            "run": [*words, "run", *target, *report],
            "run, new report": [*words, "run", *target, "--report", f"{folder}/new.html"],
            "plan": [*words, "plan", *target],
            "ls": [*words, "ls", *place],
            "--help": [*words, "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repetitions):
            for name, command in commands.items():
                seconds[name].append(timed(command)[1])
                Path(folder, "new.html").unlink(missing_ok=True)
        again, _ = timed([*words, "run", *target, *report, "--json"])
    stages = json.loads(again)["stages"]
    return {
        "num_stages": len(stages),
        "first_seconds": round(first_seconds, 1),
        "limit_seconds": LIMIT_SECONDS,
        "cached_again": all(stage["status"] == "cached" for stage in stages),
        "commands": {name: summary(values) for name, values in seconds.items()},
    }


def timed(command: list[str]) -> tuple[str, float]:
    """Standard output and wall seconds of one command. Raises CalledProcessError when it fails."""
    began = time.monotonic()
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout, time.monotonic() - began


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, minimum and maximum of some seconds, with all of them."""
    return {
        "median": round(statistics.median(seconds), 3),
        "minimum": round(min(seconds), 3),
        "maximum": round(max(seconds), 3),
        "seconds": [round(value, 3) for value in seconds],
    }


def main() -> None:
    """Measure, print, and write the result where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for the JSON file; default: none")
    arguments = parser.parse_args()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    result = {
        "benchmark": "many_stages",
        "date": date,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "posttrain": version("posttrain"),
        },
        **measure(arguments.repetitions),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"many_stages_{date}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
