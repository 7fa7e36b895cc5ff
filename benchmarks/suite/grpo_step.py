"""One GRPO step (sample, reward, update) against TRL's GRPOTrainer.

No KL penalty, one update per batch, and on both sides the same cheap reward.
"""

from __future__ import annotations

from suite import models, ours, peers, workload
from suite.distill_step import MICRO_BATCH, share
from suite.measure import Options, agreement, interleave, rates
from suite.models import M, S, Size
from suite.rows import Row, compared

STEPS = ((S, 64, 3.3), (M, 8, 2.5))


def run(options: Options) -> list[Row]:
    """One row per size."""
    return [one(options, *step) for step in STEPS]


def one(options: Options, size: Size, prompts: int, target: float) -> Row:
    """One size."""
    count = prompts // 4 if options.quick else prompts
    micro_batch = min(MICRO_BATCH[size.name], count * workload.GROUP)
    texts = workload.texts(size, count)
    policy = models.save(size, options.folder, seed=1)
    mine = ours.Grpo(policy, workload.reward, group=workload.GROUP)
    peer = peers.grpo(
        policy,
        texts,
        workload.reward,
        options.folder,
        group=workload.GROUP,
        micro_batch=micro_batch,
    )
    name = f"GRPO step, {size.name}, {count} prompts x {workload.GROUP}"
    timed = interleave(
        {"ours": lambda i: mine.step(texts, 100 + i), "TRL": peer.step},
        options.repetitions,
        what=name,
    )
    peer.close()
    return compared(
        name,
        "tokens/s",
        rates(timed["ours"]),
        rates(timed["TRL"]),
        peer_name=f"TRL GRPOTrainer, float32, {micro_batch} rows per forward pass",
        target=target,
        limit_share=share(options, size, timed["ours"], count, teacher=False),
        note=agreement(timed["ours"], timed["TRL"]),
    )
