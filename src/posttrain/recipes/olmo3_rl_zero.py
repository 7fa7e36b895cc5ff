"""OLMo 3 RL-Zero: RL from the base with verifiable rewards, one model per domain and one for all.

Source: OLMo 3, arXiv 2512.13961, section 6.
In one line: `{d: base → rl[verify]} and base → rl[mix]`.
Every model starts from the base. Prompts that the base always solves drop out. The models of
single domains stand beside that of the mix in the report, as if they were its teachers.
Left out: code sandboxes, asynchrony, decontamination.
"""

from posttrain import Recipe, Stage, judges
from posttrain.recipes.olmo3_think import olmo_rl


def recipe(r: Recipe, base: str = "tiny", steps: int = 50) -> Stage:
    start = r.base(base, thinking=True)
    models, subsets = {}, {d: (d,) for d in r.domains} | {"mix": r.domains}
    for name, domains in subsets.items():
        prompts = r.prompts(domains, mode="think")
        rates = r.profile(
            start, prompts=prompts, n=8, num_prompts=500, max_new_tokens=48, name=f"{name}_profile"
        )
        unsolved = r.filter(prompts, profile=rates, high=0.99, at_least=50, name=f"{name}_prompts")
        reward = judges.verifier()
        models[name] = olmo_rl(
            r,
            start,
            unsolved,
            reward,
            steps,
            f"{name}_zero",
            prompts_per_step=32,
            num_minibatches=4,
        )
    mix = models.pop("mix")
    return r.evaluate(
        mix, init=start, teachers=models, modes=("think",), max_new_tokens=48, num_problems=200
    )
