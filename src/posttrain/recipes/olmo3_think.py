"""OLMo 3 Think: an SFT soup on traces, delta DPO, RL on prompts of the right difficulty.

Source: OLMo 3, arXiv 2512.13961, section 4, tables 17 and 20; 32B settings.
In one line: `base → sft(traces) → dpo(pairs(big, small)) → filter(profile(dpo)) → rl[by
domain](OlmoRL)`.
The SFT model is the average of two learning rates. DPO starts from it: a strong model's trace is
chosen over a weak one's for the same prompt, with no judge. The DPO model is profiled, prompts
that it solves more than 62.5 % of the time drop out, and RL starts from it on the rest (OlmoRL:
groups without variance are drawn again, token-level loss, no KL, higher upper clip, truncated
importance weights, advantages without the standard deviation).
Left out: mid-training soups, asynchrony, code sandboxes. In the last domain, which stands for
chat, a noisy oracle judges in place of a model.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import Clip, DpoNorm, InTurn, Truncated


def recipe(r: Recipe, base: str = "tiny", steps: int = 40) -> Stage:
    start = r.base(base, thinking=True)
    sft = think_sft(r, start)
    prompts = r.prompts(r.domains, mode="think")

    chosen = r.sample(strong(r, start), prompts=prompts, k=1, max_new_tokens=48, name="chosen")
    rejected = r.sample(weak(r, base), prompts=prompts, k=1, max_new_tokens=48, name="rejected")
    delta = r.pairs(chosen, against=rejected, chosen_max_tokens=44, name="delta_pairs")
    dpo = r.dpo(start=sft, data=delta, loss=DpoNorm(beta=5), epochs=1, lr=1e-5, name="dpo")

    rates = r.profile(dpo, prompts=prompts, n=8, num_prompts=1000, max_new_tokens=48)
    hard = r.filter(prompts, profile=rates, high=0.625, at_least=100, name="unsolved")
    verified = dict.fromkeys(r.domains[:-1], judges.verifier())
    reward = judges.by_domain(verified | {r.domains[-1]: 0.2 * judges.oracle()})
    final = olmo_rl(r, dpo, hard, reward, steps, "think")
    return r.evaluate(final, init=sft, modes=("think",), max_new_tokens=48, num_problems=200)


def think_sft(r: Recipe, start: Stage) -> Stage:
    """The average of SFT at two learning rates, on traces."""
    traces = r.demos(r.domains, mode="think")
    runs = [
        r.sft(start=start, data=traces, steps=120, lr=lr, name=f"think_sft_{lr}")
        for lr in (2e-3, 1e-3)
    ]
    return r.merge(runs, name="think_sft")


def strong(r: Recipe, start: Stage) -> Stage:
    """What stands for Qwen3-32B, in both of its modes."""
    data = r.demos(r.domains, mode=("think", "no_think"))
    return r.sft(start=start, data=data, steps=300, lr=1.5e-3, name="qwen_32b")


def weak(r: Recipe, base: str) -> Stage:
    """What stands for Qwen3-0.6B."""
    start = r.base("mini" if base == "tiny" else base, thinking=True, name="small_base")
    data = r.demos(r.domains, mode=("think", "no_think"))
    return r.sft(start=start, data=data, steps=5, lr=1e-4, name="qwen_0.6b")


def olmo_rl(r: Recipe, start: Stage, prompts: Stage, reward: judges.Judge, steps: int, name: str,
            **settings: object) -> Stage:  # fmt: skip
    """OlmoRL with the verifiers and judges of the paper's table 20."""
    settings = {"prompts_per_step": 96, "num_minibatches": 2, "lr": 2e-4} | settings
    return r.rl(
        start=start,
        prompts=prompts,
        reward=reward,
        advantage="group_mean",
        aggregation="token",
        draw=InTurn(dynamic_sampling=4),
        surrogate=Clip(clip_high=0.272),
        correction=Truncated(2.0),
        group_size=8,
        steps=steps,
        lr_decay="constant",
        max_new_tokens=48,
        name=name,
        **settings,
    )
