"""Composer 2: continued pretraining, then RL with Dr. GRPO; 2.5 teaches itself with hints.

Source: Composer 2, arXiv 2603.24477; Composer 2.5 announcement.
In one line: `base → pretrain(code) → sft → rl[verify − concave length](Dr.GRPO, k1 KL); 2.5: →
opd{itself + hint}`.
RL has neither a standard deviation nor a length in its normalisation, the KL to the start as k1
in the reward (the variance of k3 grows without bound), a concave cost of length, and draws harder
prompts as it goes on. In version 2.5 the teacher of the last stage is the model itself with a hint
in its prompt, here the reference answer: it reads what the model wrote without it, and corrects it.
Left out: the harness, tool calls and turns in the cost, self-summaries, asynchrony. Continued
pretraining is on demonstrations, and has seen hints in 2.5. Sizes are scaled down.
"""

from typing import Literal

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import KL, Gaussian

HINT = "{prompt}#{demo}"


def recipe(r: Recipe, base: str = "tiny", version: Literal["2", "2.5"] = "2.5") -> Stage:
    data = r.demos(r.domains, hint=HINT if version == "2.5" else None)
    pretrained = r.sft(start=r.base(base), data=data, steps=600, lr=2e-3, name="continued")
    sft = r.sft(start=pretrained, data=data, steps=20, lr=3e-4)

    prompts = r.prompts(r.domains)
    rates = r.profile(sft, prompts=prompts, n=8, num_prompts=800, max_new_tokens=24)
    composer2 = r.rl(
        start=sft,
        prompts=prompts,
        reward=judges.verifier() - 0.1 * judges.length(budget=24, shape="concave", k=4.0, q=0.5),
        advantage="group_mean",
        aggregation="constant",
        kl=KL(0.005, estimator="k1", where="reward"),
        profile=rates,
        draw=Gaussian(target=schedules.linear(0.7, 0.3), update_rates=True),
        group_size=16,
        steps=50,
        lr=1e-4,
        max_new_tokens=24,
        name="composer2",
    )
    if version == "2":
        return r.evaluate(composer2, init=sft, max_new_tokens=24)
    composer25 = r.distill(
        start=composer2,
        teachers=dict.fromkeys(r.domains, "self"),
        hints=dict.fromkeys(r.domains, HINT),
        prompts=prompts,
        steps=120,
        lr=5e-4,
        max_new_tokens=24,
        name="composer25",
    )
    return r.evaluate(composer25, init=sft, max_new_tokens=24)
