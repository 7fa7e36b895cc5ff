"""GLM-5: reasoning, agentic and general RL one after another, then cross-stage distillation.

Source: GLM-5, arXiv 2602.15763, section 3.
In one line: `S = base → sft; R = S → rl[reason]; A = R → rl[agent]; G = A → rl[general]; G →
opd{S, R, G}`.
S is the SFT, R reasoning RL from S, A agentic RL from R, G general RL from A, each on its own
domains. Each stage forgets some of the ones before, so at the end G is distilled on the prompts of
each from the checkpoint that knew best: S, R and G itself, sampled tokens, one response per
prompt. RL drops tokens whose ratio leaves [1/2, 2] and clips at 0.2 and 0.28, without KL.
Left out: agents and asynchrony, prompts that another model fails, generative judges. The suite's
first domain is reasoning, the next agents, the others are general, but for the last, which no RL
asks for. Steps and learning rates are scaled down.
"""

from posttrain import Recipe, Stage
from posttrain.algorithms import Clip, IcePop

ICEPOP = IcePop(0.5, 2.0)


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    kept = r.domains[-1]
    reasoning, agentic, general = r.domains[:1], r.domains[1:2], r.domains[2:-1]
    s = r.sft(start=r.base(base), data=r.demos(r.domains), steps=250, lr=1.5e-3, name="sft")
    model, last = s, {kept: s}
    for name, domains in {"reasoning": reasoning, "agentic": agentic, "general": general}.items():
        # A suite of few domains leaves some of the stages without prompts of their own.
        if domains:
            model = r.rl(
                start=model,
                prompts=r.prompts(domains),
                surrogate=Clip(clip_high=0.28),
                num_minibatches=2,
                prompts_per_step=128,
                advantage="group_mean",
                steps=30,
                lr=2e-4,
                max_new_tokens=24,
                name=f"{name}_rl",
                correction=ICEPOP,
            )
        if name == "reasoning":
            last |= dict.fromkeys(reasoning, model)
    final = r.distill(
        start=model,
        teachers=dict.fromkeys(r.domains, "self") | last,
        prompts=r.prompts(r.domains),
        estimator="sampled_token",
        samples_per_prompt=1,
        prompts_per_step=128,
        steps=60,
        lr=2e-4,
        max_new_tokens=24,
        name="cross_stage",
        correction=ICEPOP,
    )
    return r.evaluate(final, init=s, teachers=last, max_new_tokens=24)
