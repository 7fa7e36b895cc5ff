"""What adapters take: many specialists on one base, an SFT step, and sampling.

    python benchmarks/lora.py                          # all parts, a summary on the terminal
    python benchmarks/lora.py --out benchmarks/results
    python benchmarks/lora.py --model DIR --parts specialists,sampling --precisions bfloat16

The model is a checkpoint, or without --model a random one with the shape of SmolLM2-135M, stored in
bfloat16. Every side of a comparison of memory is a fresh process; what is compared is the most
memory that it ever had (`ru_maxrss`).

- specialists: a student with an adapter learns, and teachers read its rows: one model that is the
  student's own base, then eight adapters on that base, then eight whole models.
- sft: three steps with all weights, then with an adapter; then the same with TRL's SFTTrainer.
- sampling: an adapter on its base against the same weights merged, in turn, in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite.machine import machine
from suite.models import SMOLLM2, new_model, tokenizer

SPECIALISTS = 8
LIMIT = 1.3
"""What a student and eight specialists may take, times what one model takes."""
RANK = 16
PARTS = {
    "specialists": ("one model", "8 adapters", "8 whole models"),
    "sft": ("full", "adapter", "TRL full", "TRL adapter"),
    "sampling": ("adapter against merged",),
}


def learner_settings(precision: str, *, adapter: bool, seed: int = 0) -> Any:
    """How a learner of a benchmark learns."""
    from posttrain.backends.base import LearnerSettings, LoraSettings

    return LearnerSettings(
        betas=(0.9, 0.98),
        weight_decay=0.0,
        max_grad_norm=1.0,
        dtype=getattr(torch, precision),
        lora=LoraSettings(rank=RANK, alpha=32.0, seed=seed) if adapter else None,
    )


def rows(seed: int, vocabulary: int, count: int) -> Any:
    """Rows of 64 tokens of a prompt and 128 of a response."""
    from posttrain.rl.batch import Batch

    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(100, vocabulary - 100, (count, 192), generator=generator)
    return Batch.from_tokens(tokens_BT[:, :64].tolist(), tokens_BT[:, 64:].tolist(), pad_id=0)


def cross_entropy(_: Any, logp_N: Tensor, entropy_N: Tensor, batch: Any) -> Any:
    """The loss of every step here."""
    return -logp_N.sum(), {"loss": -logp_N.sum().detach()}


def specialists(asked: dict[str, Any]) -> dict[str, float]:
    """One process of the part `specialists`."""
    from posttrain.backends.base import TokenLoss
    from posttrain.backends.local import LocalBackend

    backend, base = LocalBackend(), Path(asked["model"])
    dtype = getattr(torch, asked["precision"])
    learner = backend.learner(base, learner_settings(asked["precision"], adapter=True))
    folder = {"8 adapters": "adapter", "8 whole models": "whole"}.get(asked["side"])
    places = [Path(asked["root"]) / f"{folder}{number}" for number in range(SPECIALISTS)]
    teachers = [backend.scorer(place, dtype=dtype) for place in (places if folder else [base])]
    vocabulary = len(learner.chat.ids)
    for step in range(asked["steps"]):
        batch = rows(step, vocabulary, asked["rows"])
        for teacher in teachers:
            teacher.logprobs(batch)
        learner.update(batch, TokenLoss(cross_entropy), count=batch.num_tokens, lr=1e-4)
    return {}


def sft(asked: dict[str, Any]) -> dict[str, float]:
    """One process of the part `sft`, ours."""
    from posttrain.backends.base import TokenLoss
    from posttrain.backends.local import LocalBackend

    settings = learner_settings(asked["precision"], adapter=asked["side"] == "adapter")
    learner = LocalBackend().learner(Path(asked["model"]), settings)
    vocabulary, seconds = len(learner.chat.ids), []
    for step in range(asked["steps"]):
        batch, began = rows(step, vocabulary, asked["rows"]), time.monotonic()
        learner.update(batch, TokenLoss(cross_entropy), count=batch.num_tokens, lr=1e-4)
        seconds.append(time.monotonic() - began)
    return {"seconds": min(seconds)}


def trl_sft(asked: dict[str, Any]) -> dict[str, float]:
    """One process of the part `sft`, TRL's, with the same tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    own = AutoTokenizer.from_pretrained(asked["model"])
    own.pad_token = own.pad_token or own.eos_token
    ids: list[list[int]] = []
    for step in range(asked["steps"]):
        ids += rows(step, len(own), asked["rows"]).tokens_BT.tolist()
    config = SFTConfig(
        output_dir=str(Path(asked["root"]) / "trl"),
        per_device_train_batch_size=asked["rows"],
        max_steps=asked["steps"],
        max_length=256,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=asked["precision"] == "bfloat16",
        logging_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=own,
        peft_config=lora if asked["side"] == "TRL adapter" else None,
    )
    began = time.monotonic()
    trainer.train()
    return {"seconds": (time.monotonic() - began) / asked["steps"]}


def sampling(asked: dict[str, Any]) -> dict[str, float]:
    """Seconds of 64 responses of 64 tokens, with the adapter and with merged weights in turn."""
    from posttrain.backends.local import LocalBackend, LocalSampler
    from posttrain.backends.shared import own_copy

    backend = LocalBackend()
    settings = learner_settings(asked["precision"], adapter=True)
    learner = backend.learner(Path(asked["root"]) / "adapter0", settings)
    merged = own_copy(learner.policy, learner)
    samplers = {"adapter": backend.sampler(learner), "merged": LocalSampler(merged)}
    prompts = rows(0, len(learner.chat.ids), asked["rows"]).tokens_BT[:, :64].tolist()
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(asked["turns"] + 1):
        for name in sorted(samplers, reverse=bool(turn % 2)):
            began = time.monotonic()
            found = samplers[name].sample(
                prompts, group_size=4, max_new_tokens=64, temperature=1.0, seed=turn
            )
            assert found.num_tokens
            seconds[name].append((time.monotonic() - began) / found.num_tokens)
    # The first turn warms up.
    found = {name: min(times[1:]) for name, times in seconds.items()}
    return {"ratio": found["adapter"] / found["merged"], "tokens/s": 1 / found["adapter"]}


def make_adapters(model: Path, root: Path, *, whole: bool) -> None:
    """Eight adapters that say something, and the same as whole models."""
    from posttrain.backends.checkpoint import load, save
    from posttrain.backends.local import LocalBackend

    backend = LocalBackend()
    for number in range(SPECIALISTS):
        settings = learner_settings("float32", adapter=True, seed=number)
        learner = backend.learner(model, settings)
        with torch.no_grad():
            for parameter in learner.parameters:
                parameter.add_(0.002)
        learner.save(root / f"adapter{number}")
        if whole:
            save(load(root / f"adapter{number}"), root / f"whole{number}", types="bfloat16")


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one side, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asked)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_child(asked: dict[str, Any]) -> None:
    """Compute one side and print what it took."""
    if asked["part"] == "make":
        make_adapters(Path(asked["model"]), Path(asked["root"]), whole=asked["whole"])
        print(json.dumps({}))
        return
    run = {"specialists": specialists, "sampling": sampling}.get(asked["part"], sft)
    run = trl_sft if asked["side"].startswith("TRL") else run
    found = run(asked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="Rows of a step.")
    parser.add_argument("--sides", help="Some sides of the parts, such as 'one model,8 adapters'.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.child)
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = options.model
        if model is None:
            model = root / "model"
            new_model(SMOLLM2, seed=0).to(torch.bfloat16).save_pretrained(model)
            tokenizer(SMOLLM2).save_pretrained(model)
        parts = options.parts.split(",")
        place = {
            "model": str(model.resolve()),
            "root": str(root),
            "turns": options.turns,
            "rows": options.rows,
            "steps": options.steps,
        }
        sides = options.sides.split(",") if options.sides else sum(PARTS.values(), ())
        if {"specialists", "sampling"} & set(parts):
            measure({"part": "make", "whole": "8 whole models" in sides, "side": "", **place})
        for part in parts:
            for precision in options.precisions.split(","):
                for side in (side for side in PARTS[part] if side in sides):
                    asked = {"part": part, "side": side, "precision": precision, **place}
                    found = {"part": part, "side": side, "precision": precision, **measure(asked)}
                    results.append(found)
                    print(told(found, results), flush=True)
    if options.out is not None:
        about = {
            "model": options.model.name if options.model else SMOLLM2.name,
            "limit": LIMIT,
            "rows": options.rows,
            "steps": options.steps,
        }
        content = {
            "machine": machine(),
            "date": datetime.now(UTC).date().isoformat(),
            **about,
            "results": results,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"lora_{content['date']}.json").write_text(
            json.dumps(content, indent=1) + "\n"
        )


def told(found: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """A line about one side, relative to the first of its part."""
    same = ("part", "precision")
    first = next(one for one in results if all(one[key] == found[key] for key in same))
    peak = found["peak_bytes"]
    line = f"{found['part']:<12}{found['precision']:<10}{found['side']:<24}{peak / 2**20:7.0f} MiB"
    line += f" {peak / first['peak_bytes']:5.2f}"
    for name in ("seconds", "ratio", "tokens/s"):
        line += f"  {name} {found[name]:.3g}" if name in found else ""
    return line


if __name__ == "__main__":
    main()
