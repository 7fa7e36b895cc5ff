"""Real stages that stop at a chosen step, so that a test can kill them there, and their runner.

Started as a program it runs sft, rl, dpo and distill in a store:

    pausing_stages.py STORE MODEL MODEL PAUSES

A checkpoint follows every second step. PAUSES is a directory: where it holds `<stage>-<step>`, the
stage renames that file to `<stage>-<step>.reached` after the step and waits to be killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from posttrain import schedules
from posttrain.algorithms import KL, BestAgainstWorst, InTurn
from posttrain.engine.process import Job
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.recipe import Recipe
from posttrain.rewards.spec import VerifierSpec
from posttrain.stages.worker import PRELOAD
from posttrain.suites.domain import Domain, Suite, Table

STEPS = 6
OPTIM = {"steps": STEPS, "lr": 0.01, "warmup_steps": 1}


def execute(job: Job) -> dict[str, Any]:
    """`run_job` with a checkpoint every second step, and a pause where one is asked for."""
    # Not above: the runner, which imports this file as well, does without torch.
    from posttrain.stages.context import Context, Resumable
    from posttrain.stages.worker import run_job

    pauses = Path(job.environment["PAUSES"])

    def checkpoint(ctx: Context, step: int, learner: Resumable) -> None:
        if step % 2 == 0:
            ctx.save(step, learner)
        pause = pauses / f"{job.name}-{step}"
        if pause.exists():
            pause.rename(f"{pause}.reached")
            time.sleep(600)

    Context.checkpoint = checkpoint  # type: ignore[method-assign]
    return run_job(job)


def main(store: str, start: str, teacher: str, pauses: str) -> None:
    """Run the four stages one after the other."""
    verifier = VerifierSpec(name="regex", options={"pattern": "^[0-9A-Z]"})
    rows = Table(train="rows.jsonl", demo="demo")
    suite = Suite(
        name="mine",
        domains={n: Domain(name=n, source=rows, verifier=verifier) for n in ("one", "two")},
    )
    r = Recipe(suite, Path(pauses).parent)
    base = r.model(start, name="start")
    other = r.model(teacher, name="teacher")
    growing = schedules.on_plateau(5, 13, change=4, metric="loss", patience=1, gain=1e9)
    tuned = r.sft(start=base, data=r.demos(r.domains), batch_size=growing, **OPTIM)
    rollout = {"max_new_tokens": 6, "prompts_per_step": 6, "num_minibatches": 2}
    policy = r.rl(
        start=tuned,
        prompts=r.prompts("one"),
        group_size=4,
        kl=KL(0.1, reference_every=2),
        draw=InTurn(dynamic_sampling=1, retire_above=0.75),
        temperature=schedules.on_plateau(1.0, 1.3, change=0.1, patience=1, gain=9.0),
        **rollout,
        **OPTIM,
    )
    rollouts = r.sample(policy, prompts=r.prompts(r.domains), k=6, num_prompts=30, max_new_tokens=6)
    pairs = r.pairs(rollouts, how=BestAgainstWorst(max_per_prompt=2))
    preferring = r.dpo(start=policy, data=pairs, reference=tuned, batch_size=8, **OPTIM)
    teachers = {"one": preferring, "two": other}
    student = r.distill(
        start=tuned, teachers=teachers, prompts=r.prompts(r.domains), **rollout, **OPTIM
    )
    events = run(
        r.graph(student),
        Store(Path(store)),
        execute=f"{__file__}:execute",
        preload=PRELOAD,
        environment={"PAUSES": pauses, "OMP_NUM_THREADS": "1"},
    )
    for event in events:
        print(event.kind, event.name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
