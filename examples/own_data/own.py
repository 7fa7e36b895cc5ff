"""Three specialists, two rounds of MOPD, own preferences; merging and traces beside it; one report.

In one line: `g = sft; T = {sums: rl, reverse: sft, order: theirs, chat: self};
g → opd{T} → opd{T with sums anew} → dpo`, and of the same specialists `merge` and `sft(traces)`.
"""

from general import general

from posttrain import Recipe, Stage

SHORT = {"max_new_tokens": 32}


def recipe(
    r: Recipe, base: str = "base", theirs: str = "order-specialist", steps: int = 200
) -> Stage:
    start = general(r, base, steps=500)

    # Three specialists: one by RL, one by SFT, one from elsewhere.
    sums = learn_sums(r, start, steps, name="sums_rl")
    reverse = r.sft(start=start, data=r.demos("reverse"), steps=steps, lr=1e-3, name="reverse_sft")
    order = r.model(theirs, name="order_theirs")
    teachers = {"sums": sums, "reverse": reverse, "order": order, "chat": "self"}

    # Two rounds. For the second one the teacher of sums is trained on, from the student; the others
    # are kept, and chat is held where it is.
    round1 = distill(r, start, teachers, steps, name="round1")
    again = learn_sums(r, round1, steps, name="sums_again")
    round2 = distill(r, round1, teachers | {"sums": again}, steps, name="round2")
    mopd = r.dpo(start=round2, data=r.preferences("thanks"), steps=40, lr=2e-5, name="mopd")

    # What else can be made of the same specialists.
    merged = r.merge([sums, reverse, order], base=start, how="ties")
    specialists = {"sums": sums, "reverse": reverse, "order": order}
    rollouts = r.sample(specialists, prompts=r.prompts(list(specialists)), k=2, max_new_tokens=10)
    traces = r.sft(start=start, data=r.select(rollouts), steps=steps, lr=1e-3, name="traces")

    return r.evaluate(
        {"mopd": mopd, "merged": merged, "traces": traces},
        init=start,
        teachers=specialists,
        along={"round1": round1, "round2": round2},
        **SHORT,
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
        name=name,
        **SHORT,
    )
