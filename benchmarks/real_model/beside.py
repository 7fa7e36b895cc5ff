"""What stands beside `mopd` on one set of specialists: other estimators, imitation, merging.

Source: benchmarks/README.md, "A real language model".
In one line: `s, T = mopd; s → opd{T}(another estimator); s → sft(T@right); merge{T}`.
Everything up to the specialists, and the student of `mopd` itself, are the stages of that recipe:
run with the same settings in the same store, they are there already. All arms start from the same
SFT checkpoint or average the same specialists, and one evaluation asks all of them the same
problems, together with what they come from: the base, the light SFT of each specialist before its
RL, the specialists.
Left out: a single RL on all domains, which would need the compute of all specialists again.
"""

from posttrain import Recipe, Stage
from posttrain.algorithms import SampledToken, Ties
from posttrain.recipes.mopd import DISTILL_STEPS, specialist


def recipe(r: Recipe, base: str) -> Stage:
    start = r.model(base)
    sft = r.sft(start=start, data=r.demos(r.domains), steps=40, lr=5e-4)
    teachers = {d: specialist(r, d, sft) for d in r.domains}
    traces = r.sample(teachers, prompts=r.prompts(r.domains), k=1, name="traces")
    right = r.select(traces, how="correct", name="right_traces")

    students = {
        "reverse_kl": distilled(r, sft, teachers, "student"),
        "sampled_token": distilled(
            r, sft, teachers, "student_sampled", estimator=SampledToken(), num_minibatches=1
        ),
        "imitation": r.sft(start=sft, data=right, steps=40, name="student_imitation"),
        "average": r.merge(teachers, name="merge_average"),
        "ties": r.merge(teachers, base=sft, how=Ties(), name="merge_ties"),
    }
    before = {f"{d}_before_rl": r.stage(f"{d}_sft") for d in r.domains}
    return r.evaluate(
        students, init=sft, teachers=teachers, along={"base": start} | before, name="comparison"
    )


def distilled(
    r: Recipe, sft: Stage, teachers: dict[str, Stage], name: str, **settings: object
) -> Stage:
    """The student of `mopd`, or one that differs from it in `settings`."""
    settings = {"num_minibatches": 4} | settings
    return r.distill(
        start=sft,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        steps=DISTILL_STEPS["short"],
        lr=1.2e-3,
        max_new_tokens=24,
        name=name,
        **settings,
    )
