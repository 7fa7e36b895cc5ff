"""Nemotron 3 Ultra: RLVR, a warm-up SFT, and two rounds of MOPD with refreshed and kept teachers.

Source: Nemotron 3 Ultra technical report, post-training, as summarised in NVIDIA-NeMo/Nemotron.
In one line: `s = base → sft → rl[all]; for i in 1..2: T = teachers(s or base) ∪ old T; s = (i = 1:
s → sft(warm-up)) → opd{T}; → sft(trainable = a part)`.
RLVR on all domains makes the student. Teachers have pipelines of their own: one is SFT and RL from
the RLVR model, one RL alone, one goes from the SFT by pivot RL to end-to-end RL; what none covers,
the student itself teaches. A light SFT on the teachers' samples warms the student up. MOPD: one
response per prompt, the teacher's log-ratio as advantage against the policy before the updates, and
a mask on the ratio to the policy that sampled. In the second round half of the teachers
branch from the first round's student, the others are used again.
The report's recovery table is (student - RLVR) / (teacher - RLVR).
Left out: ten and more teachers, agents, safety, MTP. Four domains make four teachers here at most.
"""

from posttrain import Recipe, Stage

RL = {"steps": 30, "lr": 1e-4, "max_new_tokens": 24}


def recipe(r: Recipe, base: str = "tiny", rounds: int = 2) -> Stage:
    sft = r.sft(start=r.base(base), data=r.demos(r.domains), steps=40, lr=5e-4)
    s0 = r.rl(start=sft, prompts=r.prompts(r.domains), steps=50, lr=2e-4, max_new_tokens=24,
              name="rlvr")  # fmt: skip

    pipelines = (rl_alone, long_sft_then_rl, pivot_then_end_to_end)
    covered = r.domains[: max(1, len(r.domains) - 1)]
    teachers: dict[str, Stage] = {}
    student = s0
    for n in range(1, rounds + 1):
        for i, d in enumerate(covered):
            # From the second round on every other teacher is used again.
            if n == 1 or i % 2 == 0:
                teachers[d] = pipelines[i % 3](r, sft if n == 1 else student, student, d, n)
        if n == 1:
            samples = r.sample(teachers, prompts=r.prompts(covered), k=1, num_prompts=500,
                               max_new_tokens=24, name="teacher_samples")  # fmt: skip
            rows = r.select(samples, how="correct", name="warmup_data")
            student = r.sft(start=s0, data=rows, steps=20, lr=3e-4, name="mopd_warmup")
        student = r.distill(
            start=student,
            teachers={d: teachers.get(d, "self") for d in r.domains},
            prompts=r.prompts(r.domains),
            estimator="sampled_token",
            aggregation="token",
            correction="icepop",
            num_minibatches=2,
            samples_per_prompt=1,
            steps=120,
            lr=6e-4,
            max_new_tokens=24,
            name=f"mopd{n}",
        )
    return r.evaluate(student, init=s0, teachers=teachers, max_new_tokens=24)


def long_sft_then_rl(r: Recipe, sft: Stage, student: Stage, domain: str, n: int) -> Stage:
    more = r.sft(start=student, data=r.demos(domain), steps=150, lr=1.5e-3, name=f"{domain}_sft{n}")
    return r.rl(start=more, prompts=r.prompts(domain), name=f"{domain}_teacher{n}", **RL)


def rl_alone(r: Recipe, sft: Stage, student: Stage, domain: str, n: int) -> Stage:
    return r.rl(start=student, prompts=r.prompts(domain), name=f"{domain}_teacher{n}",
                **(RL | {"steps": 60, "lr": 2e-4}))  # fmt: skip


def pivot_then_end_to_end(r: Recipe, sft: Stage, student: Stage, domain: str, n: int) -> Stage:
    more = r.sft(start=sft, data=r.demos(domain), steps=150, lr=1.5e-3, name=f"{domain}_sft{n}")
    pivot = r.rl(start=more, prompts=r.prompts(domain), name=f"{domain}_pivot{n}",
                 **(RL | {"steps": 15, "max_new_tokens": 16}))  # fmt: skip
    return r.rl(start=pivot, prompts=r.prompts(domain), name=f"{domain}_teacher{n}", **RL)
