"""DeepSeek-V3: experts that blend two styles teach the base by rejection sampling, then GRPO.

Source: DeepSeek-V3, arXiv 2412.19437, section 5.
In one line: `E = {d: sft → rl[d](T high)}; base → sft(correct(D@E)) → rl[rule + rm](GRPO)`.
Each domain's expert starts from the base, is shown every problem with the plain answer and with
the R1 answer under a system prompt, and gets RL at a high temperature. Correct and short samples
of the experts are the SFT set of a model that starts from the base again. A reward model starts
from that SFT model, and GRPO too: rules judge where there are any, the reward model judges the
rest.
Left out: multi-token prediction; 1.5M rows; the data of V2.5 for writing and role-play. The mode
think stands for the system prompt. The last domain stands for those without rules, and the KL
weighs far more there.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, AllPairs, CosineDecay


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    start = r.base(base, thinking=True)
    experts = {d: expert(r, d, start) for d in r.domains}

    prompts = r.prompts(r.domains, mode="no_think")
    samples = r.sample(
        experts, prompts=prompts, k=4, num_prompts=1000, max_new_tokens=24, name="expert_samples"
    )
    concise = r.select(samples, how="shortest_correct", name="correct_and_concise")
    sft = r.sft(start=start, data=concise, epochs=2, lr_decay=CosineDecay(end=0.2), lr=5e-4)

    answers = r.sample(sft, prompts=prompts, k=8, num_prompts=1500, max_new_tokens=24)
    preferences = r.pairs(
        answers, judge=judges.oracle(noise=0.2), how=AllPairs(min_margin=3), name="preferences"
    )
    rm = r.reward_model(start=sft, data=preferences, per_prompt=True, steps=250, lr=1e-3)
    rules = dict.fromkeys(r.domains[:-1], judges.verifier())
    final = r.rl(
        start=sft,
        prompts=prompts,
        reward=judges.by_domain(rules | {r.domains[-1]: judges.scalar(rm)}),
        advantage="group_zscore",
        aggregation="sequence",
        # What a small reward model says is soon gamed: there the policy is held closer.
        kl=KL(0.005, estimator="k3", domains={r.domains[-1]: 200.0}),
        steps=120,
        prompts_per_step=64,
        lr=1e-4,
        max_new_tokens=24,
        name="grpo",
    )
    return r.evaluate(
        final, init=sft, teachers=experts, modes=("no_think",), max_new_tokens=24, num_problems=200
    )


def expert(r: Recipe, domain: str, start: Stage) -> Stage:
    """SFT in two styles, then RL at a temperature at which they blend."""
    both = ("think", "no_think")
    styled = r.sft(
        start=start, data=r.demos(domain, mode=both), steps=80, lr=1e-3, name=f"{domain}_styles"
    )
    return r.rl(
        start=styled,
        prompts=r.prompts(domain, mode=both),
        temperature=1.2,
        advantage="group_zscore",
        steps=30,
        lr=1e-4,
        max_new_tokens=48,
        name=f"{domain}_expert",
    )
