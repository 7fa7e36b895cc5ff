"""What of a run does not fit the machine, and what would help."""

from __future__ import annotations

from posttrain.backends.given_memory import size_text
from posttrain.engine.atomic import human_bytes
from posttrain.estimate.about import Estimate, StageEstimate

SPARE = 0.95
"""Of the free bytes of a disk."""


def what_does_not_fit(estimate: Estimate) -> list[str]:
    """One sentence each, empty where everything fits."""
    machine = estimate.machine
    # In the words in which it was given.
    share = f"a stage's share is {human_bytes(machine.memory)}"
    limit = f"--memory is {size_text(machine.memory)}" if machine.given else share
    found = [
        _stage(stage, machine.memory, limit)
        for stage in estimate.stages
        if stage.peak > machine.memory
    ]
    total, names = estimate.peak
    if total > machine.total and len(names) > 1:
        found.append(
            f"{', '.join(names)} at once: {human_bytes(total)} of memory, and there are "
            f"{human_bytes(machine.total)}; run fewer stages at once: --jobs {len(names) - 1}"
        )
    if estimate.disk > SPARE * estimate.free:
        found.append(
            f"disk: {human_bytes(estimate.disk)}, and {human_bytes(estimate.free)} are free where "
            "the store is; remove what no recipe needs (posttrain gc), save in bfloat16 "
            "(save_dtype), or give a --store on another disk"
        )
    return found


def _stage(stage: StageEstimate, memory: int, limit: str) -> str:
    memories = {
        "the model that learns": stage.memory.learner,
        "sampling": stage.memory.sampler,
        "models that are read": stage.memory.readers,
    }
    largest = max(memories, key=lambda name: memories[name])
    ways = []
    if stage.precision == "float32" and stage.narrow is not None and stage.narrow < stage.peak:
        left = "" if stage.narrow <= memory else ", which is not enough by itself"
        ways.append(f'precision = "bfloat16" ({human_bytes(stage.narrow)}{left})')
    if stage.memory.learner and stage.may_adapt and not stage.lora:
        ways.append("lora = LoRA(), which keeps moments and gradients for an adapter alone")
    if stage.memory.learner and largest == "the model that learns" and not stage.lora:
        ways.append('optimizer.states = "int8", whose moments take a fourth')
    if largest == "sampling":
        ways.append("a lower max_new_tokens")
    models, most = sum(memories.values()), f"{largest} ({human_bytes(memories[largest])})"
    if stage.peak - models > models:
        # No setting of a stage makes the process itself smaller.
        own = human_bytes(stage.peak - models)
        ways, most = [], f"the process itself, with torch ({own})"
    ways.append("more memory" if not models else "a smaller model or more memory")
    return (
        f"{stage.name}: {human_bytes(stage.peak)} of memory, most of it for {most}, and {limit}; "
        f"what would help: {'; '.join(ways)}"
    )
