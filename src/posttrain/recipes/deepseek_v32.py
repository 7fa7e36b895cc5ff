"""DeepSeek-V3.2: specialists, one SFT on their samples, one mixed GRPO with its stabilisers.

Source: DeepSeek-V3.2, arXiv 2512.02556, section 3; DeepSeek-V3.2-Exp, section 3.
In one line: `E = {d × mode: base → rl[d]}; base → sft(correct(D@E)) → rl[all domains](GRPO,
stabilised)`.
Specialists in both modes and the SFT of the base on their correct samples are those of
`deepseek_v31`. All domains are then trained in one RL stage, since stages one after another forget:
advantages without the standard deviation, an unbiased KL estimate weighed by domain (0 for the
first, which stands for mathematics), and responses with a negative advantage that the policy has
moved away from are masked. Rewards: outcome, a length penalty, language consistency.
Left out: agents and their environments, rubrics of a generative judge, routing and sampling masks
(the model here is dense and samples from all tokens). Learning rates and steps are scaled down.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL
from posttrain.recipes.deepseek_v31 import ASKED, MODES, distilled

ENGLISH = judges.language(regex="[a-zA-Z]", unit="character")


def recipe(r: Recipe, base: str = "tiny", kl_coef: float = 0.005, delta: float = 0.1) -> Stage:
    sft = distilled(r, r.base(base, thinking=True))
    outcome = judges.verifier() + 0.1 * ENGLISH
    final = r.rl(
        start=sft,
        prompts=r.prompts(r.domains, mode=MODES),
        reward=outcome - 0.05 * judges.length(budget=32),
        advantage="group_mean",
        kl=KL(kl_coef, estimator="unbiased", domains={r.domains[0]: 0.0}),
        off_policy_delta=delta,
        num_minibatches=2,
        prompts_per_step=128,
        steps=40,
        lr=2e-4,
        name="mixed_grpo",
        **ASKED,
    )
    return r.evaluate(final, init=sft, modes=MODES, num_problems=200, **ASKED)
