"""Whole steps of a real model against TRL: GRPO, and on-policy distillation from one teacher.

The questions are reasoning-gym's `gsm_symbolic`, asked through the model's chat template; responses
have 128 tokens at most. Ours computes in bfloat16. TRL is given its best type: before the timing it
takes one step with float32 weights, with bfloat16 by autocast, and with bfloat16 weights; the
quickest is the peer. The teacher is the model with noise on its weights, so that there is something
to learn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reasoning_gym import create_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from suite import ours, peers, workload
from suite.measure import Options, Side, agreement, interleave, rates, say
from suite.peers import Asked
from suite.rows import Row, compared

PROMPTS = 16
TYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 by autocast": {"bf16": True},
    "bfloat16 weights": {"dtype": torch.bfloat16},
}
"""How TRL may compute."""
NOISE = 0.02
"""Of the teacher's weights, as a share of each tensor's standard deviation."""


def run(options: Options) -> list[Row]:
    """One row for GRPO, one for distillation."""
    assert options.model is not None, "bench.py asks for it"
    return [grpo(options, options.model), distillation(options, options.model)]


def grpo(options: Options, model: Path) -> Row:
    """16 questions, 8 responses each."""
    count, group = (2, 2) if options.quick else (PROMPTS, 8)
    asked = questions(count)
    mine = ours.Grpo(model, workload.reward, group=group, precision="bfloat16")

    def peer(how: dict[str, Any]) -> peers.Stepper:
        return peers.grpo(
            model,
            [conversation(text) for text in asked],
            workload.reward,
            options.folder,
            group=group,
            micro_batch=min(16, count * group),
            **how,
        )

    name = f"GRPO step, {model.name}, {count} prompts x {group}"
    return against(options, name, lambda i: mine.step(asked, 100 + i), peer, "GRPOTrainer", 2.5)


def distillation(options: Options, model: Path) -> Row:
    """16 questions, 2 responses each, the exact reverse KL to one teacher."""
    count, group = (2, 2) if options.quick else (PROMPTS, 2)
    asked, teacher = questions(count), noisy(model, options.folder)
    mine = ours.Distillation(model, {"words": teacher}, group=group, precision="bfloat16")
    problems = mine.problems(asked)

    def peer(how: dict[str, Any]) -> peers.Stepper:
        return peers.distillation(
            model,
            teacher,
            [conversation(text) for text in asked],
            options.folder,
            group=group,
            micro_batch=min(16, count * group),
            **how,
        )

    name = f"distillation step, {model.name}, {count} prompts x {group}"
    step: Side = lambda i: mine.step(problems, 100 + i)  # noqa: E731
    return against(options, name, step, peer, "DistillationTrainer", 3.5)


def against(
    options: Options,
    name: str,
    mine: Side,
    peer: Callable[[dict[str, Any]], peers.Stepper],
    trainer: str,
    target: float,
) -> Row:
    """Our steps and those of TRL in its quickest type, in turn."""
    seconds: dict[str, float] = {}
    for kind, how in TYPES.items():
        stepper = peer(how)
        began = time.perf_counter()
        work = stepper.step()
        # By token: lengths differ from step to step.
        seconds[kind] = (time.perf_counter() - began) / work.tokens
        stepper.close()
        say(f"{name}  TRL, {kind}: {work.tokens / (time.perf_counter() - began):.1f} tokens/s")
    best = min(seconds, key=lambda kind: seconds[kind])
    stepper = peer(TYPES[best])
    timed = interleave({"ours": mine, "TRL": stepper.step}, options.repetitions, what=name)
    stepper.close()
    took = statistics.median(one.seconds for one in timed["ours"])
    theirs = statistics.median(one.seconds for one in timed["TRL"])
    return compared(
        name,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["TRL"]),
        peer_name=f"TRL {trainer}, {best}",
        target=target,
        note=f"{took:.1f} and {theirs:.1f} s a step; {agreement(timed['ours'], timed['TRL'])}",
        details={f"TRL, tokens/s in one step, {kind}": 1 / one for kind, one in seconds.items()},
    )


def questions(count: int) -> list[str]:
    """Word problems."""
    data = create_dataset("gsm_symbolic", size=count, seed=7)
    return [data[number]["question"] for number in range(count)]


def conversation(text: str) -> Asked:
    """A question as the chat template takes it."""
    return [{"role": "user", "content": text}]


@torch.no_grad()
def noisy(model: Path, folder: Path) -> Path:
    """A checkpoint with noise on the weights of `model`; made once per folder."""
    path = folder / f"{model.name}-teacher"
    if not path.exists():
        torch.manual_seed(1)
        found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        for weight in found.parameters():
            if weight.dim() == 2:
                weight += NOISE * weight.float().std() * torch.randn_like(weight)
        found.save_pretrained(path)
        AutoTokenizer.from_pretrained(model).save_pretrained(path)
    return path
