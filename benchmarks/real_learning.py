"""An SFT step on a real checkpoint: against TRL's SFTTrainer, and against the matrix products.

    python benchmarks/real_learning.py CHECKPOINT
    python benchmarks/real_learning.py CHECKPOINT --peers bfloat16:flat pure:flat --repetitions 1
    python benchmarks/real_learning.py CHECKPOINT --peers none --old ../older-checkout

Rows are problems of GSM-Symbolic in the checkpoint's chat template with their worked answers; the
loss is on the answers, all rows are one step of AdamW. TRL's model is in float32, in float32 with
bfloat16 products (its `bf16`), or wholly in bfloat16, and its rows are padded, or laid end to end.
Each side is a process of its own and they take turns; `--old` is another checkout of this project.
What is judged is the ratio to the fastest form of TRL that was asked for.

The share of the products is counted arithmetic per second over the best rate that products of the
model's own shapes reach in the same process. Counted are 6 operations for each token and weight of
the layers, 6 for each learned token and weight of the head, and 12 for each pair of positions that
see one another, head dimension, query head and layer.

On a busy machine `--threads 1 --clock processor` counts the seconds that the processor worked for
a side, not those that it waited.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGET, SHARE_TARGET = 2.2, 0.65
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TYPES, LAYOUTS = ("float32", "bfloat16", "pure"), ("padded", "flat")
FORMS = tuple(f"{kind}:{layout}" for kind in TYPES for layout in LAYOUTS)
MICRO_BATCH = 4
"""Rows of a forward pass of TRL: its block mask grows with their square, its padding with them."""


def main() -> None:
    """Measure and print, and write a JSON file where --out says."""
    arguments = parse()
    if arguments.serve is not None:
        serve(arguments)
        return
    ours = Served(arguments, HERE.parent, "ours")
    others = {} if arguments.old is None else {"old": Served(arguments, arguments.old, "ours")}
    rows = [against(ours, name, side, arguments.repetitions) for name, side in others.items()]
    for side in others.values():
        side.close()
    for form in arguments.peers:
        if form != "none":
            # One of them at a time: seven models with their optimisers are much memory.
            peer = Served(arguments, HERE.parent, form)
            rows.append(against(ours, f"TRL, {form}", peer, arguments.repetitions))
            peer.close()
    seconds = [second for row in rows for second in row["ours"]]
    seconds = seconds or [ours() for _ in range(arguments.repetitions)]
    rate = ours.facts["operations"] / statistics.median(seconds)
    share = rate / ours.facts["products"]
    print(
        f"share of the products: {share:.0%} (target {SHARE_TARGET:.0%}): {rate / 1e9:.0f} of "
        f"{ours.facts['products'] / 1e9:.0f} GFLOP/s, {ours.facts['tokens']} tokens, "
        f"{ours.facts['learned']} learned"
    )
    ours.close()
    peers = [row for row in rows if row["side"].startswith("TRL")]
    if peers:
        least = min(peers, key=lambda row: row["ratio"])
        print(f"against TRL's fastest: {least['ratio']:.2f} (target {TARGET}), {least['side']}")
    if arguments.out is not None:
        from suite.machine import machine

        conditions = {name: getattr(arguments, name) for name in ("rows", "threads", "clock")}
        conditions |= {"load": os.getloadavg()[0], "machine": machine()}
        found = {"conditions": conditions, "facts": ours.facts, "share": share, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peers", nargs="+", choices=(*FORMS, "none"), default=FORMS)
    parser.add_argument("--old", type=Path, help="another checkout of this project")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3, help="with each of the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    # How the parent starts a side.
    parser.add_argument("--serve", choices=("ours", *FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.old is not None and not (arguments.old / "src" / "posttrain").is_dir():
        # Python would take the package from elsewhere without a word.
        parser.error(f"--old {arguments.old}: no checkout of this project (no src/posttrain)")
    return arguments


def against(ours: Served, name: str, other: Served, repetitions: int) -> dict[str, Any]:
    """Both in turn: seconds of each step, and the ratio of the medians."""
    pairs = [(ours(), other()) for _ in range(repetitions)]
    mine, theirs = (list(series) for series in zip(*pairs, strict=True))
    ratio = statistics.median(theirs) / statistics.median(mine)
    print(
        f"{name}: {statistics.median(theirs):.2f} s against {statistics.median(mine):.2f} s, ",
        end="",
    )
    print(f"ratio {ratio:.2f}, peak memory {other.peak} against {ours.peak} MB", flush=True)
    memory = {"ours_mb": ours.peak, "theirs_mb": other.peak}
    return {"side": name, "ours": mine, "theirs": theirs, "ratio": ratio, **memory}


class Served:
    """One side in a process of its own, which does a step when it is told to."""

    def __init__(self, arguments: argparse.Namespace, tree: Path, side: str) -> None:
        command = [sys.executable, str(HERE / "real_learning.py"), str(arguments.checkpoint)]
        command += ["--serve", side, "--rows", str(arguments.rows)]
        command += ["--threads", str(arguments.threads), "--clock", arguments.clock]
        threads = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": str(tree / "src")},
        )
        self.peak = 0
        """Most memory of the process so far, in MB."""
        self.facts = self._answer()

    def __call__(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak = answer["peak"]
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended without an answer; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# -- in the process of a side ----------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    """One warm-up step, then one for every line on standard input."""
    import resource

    import torch

    # What libraries print belongs to the error stream; answers have the output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(arguments.threads)
    prompts, responses = data(arguments.checkpoint, arguments.rows)
    facts: dict[str, Any] = {}
    if arguments.serve == "ours":
        step, facts = learning(arguments, prompts, responses)
    else:
        step = trl_step(arguments, prompts, responses)
    step()
    print(json.dumps(facts), file=answers, flush=True)
    clock = CLOCKS[arguments.clock]
    for _ in sys.stdin:
        began = clock()
        step()
        seconds = clock() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), file=answers, flush=True)


def data(checkpoint: Path, rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts and of worked answers with their end."""
    import reasoning_gym
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts, responses = [], []
    for row in reasoning_gym.create_dataset("gsm_symbolic", size=rows, seed=0):
        turn = [{"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        answer = tokenizer.encode(row["metadata"]["answer_cot"], add_special_tokens=False)
        responses.append([*answer, tokenizer.eos_token_id])
    return prompts, responses


def learning(
    arguments: argparse.Namespace, prompts: list[list[int]], responses: list[list[int]]
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A step of the sft stage in bfloat16, and what it has to compute."""
    import torch

    from posttrain.backends.base import LearnerSettings, TokenLoss
    from posttrain.backends.local import LocalBackend
    from posttrain.rl.batch import Batch
    from posttrain.stages.aux_losses import token_cross_entropy

    settings = LearnerSettings(
        betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=1.0, dtype=torch.bfloat16
    )
    learner = LocalBackend().learner(arguments.checkpoint, settings)
    batch = Batch.from_tokens(prompts, responses, pad_id=learner.chat.pad_id)
    loss, count = TokenLoss(token_cross_entropy, 1.0), float(batch.num_tokens)
    model: Any = learner.model
    config, layers = model.config, model.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight
    length_B = batch.length_B.double()
    pairs = float((length_B * (length_B + 1) / 2).sum())
    tokens, width = (
        int(batch.length_B.sum()),
        config.num_attention_heads * layers[0].self_attn.head_dim,
    )
    counted = 6 * (weights * tokens + head.numel() * batch.num_tokens)
    facts = {
        "operations": counted + 12 * len(layers) * width * pairs,
        "products": products(layers[0], tokens, CLOCKS[arguments.clock]),
        "tokens": tokens,
        "learned": batch.num_tokens,
    }
    return lambda: learner.update(batch, loss, count=count, lr=1e-6), facts


def products(layer: Any, tokens: int, clock: Callable[[], float]) -> float:
    """Operations per second of the fastest product of a layer's weights with so many tokens, in
    bfloat16, the best of some."""
    import torch

    fastest = 0.0
    for weight in (p.detach() for p in layer.parameters() if p.dim() == 2):
        states = torch.randn(tokens, weight.shape[1]).to(torch.bfloat16)
        for _ in range(20):
            began = clock()
            torch.mm(states, weight.to(torch.bfloat16).T)
            fastest = max(fastest, 2 * tokens * weight.numel() / (clock() - began))
    return fastest


def trl_step(
    arguments: argparse.Namespace, prompts: list[list[int]], responses: list[list[int]]
) -> Callable[[], object]:
    """A step of TRL's SFTTrainer in the form that was asked for."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from suite import peers
    from suite.measure import Work

    kind, _, layout = arguments.serve.partition(":")
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    masks = [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)]
    folder = Path(tempfile.mkdtemp(prefix="posttrain-bench-"))
    settings = peers.common(
        folder, micro_batch=MICRO_BATCH, accumulate=max(1, len(rows) // MICRO_BATCH)
    )
    settings |= {"bf16": kind == "bfloat16", "padding_free": layout == "flat"}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint,
            dtype=torch.bfloat16 if kind == "pure" else torch.float32,
            attn_implementation="sdpa",
        ),
        args=SFTConfig(**settings, max_length=None, dataset_num_proc=None),
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": masks}),
        processing_class=AutoTokenizer.from_pretrained(arguments.checkpoint),
    )
    return peers.Stepper(trainer, lambda _: Work(tokens=sum(map(len, rows)))).step


if __name__ == "__main__":
    main()
