"""The most memory that supervised fine-tuning takes, against TRL, on a real checkpoint.

    python benchmarks/memory.py MODEL                        # prints a table
    python benchmarks/memory.py MODEL --only ours-bf16 trl-mixed-checkpointed
    python benchmarks/memory.py MODEL --out benchmarks/results

Every line is a process of its own that trains two steps of 16 rows of gsm_symbolic with worked
answers, saves the model, and tells the most memory it ever had (`ru_maxrss`). Ours is the stage as
`posttrain run` starts it, with its step checkpoints. TRL's is the trainer as its examples call it,
without step checkpoints; its optimiser is torch's fused AdamW on both sides.

MODEL is the directory of a checkpoint, such as SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from suite.machine import machine

BATCH, STEPS, SEED = 16, 2, 7
LR = 1e-5

OURS: dict[str, dict[str, Any]] = {
    "ours-fp32": {},
    "ours-bf16": {"precision": "bfloat16"},
    "ours-bf16-3GB": {"precision": "bfloat16", "memory": "3GB"},
    "ours-bf16-stochastic": {"precision": "bfloat16", "optimizer": {"master": "stochastic"}},
    "ours-bf16-stochastic-2GB": {
        "precision": "bfloat16",
        "optimizer": {"master": "stochastic"},
        "memory": "2GB",
    },
    "ours-bf16-int8-3GB": {
        "precision": "bfloat16",
        "optimizer": {"states": "int8"},
        "memory": "3GB",
    },
    "ours-bf16-stochastic-int8-2GB": {
        "precision": "bfloat16",
        "optimizer": {"states": "int8", "master": "stochastic"},
        "memory": "2GB",
    },
}
"""Settings of the stage; `memory` is the budget, which is none."""
TRL: dict[str, dict[str, Any]] = {
    "trl-fp32": {"dtype": "float32"},
    "trl-fp32-checkpointed": {"dtype": "float32", "gradient_checkpointing": True},
    "trl-mixed": {"dtype": "float32", "bf16": True},
    "trl-mixed-checkpointed": {"dtype": "float32", "bf16": True, "gradient_checkpointing": True},
    "trl-mixed-checkpointed-4-rows": {
        "dtype": "float32",
        "bf16": True,
        "gradient_checkpointing": True,
        "micro_batch": 4,
    },
    "trl-mixed-checkpointed-1-row": {
        "dtype": "float32",
        "bf16": True,
        "gradient_checkpointing": True,
        "micro_batch": 1,
    },
    "trl-pure": {"dtype": "bfloat16"},
    "trl-pure-checkpointed": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "trl-pure-checkpointed-4-rows": {
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "micro_batch": 4,
    },
    "trl-pure-checkpointed-1-row": {
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "micro_batch": 1,
    },
}
"""`dtype` of the weights, the rest are fields of SFTConfig; `micro_batch` rows at a time."""


def problems() -> list[dict[str, str]]:
    """Rows for all steps: question and worked answer."""
    import reasoning_gym

    found = reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=BATCH * STEPS)
    return [{"prompt": one["question"], "demo": one["metadata"]["answer_cot"]} for one in found]


def ours(model: Path, folder: Path, how: Mapping[str, Any], lora: int | None) -> None:
    """Our stage, in this process."""
    from posttrain.engine.process import Job
    from posttrain.stages.config import build_config
    from posttrain.stages.worker import run_job

    data, start = folder / "data", folder / "start"
    data.mkdir()
    start.mkdir()
    for file in model.iterdir():
        (start / file.name).symlink_to(file.absolute())
    for path, kind in ((data, "select"), (start, "model")):
        record = {"format": 1, "name": path.name, "kind": kind, "fingerprint": "1" * 64}
        (path / "record.json").write_text(json.dumps(record))
    rows = [row | {"id": str(i), "domain": "gsm"} for i, row in enumerate(problems())]
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = dict(how)
    environment = {"POSTTRAIN_MEMORY": how.pop("memory")} if "memory" in how else {}
    settings = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "seed": SEED} | how
    if lora is not None:
        settings["lora"] = {"rank": lora}
    os.environ.update(environment)
    work = folder / "work"
    (work / "out").mkdir(parents=True)
    job = Job(
        name="sft",
        kind="sft",
        version=1,
        fingerprint="0" * 64,
        config=build_config("sft", "sft", settings).to_json(),
        data={},
        runtime={},
        inputs={"start": str(start), "data": str(data)},
        work=str(work),
        out=str(work / "out"),
        threads=len(os.sched_getaffinity(0)) if "OMP_NUM_THREADS" not in os.environ else 1,
        hashes=str(folder / "hashes.json"),
        environment=environment,
    )
    run_job(job)


def trl(model: Path, folder: Path, how: Mapping[str, Any], lora: int | None) -> None:
    """TRL's trainer, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for row in problems():
        asked = [{"role": "user", "content": row["prompt"]}]
        told = [*asked, {"role": "assistant", "content": row["demo"]}]
        head = tokenizer.apply_chat_template(
            asked, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(told, tokenize=True, return_dict=False)
        rows["input_ids"].append(whole)
        rows["completion_mask"].append([int(i >= len(head)) for i in range(len(whole))])
    how = {"gradient_checkpointing": False, "bf16": False} | dict(how)
    micro_batch, dtype = how.pop("micro_batch", BATCH), getattr(torch, how.pop("dtype"))
    arguments = SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        max_steps=STEPS,
        learning_rate=LR,
        max_length=None,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=SEED,
        **how,
    )
    peft_config = None
    if lora is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()


def measure(name: str, model: Path, lora: int | None) -> dict[str, Any]:
    """One line of the table, in a process of its own."""
    command = [sys.executable, __file__, str(model), "--one", name]
    command += ["--lora", str(lora)] if lora is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"name": name, "failed": done.stderr.strip().splitlines()[-3:]}
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, model: Path, lora: int | None) -> dict[str, Any]:
    """What `measure` starts."""
    began = time.perf_counter()
    run: Callable[..., None] = ours if name in OURS else trl
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        run(model, Path(folder), {**OURS, **TRL}[name], lora)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - began
    return {"name": name, "peak": peak, "seconds": round(seconds, 1), "lora": lora}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = ["| process | peak, MB | seconds in all |", "|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {' '.join(row['failed'])} | |")
        else:
            lines.append(f"| {row['name']} | {row['peak'] / 1e6:,.0f} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *TRL], default=[*OURS, *TRL])
    parser.add_argument("--lora", type=int, help="rank of adapters; without it all weights learn")
    parser.add_argument("--out", type=Path, help="directory for the result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.model, given.lora)))
        return
    rows = []
    for name in given.only:
        rows.append(measure(name, given.model, given.lora))
        print(page(rows[-1:]).splitlines()[-1], flush=True)
    if given.out:
        place = given.out / f"memory_{datetime.now(UTC):%Y-%m-%d}{'_lora' * bool(given.lora)}"
        told = {"conditions": machine(("torch", "transformers", "trl")), "rows": rows}
        place.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        place.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
