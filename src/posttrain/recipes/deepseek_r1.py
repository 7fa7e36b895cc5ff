"""DeepSeek-R1: cold start from R1-Zero, reasoning RL, the base again, RL for all scenarios.

Source: DeepSeek-R1, arXiv 2501.12948, sections 2.3 and 2.4; Dev1 to Dev3 as in the Nature
version.
In one line: `z = base → rl[rule]; c = base → sft(D@z) → rl[rule + language]; base →
sft(correct(D@c) + general) → rl[rule + late rm]; distilled: small → sft(the same rows)`.
R1-Zero only samples: Dev1 is SFT of the base on its correct traces. Dev2 is RL of Dev1 with an
added reward for one language. Dev3 is SFT of the base again, on Dev2's correct samples and a
quarter of data that needs no reasoning. R1 is RL of Dev3 by rules; general prompts and the
helpfulness model join for the last quarter of it. With model=distilled a small base learns the
rows of Dev3 by SFT alone.
Left out: refinement by V3 and by people, the safety model, code. Preferences are a noisy
oracle's; the last domain stands for general prompts. 1,700 steps, lengths and learning rates are
scaled down.
"""

from typing import Literal

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import KL, AllPairs, Clip, Correct
from posttrain.recipes.deepseek_r1_zero import FORMAT, zero

LANGUAGE = judges.language(regex="[a-zA-Z]", unit="character")


def recipe(
    r: Recipe, base: str = "tiny", steps: int = 32, model: Literal["r1", "distilled"] = "r1"
) -> Stage:
    start = r.base(base, thinking=True)
    reasoning, general = r.domains[:-1] or r.domains, r.domains[-1]
    hard, soft = r.prompts(reasoning, mode="think"), r.prompts(general, mode="think")
    rules = judges.verifier() + 0.1 * FORMAT + 0.1 * LANGUAGE
    grpo = {"advantage": "group_zscore", "aggregation": "sequence", "kl": KL(0.001), "lr": 5e-5}
    grpo |= {"num_minibatches": 4, "surrogate": Clip(1.0, 10.0)}

    first = zero(r, start, reasoning, steps)
    traces = r.sample(first, prompts=hard, num_prompts=500, max_new_tokens=64, name="zero_samples")
    readable = r.select(traces, how=Correct(max_per_prompt=1), name="cold_start_data")
    dev1 = r.sft(start=start, data=readable, steps=40, lr=5e-4, name="dev1")
    dev2 = r.rl(start=dev1, prompts=hard, reward=rules, steps=steps, max_new_tokens=48, name="dev2",
                **grpo)  # fmt: skip

    samples = r.sample(dev2, prompts=hard, k=8, max_new_tokens=48, name="dev2_samples")
    correct = r.select(samples, how="correct", language="[ -~]", name="reasoning_data")
    rows = r.mix({correct: 0.75, r.demos(r.domains, mode="no_think"): 0.25}, name="sft_data")
    dev3 = r.sft(start=start, data=rows, epochs=2, lr=5e-4, name="dev3")

    answers = r.sample(dev3, prompts=soft, k=4, max_new_tokens=48, name="general_samples")
    judged = r.pairs(
        answers, judge=judges.oracle(noise=0.5), how=AllPairs(min_margin=3), name="judged"
    )
    helpful = r.reward_model(
        start=dev3, data=judged, per_prompt=True, steps=80, lr=1e-3, name="helpful"
    )
    late = steps * 3 // 4
    preference = schedules.steps({0: 0.0, late: 1.0}) * judges.scalar(helpful)
    final = r.rl(
        start=dev3,
        prompts=r.prompts(r.domains, mode="think"),
        reward=judges.by_domain(dict.fromkeys(r.domains, rules) | {general: preference}),
        domain_shares=schedules.steps(
            {0: dict.fromkeys(reasoning, 1.0) | {general: 0.0}, late: dict.fromkeys(r.domains, 1.0)}
        ),
        temperature=0.7,
        steps=steps,
        max_new_tokens=48,
        name="r1",
        **grpo,
    )
    asked = {"modes": ("think",), "max_new_tokens": 48, "num_problems": 200}
    if model == "r1":
        return r.evaluate(final, init=dev1, **asked)
    small = r.base("mini" if base == "tiny" else base, thinking=True, name="small_base")
    student = r.sft(start=small, data=rows, epochs=2, lr=1e-3, name="r1_distilled")
    return r.evaluate(student, init=small, teachers=dict.fromkeys(r.domains, dev2), **asked)
