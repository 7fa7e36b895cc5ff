"""Three specialists, two rounds of MOPD, own preferences; merging and traces beside it; one report.

In one line: `g = sft; T = {sums: rl, reverse: sft, order: theirs, chat: self};
g → opd{T} → opd{T with sums anew} → dpo`, and of the same specialists `merge` and `sft(traces)`.
"""

from general import general

from posttrain import Recipe, Stage, judges


def recipe(
    r: Recipe,
    base: str = "base",
    theirs: str = "order-specialist",
    sft_steps: int = 500,
    steps: int = 200,
    beside: bool = True,
) -> Stage:
    start = general(r, base, sft_steps)

    # Three specialists: one by RL, one by SFT, one from elsewhere.
    specialists = {
        "sums": learn_sums(r, start, steps, name="sums_rl"),
        "reverse": r.sft(
            start=start, data=r.demos("reverse"), steps=steps, lr=1e-3, name="reverse_sft"
        ),
        "order": r.model(theirs, name="order_theirs"),
    }

    # Two rounds, with chat held where the student starts. For the second one the teacher of sums is
    # trained on, from the student of the first; the others are kept.
    teachers = specialists | {"chat": "self"}
    round1 = distill(r, start, teachers, steps, name="round1")
    again = learn_sums(r, round1, steps, name="sums_again")
    round2 = distill(r, round1, teachers | {"sums": again}, steps, name="round2")
    warm = r.preferences("warm")
    mopd = r.dpo(start=round2, data=warm, steps=60, lr=3e-5, name="mopd")
    students = {"mopd": mopd}

    # What else can be made of the same specialists.
    if beside:
        prompts = r.prompts(list(specialists))
        rollouts = r.sample(specialists, prompts=prompts, k=2, max_new_tokens=12)
        students["merged"] = r.merge(list(specialists.values()))
        students["traces"] = r.sft(
            start=start, data=r.select(rollouts), steps=steps, lr=1e-3, name="traces"
        )

    return r.evaluate(
        students,
        init=start,
        teachers=specialists,
        along={"round1": round1, "round2": round2},
        judges={"chat": judges.scalar(r.reward_model(start=start, data=warm, epochs=3, lr=3e-4))},
        max_new_tokens=32,
    )


def learn_sums(r: Recipe, start: Stage, steps: int, *, name: str) -> Stage:
    return r.rl(
        start=start,
        prompts=r.prompts("sums"),
        steps=steps,
        lr=2e-4,
        advantage="group_mean",
        max_new_tokens=8,
        name=name,
    )


def distill(r: Recipe, start: Stage, teachers: dict, steps: int, *, name: str) -> Stage:
    return r.distill(
        start=start,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=steps,
        lr=1e-3,
        max_new_tokens=32,
        name=name,
    )
