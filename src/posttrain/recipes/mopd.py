"""Multi-teacher on-policy distillation: one specialist per domain, merged into one student.

Source: MOPD, arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780, section 4.
In one line: `s = base → sft; T = {d: s → sft(d) → rl[d]}; s → opd{T}`.
Base, one general SFT, then per domain a light SFT and RL on that domain only, all from the same SFT
checkpoint. The student starts there too, answers prompts of all domains itself, and the teacher of
each prompt's domain corrects it token by token.
Left out: outcome reward in the distillation (set student.reward_weight), a second round.
"""

from typing import Literal

from posttrain import Recipe, Stage

DISTILL_STEPS = {"short": 430, "long": 1200}


def recipe(r: Recipe, base: str = "tiny", budget: Literal["short", "long"] = "short") -> Stage:
    if base == "tiny":
        start = r.pretrain(data=r.demos(r.domains), steps=350, lr=4e-3, loss_on="response")
    else:
        start = r.model(base)
    sft = r.sft(start=start, data=r.demos(r.domains), steps=40, lr=5e-4)

    teachers = {d: specialist(r, d, sft) for d in r.domains}
    student = r.distill(
        start=sft,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=DISTILL_STEPS[budget],
        lr=1.2e-3,
        num_minibatches=4,
        max_new_tokens=24,
    )
    return r.evaluate(student, teachers=teachers, init=sft, max_new_tokens=24)


def specialist(r: Recipe, domain: str, sft: Stage) -> Stage:
    light = r.sft(
        start=sft,
        data=r.demos(domain),
        steps=150,
        batch_size=128,
        lr=1.5e-3,
        name=f"{domain}_sft",
    )
    return r.rl(
        start=light,
        prompts=r.prompts(domain),
        steps=50,
        lr=1e-4,
        advantage="group_mean",
        max_new_tokens=24,
        name=f"{domain}_teacher",
    )
