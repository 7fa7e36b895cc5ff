"""Multi-teacher on-policy distillation: one specialist per domain, merged into one student.

Source: MOPD, arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780, section 4.
Base, one general SFT, then per domain a light SFT and RL on that domain only, all from the same SFT
checkpoint; the student starts there too, samples its own responses, and each prompt's teacher
corrects them token by token.
"""

from posttrain import Recipe

BUDGETS = {"short": {"pretrain": 400, "distill": 120},
           "long": {"pretrain": 400, "distill": 400}}


def recipe(r: Recipe, base: str = "tiny", budget: str = "short"):
    steps = BUDGETS[budget]
    if base == "tiny":
        start = r.pretrain(
            data=r.demos(r.domains), steps=steps["pretrain"], lr=4e-3, loss_on="response"
        )
    else:
        start = r.model(base)
    s = r.sft(start=start, data=r.demos(r.domains), steps=40, lr=5e-4)
    teachers = {}
    for d in r.domains:
        light = r.sft(start=s, data=r.demos(d), steps=150, batch_size=128, lr=2e-3, name=f"{d}_sft")
        teachers[d] = r.rl(
            start=light,
            prompts=r.prompts(d),
            steps=40,
            lr=3e-4,
            max_new_tokens=24,
            name=f"{d}_teacher",
        )
    student = r.distill(
        start=s,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=steps["distill"],
        lr=1.5e-3,
        updates_per_batch=4,
        max_new_tokens=24,
    )
    return r.evaluate(student, teachers=teachers, init=s, max_new_tokens=24)
