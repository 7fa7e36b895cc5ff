"""Sampling of a real checkpoint against transformers' `generate`, in bfloat16 and in float32.

    python benchmarks/real_sampling.py CHECKPOINT
    python benchmarks/real_sampling.py CHECKPOINT --peers bfloat16 --repetitions 1
    python benchmarks/real_sampling.py CHECKPOINT --peers none --rows 64 128 256

Problems of GSM-Symbolic through the checkpoint's chat template, several samples of each, at
temperature 1 without top-k; every response has the same number of tokens, for nothing ends one
here. `generate` has all rows in one batch, padded on the left. Sides take turns, each in a process
of its own; what is judged is the ratio to the faster type of `generate`. On a busy machine
`--threads 1 --clock processor` counts the seconds that the processor worked for a side, not those
that it waited. `--rows` says how many rows ours samples at once. `--old` is another checkout of
this project, whose sampler takes its turns as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGET = 4.0
WARM_UP = 4
"""Tokens of a response in the untimed repetition of each side."""

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Side = Callable[[int], None]
"""Samples all prompts, so many tokens each."""


def main() -> None:
    """Measure and print, and write a JSON file where --out says."""
    arguments = parse()
    if arguments.serve:
        serve(arguments)
        return
    sides = {}
    for rows in arguments.rows:
        sides[f"ours, bfloat16, {rows} rows"] = Served(arguments, HERE.parent, rows)
    if arguments.old is not None:
        sides["old, bfloat16"] = Served(arguments, arguments.old, arguments.rows[0])
    for peer in arguments.peers:
        if peer != "none":
            sides[f"generate, {peer}"] = Served(arguments, HERE.parent, None, peer)
    tokens = arguments.prompts * arguments.group * arguments.tokens
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(WARM_UP)
    for repetition in range(arguments.repetitions):
        for name, side in sides.items():
            seconds = side(arguments.tokens)
            rates[name].append(tokens / seconds)
            rate = tokens / seconds
            print(f"{repetition + 1}: {name}: {seconds:.1f} s, {rate:.0f} tokens/s", flush=True)
    for side in sides.values():
        side.close()
    report(arguments, rates)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=4, help="samples of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of each response")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rows", type=int, nargs="+", default=[256], help="at once, ours")
    parser.add_argument(
        "--peers", nargs="+", default=["bfloat16", "float32"],
        choices=["bfloat16", "float32", "none"],
    )  # fmt: skip
    parser.add_argument("--old", type=Path, help="another checkout, to be measured beside")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    # How a side is started: each one in a process of its own, with the code of one checkout.
    parser.add_argument("--serve", choices=["ours", "generate"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.old is not None and not (arguments.old / "src" / "posttrain").is_dir():
        # Python would take the package from elsewhere without a word.
        parser.error(f"--old {arguments.old}: no checkout of this project (no src/posttrain)")
    return arguments


class Served:
    """One side, in a process that waits for its turns."""

    def __init__(
        self, arguments: argparse.Namespace, tree: Path, rows: int | None, dtype: str = "bfloat16"
    ) -> None:
        command = [sys.executable, __file__, str(arguments.checkpoint), "--dtype", dtype]
        command += ["--serve", "generate" if rows is None else "ours", "--rows", str(rows or 0)]
        for name in ("prompts", "group", "threads", "clock"):
            command += [f"--{name}", str(getattr(arguments, name))]
        environment = os.environ | {
            "PYTHONPATH": str(tree / "src"),
            "OMP_NUM_THREADS": str(arguments.threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, tokens: int) -> float:
        """Sample responses of so many tokens; returns the seconds that it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(tokens, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended without an answer")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(arguments: argparse.Namespace) -> None:
    """Answer each number of tokens on standard input with the seconds of sampling so many."""
    import torch

    torch.set_num_threads(arguments.threads)
    prompts = prompts_of(arguments.checkpoint, arguments.prompts)
    make = {"ours": ours, "generate": generate}[arguments.serve]
    sample = make(arguments, prompts, getattr(torch, arguments.dtype))
    for line in sys.stdin:
        clock = CLOCKS[arguments.clock]
        began = clock()
        sample(int(line))
        print(clock() - began, flush=True)


def prompts_of(checkpoint: Path, count: int) -> list[list[int]]:
    """Token ids of so many problems, as the checkpoint's template asks them."""
    import reasoning_gym
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=0)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem["question"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in problems
    ]


def ours(arguments: argparse.Namespace, prompts: list[list[int]], dtype: Any) -> Side:
    """The sampler of the local backend."""
    from posttrain.backends.local import LocalBackend

    sampler = LocalBackend().sampler(arguments.checkpoint, dtype=dtype)
    sampler.max_rows = arguments.rows[0]
    # No token ends a response.
    sampler.chat.stop_ids = ()

    def sample(tokens: int) -> None:
        batch = sampler.sample(
            prompts, group_size=arguments.group, max_new_tokens=tokens, temperature=1.0, seed=tokens
        )
        assert batch.num_tokens == len(prompts) * arguments.group * tokens

    return sample


def generate(arguments: argparse.Namespace, prompts: list[list[int]], dtype: Any) -> Side:
    """transformers, as TRL's trainers call it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype).eval()
    width = max(map(len, prompts))
    rows = [row for row in prompts for _ in range(arguments.group)]
    ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    # No token ends a response.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def sample(tokens: int) -> None:
        torch.manual_seed(tokens)
        with torch.inference_mode():
            out_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=tokens,
            )
        assert out_BT.shape[1] == width + tokens

    return sample


def report(arguments: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    """Medians, and the ratio of our first side to every other one."""
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    first = next(iter(medians))
    ratios = {name: medians[first] / rate for name, rate in medians.items() if name != first}
    for name, rate in medians.items():
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        ratio = f", {first} is {ratios[name]:.2f} times it" if name in ratios else ""
        print(f"{name}: {rate:.0f} tokens/s ({spread}){ratio}")
    against = [ratio for name, ratio in ratios.items() if name.startswith("generate")]
    judged = min(against) if against else None
    if judged is not None:
        verdict = "reached" if judged >= TARGET else "missed"
        print(f"against generate in its faster type: {judged:.2f} times; {TARGET} is {verdict}")
    if arguments.out is not None:
        from suite.machine import machine

        found = {
            "checkpoint": arguments.checkpoint.name,
            "setting": {
                name: getattr(arguments, name)
                for name in (
                    "prompts",
                    "group",
                    "tokens",
                    "repetitions",
                    "threads",
                    "clock",
                    "rows",
                )
            },
            "tokens_per_second": rates,
            "ratios": ratios,
            "judged": judged,
            "target": TARGET,
            "load": os.getloadavg()[0],
            "machine": machine(("posttrain", "torch", "transformers")),
        }
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
