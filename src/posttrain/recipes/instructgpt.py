"""InstructGPT: demonstrations, a reward model of rankings, PPO with a pre-training mix.

Source: InstructGPT, arXiv 2203.02155, sections 3.2 to 3.5, appendix C.
In one line: `s = base → sft; rm = s → reward_model(rank(D@s)); (base → sft(+ pretraining)) →
rl[rm](PPO, critic = rm, aux = pretraining)`.
A reward model starts from the SFT model and learns all pairs of each ranking of K = 4 to 9 SFT
samples as one. PPO starts from a sibling of it, fine-tuned with 10 % of pre-training text, and is
scored by the reward model, from which its critic starts too. Pre-training gradients are mixed in
and the weights that are kept are a moving average. Further rounds rank samples of the newest
policy.
Left out: the 6B and 175B sizes; human labelers (a noisy oracle ranks). The weight of the
pre-training gradients, 27.8 in the paper for a sum over tokens, is 0.5 for a mean; the 16 epochs
are few steps.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, AdamW, Gae


def recipe(r: Recipe, base: str = "tiny", rounds: int = 1, ranked: int = 6) -> Stage:
    start = r.base(base)
    demonstrations = r.demos(r.domains, noise=0.1)
    pretraining = r.demos(r.domains)

    sft = r.sft(start=start, data=demonstrations, steps=60, lr=5e-4)
    # PPO does not start from that model, but from one that has kept some pre-training text.
    policy = r.sft(
        start=start,
        data=demonstrations,
        aux={"pretraining": (pretraining, 0.1)},
        steps=60,
        lr=5e-4,
        name="ppo_init",
    )
    sampler, rankings = sft, []
    for n in range(1, rounds + 1):
        rankings.append(
            r.sample(
                sampler,
                prompts=r.prompts(r.domains),
                first_prompt=1500 * (n - 1),
                num_prompts=1500,
                k=ranked,
                max_new_tokens=24,
                name=f"samples{n}",
            )
        )
        comparisons = r.pairs(
            rankings, judge=judges.oracle(noise=0.5), how="all", name=f"comparisons{n}"
        )
        reward_model = r.reward_model(
            start=sft, data=comparisons, per_prompt=True, epochs=1, lr=1e-3, name=f"rm{n}"
        )
        policy = sampler = r.rl(
            start=policy,
            prompts=r.prompts(r.domains),
            reward=judges.scalar(reward_model),
            advantage=Gae(),
            critic=reward_model,
            kl=KL(0.02, estimator="k1", where="reward"),
            aux={"ptx": (pretraining, 0.5)},
            optimizer=AdamW(ema=0.992),
            steps=60,
            group_size=1,
            prompts_per_step=256,
            num_minibatches=8,
            lr=1e-4,
            max_new_tokens=24,
            name=f"ppo_ptx{n}",
        )
    return r.evaluate(policy, init=sft, max_new_tokens=24)
