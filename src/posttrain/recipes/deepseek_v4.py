"""DeepSeek-V4: an expert for every domain and effort, merged by full-vocabulary distillation.

Source: DeepSeek-V4, arXiv 2606.19348, section 5.
In one line: `s = base → sft; E = {d × effort: s → sft → rl[rule + itself]}; s → opd{E}(full
vocabulary)`.
Experts start from one SFT: per domain one that does not think, one that thinks within a budget
(high) and one that thinks without a cost (max). Rules reward them, and where the rules tie the
actor compares its own responses; it learns to judge beside its domain, on what it samples. The
student starts from the SFT, answers in both modes, and the experts' logits correct it: all of the
vocabulary, reverse KL, teachers' last hidden states kept in half precision. This replaces a last
mixed RL.
Left out: rubrics, FP4, agents. High and max share the mode think, so each prompt goes to one of
them in turn. Budgets of tokens, steps and learning rates are scaled down.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import Critique, ReverseKL

MODES = ("think", "no_think")
EFFORTS = {"non_think": "no_think", "high": "think", "max": "think"}
BUDGET = {"non_think": 16, "high": 32, "max": 48}


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    start = r.base(base, thinking=True)
    sft = r.sft(start=start, data=r.demos(r.domains, mode=MODES), steps=40, lr=5e-4)

    asked = r.prompts(r.domains, mode="no_think")
    seen = r.sample(sft, prompts=asked, k=4, num_prompts=300, max_new_tokens=24)
    compared = r.comparisons(seen, name="judging_data")
    experts = {
        (d, effort): expert(r, sft, compared, d, effort) for d in r.domains for effort in EFFORTS
    }
    student = r.distill(
        start=sft,
        teachers={
            d: {
                "think": [experts[d, "high"], experts[d, "max"]],
                "no_think": experts[d, "non_think"],
            }
            for d in r.domains
        },
        prompts=r.prompts(r.domains, mode=MODES),
        estimator=ReverseKL(cache="bfloat16"),
        steps=200,
        lr=1.2e-3,
        max_new_tokens=48,
    )
    best = {d: experts[d, "max"] for d in r.domains}
    scored = {"modes": MODES, "num_problems": 200, "max_new_tokens": 48}
    return r.evaluate(student, init=sft, teachers=best, **scored)


def expert(r: Recipe, sft: Stage, compared: Stage, domain: str, effort: str) -> Stage:
    """A specialist of one domain and effort: SFT, then GRPO with the actor as its own judge."""
    mode = EFFORTS[effort]
    light = r.sft(
        start=sft,
        data=r.demos(domain, mode=mode),
        aux={"judging": (compared, 0.5)},
        steps=100,
        lr=1.5e-3,
        name=f"{domain}_{effort}_sft",
    )
    rules = judges.verifier()
    if effort == "high":
        rules = rules - 0.1 * judges.length(budget=BUDGET["high"] // 2)
    return r.rl(
        start=light,
        prompts=r.prompts(domain, mode=mode),
        reward=judges.lexicographic(rules, judges.itself(pairing="circular", swap=False)),
        critique=Critique(0.1),
        prompts_per_step=24,
        steps=15,
        lr=1e-4,
        max_new_tokens=BUDGET[effort],
        name=f"{domain}_{effort}",
    )
