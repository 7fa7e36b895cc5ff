"""The hot paths against TRL, transformers, Liger and the machine's limits, in one go.

    python benchmarks/bench.py                               # everything; `make bench` does this
    python benchmarks/bench.py --only sampling loss          # some parts
    python benchmarks/bench.py --only grpo_step --quick      # does it work? numbers mean nothing

The whole suite writes results/bench_<date>.json (a list of rows), a Markdown page beside it, and in
results/latest.json the newest row of every path. A selection prints its rows, and writes them only
where --out says. Every part runs in a process of its own. What is measured, and how fairly:
README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = (
    "limits",
    "sampling",
    "distill_step",
    "grpo_step",
    "sft_dpo",
    "loss",
    "teachers",
    "tokens",
    "engine",
)
OF_A_MODEL = ("real_steps",)
"""Parts on a real model, whose checkpoint `--model` names; they run when they are asked for."""
PACKAGES = ("posttrain", "torch", "transformers", "trl", "accelerate", "liger-kernel")

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
"""For the parts: nothing is looked up, and no bars or warnings stand between the lines."""


def main() -> None:
    """Run the parts and write the results."""
    arguments = parse()
    if arguments.part is not None:
        run_part(arguments)
        return
    from suite.page import page

    began, load = time.monotonic(), os.getloadavg()[0]
    whole = arguments.only is None and not arguments.quick
    out = arguments.out or (HERE / "results" if whole else None)
    target = None if out is None else fresh(out)
    rows: list[dict[str, Any]] = []
    failed = []
    conditions: dict[str, Any] = {}
    for name, found in run_all(arguments):
        if found is None:
            failed.append(name)
            continue
        minutes = (time.monotonic() - began) / 60
        conditions = {"load": load} | describe(arguments, minutes=minutes)
        rows += [row | {"conditions": conditions} for row in found]
        # After every part, so that nothing is lost where a later one fails or is stopped.
        if target is not None:
            write(target, rows, page(rows, conditions))
    if rows:
        print(page(rows, conditions))
    if failed:
        sys.exit(f"these parts failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*PARTS, *OF_A_MODEL)
    parser.add_argument("--only", nargs="+", choices=known, metavar="PART", help=", ".join(known))
    parser.add_argument("--repetitions", type=int, default=None, help="of each side; default 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small batches, one repetition")
    parser.add_argument("--out", type=Path, help="directory for the files")
    parser.add_argument("--model", type=Path, help="checkpoint of a real model, for real_*")
    # How the parent starts a part.
    parser.add_argument("--part", choices=known, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repetitions is None:
        arguments.repetitions = 1 if arguments.quick else 5
    if arguments.model is None and set(arguments.only or ()) & set(OF_A_MODEL):
        parser.error(f"{', '.join(OF_A_MODEL)} measure a real model: --model names its directory")
    if arguments.repetitions < 1 or arguments.threads < 1:
        parser.error("--repetitions and --threads must be at least 1")
    return arguments


def run_all(
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
    """Every chosen part, as it ends, with its rows; None where it failed."""
    chosen = PARTS if arguments.only is None else arguments.only
    with tempfile.TemporaryDirectory() as folder:
        for position, name in enumerate(chosen):
            print(f"[{position + 1}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            command = [sys.executable, str(HERE / "bench.py"), "--part", name, "--folder", folder]
            command += ["--threads", str(arguments.threads)]
            command += ["--repetitions", str(arguments.repetitions)]
            command += ["--quick"] if arguments.quick else []
            command += ["--model", str(arguments.model)] if arguments.model else []
            threads = {"OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, env=os.environ | QUIET | threads)
            seconds = time.monotonic() - began
            print(f"    {name} took {seconds:.0f} s", file=sys.stderr, flush=True)
            rows = Path(folder) / f"{name}.rows.json"
            yield name, None if done.returncode else json.loads(rows.read_text())


def run_part(arguments: argparse.Namespace) -> None:
    """One part, in this process."""
    import torch

    from suite.measure import Options

    torch.set_num_threads(arguments.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    options = Options(
        threads=arguments.threads,
        repetitions=arguments.repetitions,
        quick=arguments.quick,
        folder=arguments.folder,
        model=arguments.model,
    )
    rows = importlib.import_module(f"suite.{arguments.part}").run(options)
    text = json.dumps([row.as_json() for row in rows])
    (arguments.folder / f"{arguments.part}.rows.json").write_text(text)


def describe(arguments: argparse.Namespace, *, minutes: float) -> dict[str, Any]:
    """The conditions of the run, which every row carries."""
    from suite.machine import machine

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "threads": arguments.threads,
        "quick": arguments.quick,
        "minutes": round(minutes, 1),
        "commit": commit(),
        "machine": machine(PACKAGES),
    }


def commit() -> str:
    """Of the code that was measured; with a plus sign where files had been changed."""
    try:
        name = git("rev-parse", "--short=10", "HEAD")
        return name + ("+" if git("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*words: str) -> str:
    """What a git command says about the tree of this file."""
    done = subprocess.run(["git", *words], cwd=HERE, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def fresh(out: Path) -> Path:
    """The dated JSON file of this run, never over an older one."""
    out.mkdir(parents=True, exist_ok=True)
    stem, number = f"bench_{datetime.now(UTC).strftime('%Y-%m-%d')}", 1
    while (target := out / f"{stem}{'' if number == 1 else f'_{number}'}.json").exists():
        number += 1
    return target


def write(target: Path, rows: list[dict[str, Any]], text: str) -> None:
    """The run's files, and in latest.json the newest row of every path."""
    target.write_text(json.dumps(rows, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    latest = target.with_name("latest.json")
    newest = {row["path"]: row for row in json.loads(latest.read_text())} if latest.exists() else {}
    newest |= {row["path"]: row for row in rows}
    latest.write_text(json.dumps(list(newest.values()), indent=1) + "\n")
    print(f"    written: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
