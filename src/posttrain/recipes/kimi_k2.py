"""Kimi K2: one SFT, then joint RL on verifiable rewards and on the policy's own critique.

Source: Kimi K2, arXiv 2507.20534, section 3.
In one line: `base → sft → rl[verify + self-critique](squared loss, T down, aux = ptx)`.
The SFT model is also the first critic: in the last domain the policy ranks its own responses pair
by pair, and RL refines it as a critic on each step's verified rollouts. The loss is K1.5's square
of the advantage minus tau times the log-ratio. Prompts are of moderate difficulty for the critic;
responses have a budget of tokens, above which they cost; the temperature falls; a PTX loss on
demonstrations keeps what RL does not ask for.
Left out: synthetic agents, rubrics, Muon. Steps and learning rates are scaled down.
"""

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import Critique, Kimi


def recipe(r: Recipe, base: str = "tiny", tau: float = 0.5) -> Stage:
    sft = r.sft(start=r.base(base), data=r.demos(r.domains), steps=60, lr=5e-4)

    everything, critique = r.prompts(r.domains), r.domains[-1]
    seen = r.sample(sft, prompts=everything, k=8, num_prompts=400, max_new_tokens=24)
    compared = r.comparisons(seen, name="critic_data")
    both = {r.demos(r.domains): 0.5, compared: 0.5}
    critic = r.sft(start=sft, data=r.mix(both), steps=60, lr=5e-4, name="sft_critic")

    rates = r.profile(critic, prompts=everything, n=8, num_prompts=800, max_new_tokens=24)
    moderate = r.filter(everything, profile=rates, low=0.1, high=0.9, at_least=100, name="moderate")
    checked = judges.verifier() - 0.1 * judges.length(budget=16, shape="budget")
    # Where the verifier tells all responses apart there is nothing to have an opinion about.
    ranked = judges.lexicographic(judges.verifier(), judges.itself(pairing="all", swap=False))
    final = r.rl(
        start=critic,
        prompts=moderate,
        reward=judges.by_domain({d: ranked if d == critique else checked for d in r.domains}),
        surrogate=Kimi(tau),
        advantage="group_mean",
        temperature=schedules.linear(1.0, 0.7),
        aux={"ptx": (r.demos(r.domains), 0.1)},
        critique=Critique(0.1),
        num_minibatches=2,
        group_size=16,
        prompts_per_step=128,
        steps=50,
        lr=2e-4,
        max_new_tokens=24,
        name="joint_rl",
    )
    return r.evaluate(final, init=sft, max_new_tokens=24)
