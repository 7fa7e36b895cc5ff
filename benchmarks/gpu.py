"""What one GPU does with a 0.6B model: learning, scoring, a MOPD step with four teachers, sampling.

    python benchmarks/gpu.py                    # all parts, under 8 minutes; `make gpu` does this
    python benchmarks/gpu.py --part learner     # one part
    python benchmarks/gpu.py --device cpu --tiny --out x    # does it work? no numbers

The model is random and shaped like Qwen3-0.6B: 28 layers, 1,024 wide, a tied vocabulary of 151,936.
Its weights are in bfloat16 where they compute and in float32 where they learn. Every part runs in a
process of its own, so that one that runs out of memory leaves the others their numbers, and has the
peak of its memory to itself. The results go to results/gpu_<date>.json and a page beside it.

Legend: B rows, T positions of a row, N sampled tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from suite import machine, models
from suite.models import Size
from suite.rows import Row, alone, not_measured, rounded

HERE = Path(__file__).resolve().parent
QWEN3 = Size(
    name="0.6B",
    vocabulary=151_936,
    hidden=1024,
    layers=28,
    heads=16,
    key_value_heads=8,
    head_dim=128,
    intermediate=3072,
)
TINY = replace(models.S, name="tiny")
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second by the maker's sheet, by a part of the card's name."""
ENDS = 1 / 256
"""Probability that a response ends, at every token: lengths of 256 in the mean."""
PARTS = ("learner", "scoring", "sampling", "mopd")
MINUTES = 7.5
"""No part is begun after this."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the parts have in common."""

    size: Size
    device: str
    folder: Path
    tiny: bool

    def few(self, number: int, tiny: int) -> int:
        """A number, or a small one where only the way is tried."""
        return tiny if self.tiny else number

    def checkpoint(self, seed: int, *, positions: int) -> Path:
        """A directory with the model of this seed, in bfloat16."""
        path = self.folder / f"{self.size.name}-{seed}-{positions}"
        if not path.exists():
            model = models.new_model(self.size, seed=seed, positions=positions, ends=ENDS)
            model.to(torch.bfloat16).save_pretrained(path)
            models.tokenizer(self.size).save_pretrained(path)
        return path


def main() -> None:
    """Run the parts, each in a process of its own, and write what they found."""
    arguments = parse()
    if arguments.inside:
        found = PART[arguments.part](run_of(arguments))
        print(json.dumps([row.as_json() for row in found]))
        return
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="posttrain-gpu-") as folder:
        for name in [arguments.part] if arguments.part else PARTS:
            if (time.monotonic() - began) / 60 > MINUTES:
                late = not_measured(name, "", f"{MINUTES} minutes were over")
                rows.append(late.as_json())
                continue
            rows += in_a_process(name, arguments, Path(folder))
            write(arguments.out, rows, minutes=(time.monotonic() - began) / 60)
    print(page(rows, conditions((time.monotonic() - began) / 60)))


def in_a_process(name: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of one part; one that says why where it failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", "--part", name]
    command += ["--folder", str(folder), "--device", arguments.device]
    command += ["--tiny"] if arguments.tiny else []
    print(f"-- {name}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return [not_measured(name, "", f"ended with exit code {done.returncode}").as_json()]
    found: list[dict[str, Any]] = json.loads(lines[-1])
    return found


# -- parts -----------------------------------------------------------------------------------------


def learner(run: Run) -> list[Row]:
    """Steps of `sft` and `rl` on packed rows of one length: tokens/s and share of the peak."""
    return [
        row for length in (run.few(8192, 64), run.few(16384, 128)) for row in learning(run, length)
    ]


def learning(run: Run, length: int) -> Iterator[Row]:
    """Rows that fill 16,384 tokens (of one row at least) with responses behind 32 of prompt."""
    from suite import ours

    count = max(1, run.few(16384, 128) // length)
    path = run.checkpoint(0, positions=run.few(16384, 256))
    tokens_BT = models.random_words(run.size, rows=count, tokens=length, seed=1)
    for kind in ("sft", "rl"):
        reset(run)
        stage = ours.Packed(path, kind, tokens_BT, device=run.device)
        seconds = timed(run, stage.step, repetitions=run.few(5, 1), warm=run.few(2, 1))
        tokens = tokens_BT.numel()
        rate = [tokens / one for one in seconds]
        shares = {
            "share of peak, 6N and causal attention": flops(run.size, length, causal=True),
            "share of peak, 6N and full attention": flops(run.size, length, causal=False),
        }
        peak = peak_rate(run)
        middle = statistics.median(rate)
        yield alone(
            f"learner, {kind}, rows of {length}, {run.size.name}",
            "tokens/s",
            rate,
            sense=">=",
            details={name: middle * one / peak for name, one in shares.items() if peak}
            | memory(run),
        )


def scoring(run: Run) -> list[Row]:
    """Log-probabilities over the whole vocabulary from one frozen model."""
    from suite import ours

    length, count = run.few(2048, 64), run.few(32, 2)
    path = run.checkpoint(1, positions=run.few(16384, 256))
    tokens_BT = models.random_words(run.size, rows=count, tokens=length, seed=2)
    reader = ours.Reading(path, tokens_BT, device=run.device)
    seconds = timed(run, reader.step, repetitions=run.few(5, 1), warm=1)
    rate = [reader.positions / one for one in seconds]
    goal = None if run.tiny else 100_000.0
    return [
        alone(
            f"teacher scoring over {run.size.vocabulary} words, rows of {length}, {run.size.name}",
            "positions/s",
            rate,
            sense=">=",
            target=goal,
            details=memory(run),
        )
    ]


def sampling(run: Run) -> list[Row]:
    """Responses of 256 tokens in the mean: ours, and transformers' `generate`."""
    from suite import ours

    prompts, group = run.few(64, 2), 4
    path = run.checkpoint(0, positions=run.few(16384, 256))
    words_PT = models.random_words(run.size, rows=prompts, tokens=32, seed=3).tolist()
    most = run.few(512, 16)
    found = {}
    for name, make in (("ours", ours.Drawing), ("generate", ours.Generating)):
        reset(run)
        side = make(path, words_PT, group=group, max_new_tokens=most, device=run.device)
        counts: list[int] = []
        seconds = timed(
            run,
            lambda side=side, counts=counts: counts.append(side.step()),
            repetitions=run.few(2, 1),
            warm=1,
        )
        rates = [count / one for count, one in zip(counts[1:], seconds, strict=True)]
        found[name] = (rates, memory(run))
    mine, theirs = statistics.median(found["ours"][0]), statistics.median(found["generate"][0])
    return [
        replace(
            alone(
                f"sampling {prompts} x {group}, {run.size.name}, bfloat16",
                "tokens/s",
                found["ours"][0],
                sense=">=",
                details=found["ours"][1],
            ),
            peer=theirs,
            peer_name="transformers generate",
            ratio=mine / theirs,
        )
    ]


def mopd(run: Run) -> list[Row]:
    """One step with four teachers: seconds of sampling, scoring and update."""
    from suite import ours, workload

    positions = run.few(16384, 256)
    teachers = {f"d{i}": run.checkpoint(10 + i, positions=positions) for i in range(4)}
    student = run.checkpoint(0, positions=positions)
    texts = workload.texts(run.size, run.few(32, 4))
    stage = ours.Distillation(
        student,
        teachers,
        group=4,
        device=run.device,
        precision="bfloat16",
        max_new_tokens=run.few(512, 16),
    )
    phases: dict[str, list[float]] = {"sampling": [], "scoring": [], "update": []}
    for repetition in range(run.few(3, 1) + 1):
        found = stage.phases(stage.problems(texts), 100 + repetition, lambda: wait(run))
        # The first one warms up.
        for name in phases if repetition else ():
            phases[name].append(found[name])
    middle = {name: statistics.median(values) for name, values in phases.items()}
    whole = [sum(values) for values in zip(*phases.values(), strict=True)]
    return [
        alone(
            f"MOPD step, four teachers, {len(texts)} x 4, {run.size.name}",
            "s",
            whole,
            details={**middle, **memory(run)},
        ),
        Row(
            path=f"share of scoring in a MOPD step with four teachers, {run.size.name}",
            unit="of the step",
            ours=middle["scoring"] / sum(middle.values()),
            sense="<=",
            target=None if run.tiny else 0.2,
        ),
    ]


PART: dict[str, Callable[[Run], list[Row]]] = {
    "learner": learner,
    "scoring": scoring,
    "sampling": sampling,
    "mopd": mopd,
}


# -- counting --------------------------------------------------------------------------------------


def flops(size: Size, length: int, *, causal: bool) -> float:
    """Operations per token of a forward and backward pass over rows of `length`, head included.

    Six for each weight; attention is two products of `heads * head_dim` for each position seen, in
    the forward pass and twice in the backward pass. Recomputed layers are not counted.
    """
    seen = (length + 1) / 2 if causal else length
    return 6 * size.parameters + 12 * size.layers * size.heads * size.head_dim * seen


def peak_rate(run: Run) -> float:
    """bfloat16 operations per second by the maker's sheet; 0 for a card that is not in the list."""
    if run.device != "cuda":
        return 0.0
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAK.items() if part in name), 0.0)


def timed(run: Run, work: Callable[[], object], *, repetitions: int, warm: int) -> list[float]:
    """Seconds of each repetition, after some that are not counted."""
    found = []
    for repetition in range(warm + repetitions):
        wait(run)
        began = time.perf_counter()
        work()
        wait(run)
        if repetition >= warm:
            found.append(time.perf_counter() - began)
    return found


def wait(run: Run) -> None:
    """Until the device has done what it was given."""
    if run.device == "cuda":
        torch.cuda.synchronize()


def reset(run: Run) -> None:
    """Let the peak of memory begin anew."""
    if run.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(run: Run) -> dict[str, float]:
    """The most memory of the device since `reset`, in GiB."""
    if run.device != "cuda":
        return {}
    return {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}


# -- results ---------------------------------------------------------------------------------------


def conditions(minutes: float) -> dict[str, Any]:
    """Where and when."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "card": card}
    found |= {"cuda": torch.version.cuda, "minutes": minutes}
    return found | machine.machine(("posttrain", "torch", "transformers"))


def write(out: Path, rows: list[dict[str, Any]], *, minutes: float) -> None:
    """The rows and a page of them."""
    where = conditions(minutes)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"gpu_{where['date']}"
    content = {"conditions": rounded(where), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page(rows, where), encoding="utf-8")


def page(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """A table for people."""
    head = f"# One GPU: {where['card']}, {where['date']}\n\n"
    head += f"torch {torch.__version__}, CUDA {where['cuda']}, {where['minutes']:.1f} minutes.\n\n"
    lines = ["| what | value | goal | more |", "|---|---|---|---|"]
    for row in rows:
        value = "not measured" if row["ours"] is None else f"{row['ours']:,} {row['unit']}"
        goal = "" if row["target"] is None else f"{row['sense']} {row['target']:,}"
        if row["met"] is not None:
            goal += ": met" if row["met"] else ": missed"
        more = [f"{name} {rounded(one):,}" for name, one in row["details"].items()]
        if row["peer"] is not None:
            more.append(f"{row['peer_name']} {row['peer']:,}, ratio {row['ratio']}")
        more += [row["note"]] if row["note"] else []
        lines.append(f"| {row['path']} | {value} | {goal} | {'; '.join(more)} |")
    return head + "\n".join(lines) + "\n"


def run_of(arguments: argparse.Namespace) -> Run:
    """What the arguments ask for."""
    size = TINY if arguments.tiny else QWEN3
    return Run(size=size, device=arguments.device, folder=arguments.folder, tiny=arguments.tiny)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model: does it work?")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --tiny tries the way on a CPU")
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("on a CPU only --tiny: the others take hours there")
    return arguments


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
