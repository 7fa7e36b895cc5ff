"""DeepSeek-V3.1: specialists of one base, distilled by SFT into one model that thinks or does not.

Source: DeepSeek-V3.1 model card; pipeline of V3.1-Terminus in DeepSeek-V3.2-Exp, section 3.
In one line: `E = {d × mode: base → rl[d]}; base → sft(correct(D@E), think + no_think) → rl[all
domains](GRPO)`.
For each domain one specialist that thinks and one that does not, all by RL from the same base. They
only sample: SFT starts from the base again and learns what the verifier accepts of both kinds, so
different models make its thinking and its other data. One mixed GRPO in both modes follows.
Left out: long-context training of the base, agents, writing and alignment data. The card names no
settings; a short SFT before each specialist's RL, steps and learning rates are ours.
"""

from posttrain import Recipe, Stage
from posttrain.algorithms import Correct

MODES = ("think", "no_think")
ASKED = {"max_new_tokens": 48}


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    sft = distilled(r, r.base(base, thinking=True))
    final = r.rl(
        start=sft,
        prompts=r.prompts(r.domains, mode=MODES),
        prompts_per_step=128,
        group_size=16,
        steps=40,
        lr=2e-4,
        name="mixed_grpo",
        **ASKED,
    )
    return r.evaluate(final, init=sft, modes=MODES, num_problems=200, **ASKED)


def distilled(r: Recipe, start: Stage) -> Stage:
    """SFT of `start` on the correct samples of specialists, which are made from it as well."""
    chosen = {}
    for mode in MODES:
        experts = {d: specialist(r, start, d, mode) for d in r.domains}
        samples = r.sample(
            experts,
            prompts=r.prompts(r.domains, mode=mode),
            k=2,
            num_prompts=600,
            name=f"{mode}_samples",
            **ASKED,
        )
        chosen[r.select(samples, how=Correct(max_per_prompt=1), name=f"{mode}_data")] = 0.5
    return r.sft(start=start, data=r.mix(chosen, name="sft_data"), steps=120, lr=8e-4)


def specialist(r: Recipe, start: Stage, domain: str, mode: str) -> Stage:
    """One domain in one mode: a short SFT, then RL."""
    demos = r.demos(domain, mode=mode)
    light = r.sft(start=start, data=demos, steps=120, lr=1.5e-3, name=f"{domain}_{mode}_sft")
    return r.rl(
        start=light,
        prompts=r.prompts(domain, mode=mode),
        steps=25,
        lr=1e-4,
        name=f"{domain}_{mode}_expert",
        **ASKED,
    )
