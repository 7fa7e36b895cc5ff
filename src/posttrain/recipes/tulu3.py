"""Tülu 3: SFT, DPO on pairs of a pool of models, RL with verifiable rewards.

Source: Tülu 3, arXiv 2411.15124, sections 4 to 6; Tülu 3.1 is the same with rl=grpo.
In one line: `base → sft → dpo(pairs(D@{pool, sft}), length-normalised) → rl[verify](PPO, critic =
reward_model(pairs); 3.1: GRPO)`.
Pairs come from a pool of models, the SFT model among them, whose answers a judge compares. DPO
and a reward model both start from the SFT model and learn these pairs. RL starts from the DPO
model with the verifier alone, 10 for a right answer and -10 for one without an end. With PPO the
critic starts from the reward model, which gives no reward.
Left out: persona prompts; a judge model (a noisy oracle compares); the sum over tokens in the SFT
loss; four passes over each batch of PPO (one, in minibatches).
"""

from typing import Any, Literal

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, DpoNorm, Gae


def recipe(r: Recipe, base: str = "tiny", rl: Literal["ppo", "grpo"] = "ppo") -> Stage:
    start, demos, prompts = r.base(base), r.demos(r.domains), r.prompts(r.domains)
    sft = r.sft(start=start, data=demos, lr_decay="linear", steps=60, lr=5e-4)

    strong = r.sft(start=start, data=demos, steps=300, lr=1.5e-3, name="pool_strong")
    weak = r.sft(start=r.base("mini", name="pool_base"), data=demos, steps=20, name="pool_weak")
    pool = r.sample(
        [sft, strong, weak], prompts=prompts, k=2, num_prompts=1000, max_new_tokens=24, name="pool"
    )
    pairs = r.pairs(pool, judge=judges.oracle(noise=0.5))
    dpo = r.dpo(
        start=sft,
        data=pairs,
        loss=DpoNorm(beta=5),
        lr_decay="linear",
        steps=80,
        lr=2e-5,
    )
    settings: dict[str, Any] = {"advantage": "group_zscore", "group_size": 8}
    if rl == "ppo":
        # The reward model gives no reward; it is where the critic starts.
        value = r.reward_model(start=sft, data=pairs, steps=100, lr=1e-3, name="value_init")
        settings = {
            "advantage": Gae(critic_lr=1e-3, value_clip=None),
            "critic": value,
            "group_size": 8,
        }
    final = r.rl(
        start=dpo,
        prompts=prompts,
        reward=10 * judges.verifier() + 10 * judges.finished() + judges.constant(-10),
        kl=KL(0.05, estimator="k1", where="reward"),
        prompts_per_step=32,
        num_minibatches=4,
        steps=60,
        lr=1e-4,
        max_new_tokens=24,
        name="rlvr",
        **settings,
    )
    return r.evaluate(final, init=sft, max_new_tokens=24)
