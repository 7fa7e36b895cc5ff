"""Nemotron-Cascade 2: one domain after another by RL, with MOPD from its own earlier checkpoints.

Source: Nemotron-Cascade 2, arXiv 2603.19220, sections 3 and 4.
In one line: `c = base → sft → rl[if] → rl[mix] → opd{sft, side branch, best so far} → rl[genrm] →
rl[long] → rl[code]`.
A line of checkpoints C1 to C8: SFT, instruction-following RL, multi-domain RL, MOPD, RLHF, long
context, code, software engineering in two steps. MOPD's teachers are C1 where RL has not helped
(mathematics), a branch off C1 for preferences, and the best checkpoint so far for the rest. RL is
strictly on-policy GRPO without KL, except in RLHF (0.03).
Left out: tools and environments, generative reward models of two of its stages. Domains of the
suite stand for the paper's in order, a noisy oracle for people; long context is a longer limit.
Steps and learning rates are scaled down.
"""

from typing import Any

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, IcePop

GRPO = {"advantage": "group_zscore", "aggregation": "token", "temperature": 1.0}
FEWER = {"prompts_per_step": 64, "lr": 1.5e-4}


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    following, math, human = r.domains[0], r.domains[1 % len(r.domains)], r.domains[-1]
    shares = dict(zip(r.domains, (0.55, 0.3, 0.15), strict=False))
    blend = {d: shares.get(d, 0.15) for d in r.domains}

    c1 = r.sft(start=r.base(base), data=r.demos(r.domains), steps=60, lr=5e-4, name="c1_sft")
    c2 = climb(r, c1, r.prompts(following), "c2_if_rl", steps=25, **FEWER)
    c3 = climb(
        r, c2, r.prompts(r.domains), "c3_multi_domain", steps=50, lr=1.5e-4, domain_shares=blend
    )

    preferences = judges.verifier() + 0.2 * judges.oracle()
    side = climb(r, c1, r.prompts(human), "side_rlhf", reward=preferences, steps=40, **FEWER)
    best = r.best([c1, c2, c3], max_new_tokens=24, name="best_so_far")
    teachers = dict.fromkeys(r.domains, best) | {math: c1, human: side}
    c4 = r.distill(
        start=c3,
        teachers=teachers,
        prompts=r.prompts(r.domains),
        estimator="sampled_token",
        prompts_per_step=128,
        samples_per_prompt=4,
        correction=IcePop(high=2.0),
        num_minibatches=2,
        warmup_steps=20,
        steps=50,
        lr=4e-4,
        max_new_tokens=24,
        name="c4_mopd",
    )

    c5 = climb(r, c4, r.prompts(r.domains), "c5_rlhf", reward=preferences, kl=KL(0.03), steps=15)
    c6 = climb(r, c5, r.prompts(r.domains), "c6_long_context", max_new_tokens=32, steps=15)
    rates = r.profile(c6, prompts=r.prompts(r.domains), n=8, num_prompts=400, max_new_tokens=24)
    hard = r.filter(
        r.prompts(r.domains), profile=rates, high=0.99, at_least=50, name="code_prompts"
    )
    c7 = climb(r, c6, hard, "c7_code", group_size=16, steps=20)
    c8a = climb(r, c7, hard, "c8a_swe_agentless", group_size=16, mask_unfinished=True, steps=15)
    some = r.filter(r.prompts(r.domains), profile=rates, high=0.99, keep_unsolved=0.1, at_least=50,
                    name="swe_prompts")  # fmt: skip
    c8 = climb(r, c8a, some, "c8b_swe", group_size=32, prompts_per_step=64, steps=20)
    return r.evaluate(c8, init=c1, teachers=teachers, max_new_tokens=24)


def climb(r: Recipe, start: Stage, prompts: Any, name: str, **settings: Any) -> Stage:
    """On-policy GRPO without a KL penalty."""
    settings = {"max_new_tokens": 24, "prompts_per_step": 128, "lr": 2.5e-4} | GRPO | settings
    return r.rl(start=start, prompts=prompts, name=name, **settings)
