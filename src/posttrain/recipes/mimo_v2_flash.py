"""MiMo-V2-Flash: six domain teachers and the student itself, merged by MOPD; the loop closes.

Source: MiMo-V2-Flash, arXiv 2601.02780, section 4.
In one line: `for r: s = base → sft; T = {d: s → rl[d]} ∪ {s}; s → opd{T}(+ outcome reward)`.
One SFT in both modes; each teacher is RL of it on its own prompts; what no teacher covers is held
by the student's own start. MOPD starts from the SFT, not from a teacher: the sampled token's
log-ratio to the teacher is the advantage, plus that of the outcome reward, and tokens whose
train-to-sample ratio leaves the band are masked. With rounds=2 teachers are trained anew from the
distilled student (co-evolution).
Left out: agents, judges with rubrics, mixture of experts. A teacher is of a domain and a mode,
since four domains make no six: all that think, and half of those that do not. Each starts with a
light SFT, without which a model this small does not become one. Sizes are scaled down.
"""

from posttrain import Recipe, Stage
from posttrain.algorithms import IcePop

MODES = ("think", "no_think")


def recipe(r: Recipe, base: str = "tiny", rounds: int = 1, alpha: float = 1.0) -> Stage:
    start = r.base(base, thinking=True)
    sft = r.sft(start=start, data=r.demos(r.domains, mode=MODES), steps=40, lr=5e-4)
    taught_twice = r.domains[: (len(r.domains) + 1) // 2]

    student, teachers = sft, {}
    for n in range(1, rounds + 1):
        thinking = {d: teacher(r, student, d, "think", n) for d in r.domains}
        direct = {d: teacher(r, student, d, "no_think", n) for d in taught_twice}
        teachers = {d: {"think": thinking[d], "no_think": direct.get(d, "self")} for d in r.domains}
        student = r.distill(
            start=student,
            teachers=teachers,
            prompts=r.prompts(r.domains, mode=MODES),
            estimator="sampled_token",
            reward_weight=alpha,
            samples_per_prompt=4,
            prompts_per_step=64,
            num_minibatches=2,
            correction=IcePop(high=2.0),
            steps=100,
            lr=5e-4,
            max_new_tokens=48,
            name=f"mopd{n}",
        )
    asked = {"modes": MODES, "num_problems": 200, "max_new_tokens": 48}
    return r.evaluate(student, init=sft, teachers=thinking, **asked)


def teacher(r: Recipe, start: Stage, domain: str, mode: str, n: int) -> Stage:
    """RL of one domain in one mode, after a light SFT on it."""
    light = r.sft(
        start=start,
        data=r.demos(domain, mode=mode),
        steps=100,
        lr=1.5e-3,
        name=f"{domain}_{mode}_sft{n}",
    )
    return r.rl(
        start=light,
        prompts=r.prompts(domain, mode=mode),
        steps=25,
        lr=1e-4,
        max_new_tokens=48,
        name=f"{domain}_{mode}_teacher{n}",
    )
