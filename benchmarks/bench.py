"""The hot paths against TRL, transformers, Liger and the machine's limits, in one go.

    python benchmarks/bench.py                               # everything; `make bench` does this
    python benchmarks/bench.py --only sampling loss          # some parts
    python benchmarks/bench.py --only grpo_step --quick      # does it work? numbers mean nothing

The whole suite writes results/bench_<date>.json (a list of rows), a Markdown page beside it and,
if no part failed, a copy at results/latest.json. A selection prints its rows, and writes them only
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
    began = time.monotonic()
    conditions: dict[str, Any] = {"load": os.getloadavg()[0]}
    rows, failed = run_all(arguments)
    conditions |= describe(arguments, minutes=(time.monotonic() - began) / 60)
    rows = [row | {"conditions": conditions} for row in rows]
    from suite.page import page

    print(page(rows, conditions))
    whole = arguments.only is None and not arguments.quick
    out = arguments.out or (HERE / "results" if whole else None)
    if out is not None:
        write(out, rows, page(rows, conditions), latest=whole and not failed)
    if failed:
        sys.exit(f"these parts failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=None, help="of each side; default 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small batches, one repetition")
    parser.add_argument("--out", type=Path, help="directory for the files")
    # How the parent starts a part.
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repetitions is None:
        arguments.repetitions = 1 if arguments.quick else 5
    if arguments.repetitions < 1 or arguments.threads < 1:
        parser.error("--repetitions and --threads must be at least 1")
    return arguments


def run_all(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all chosen parts, and the names of those that failed."""
    rows: list[dict[str, Any]] = []
    failed = []
    chosen = [name for name in PARTS if arguments.only is None or name in arguments.only]
    with tempfile.TemporaryDirectory() as folder:
        for position, name in enumerate(chosen):
            print(f"[{position + 1}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            command = [sys.executable, str(HERE / "bench.py"), "--part", name, "--folder", folder]
            command += ["--threads", str(arguments.threads)]
            command += ["--repetitions", str(arguments.repetitions)]
            command += ["--quick"] if arguments.quick else []
            threads = {"OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, env=os.environ | QUIET | threads)
            seconds = time.monotonic() - began
            print(f"    {name} took {seconds:.0f} s", file=sys.stderr, flush=True)
            if done.returncode:
                failed.append(name)
            else:
                rows += json.loads((Path(folder) / f"{name}.rows.json").read_text())
    return rows, failed


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
        "machine": machine(PACKAGES),
    }


def write(out: Path, rows: list[dict[str, Any]], text: str, *, latest: bool) -> None:
    """The dated files, never over older ones, and the copy of the newest."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"bench_{rows[0]['conditions']['date'] if rows else 'empty'}"
    number = 1
    while (target := out / f"{stem}{'' if number == 1 else f'_{number}'}.json").exists():
        number += 1
    target.write_text(json.dumps(rows, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    if latest:
        (out / "latest.json").write_text(target.read_text())
    print(f"written: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
