"""MAI-Thinking-1: three RL climbs from a base without traces, their traces by SFT, a light climb.

Source: MAI-Thinking-1 technical report, post-training.
In one line: `C = {d: for k: (mid → sft(correct(D@climb))) → rl[d](longer and longer)}; mid →
sft(mix(D@C)) → rl[light]`.
A climb is GRPO whose limit on length grows and whose upper clip follows the entropy: 1/(1-e) + k,
k up while the entropy is below its target and down while it is above. Reward: the task, language,
and a cost of length scaled by the pass rate. Self-distillation restarts a climb: SFT of the base on
correct traces of the climb's late steps, then RL again. The final model is SFT of the base on the
traces of all climbs, 89, 9 and 2 % of the tokens, and a light climb on the last climb's domains
with a share of the others.
Left out: agents, the text reward model, top-p with replayed masks, staleness. The base has learnt
the suite's notation from demonstrations, as it has no other text. Sizes are scaled down.
"""

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import Clip, Correct

TOKENS = (89.0, 9.0, 2.0)
REWARD = (
    judges.verifier()
    + 0.5 * judges.language(regex="[a-zA-Z]", unit="character")
    - 0.25 * judges.length(budget=32, shape="pass_rate")
)

# 1 + clip_high = 1 / (1 - 0.6) + k, k from 0 to 2.5 in steps of 0.25.
UPPER_CLIP = schedules.track("entropy", target=0.3, first=1.5, change=0.25, low=1.5, high=4.0)
CLIMB = {"num_minibatches": 5, "prompts_per_step": 16, "lr": 5e-5}
# All domains at once need more responses per update before its noise allows a higher rate.
MANY = {"num_minibatches": 2, "prompts_per_step": 128, "lr": 2e-4}


def recipe(r: Recipe, base: str = "tiny", restarts: int = 1) -> Stage:
    mid = r.base(base)
    # STEM, agents, helpful and safe; a suite of fewer domains has fewer climbs.
    groups = [found for found in (r.domains[:-2], r.domains[-2:-1], r.domains[-1:]) if found]

    traces = {}
    for n, domains in enumerate(groups, start=1):
        # The second climb has STEM problems mixed in.
        mixed = r.domains[:-1] if n == 2 else domains
        model = climb(r, mid, mixed, f"climb{n}")
        for k in range(1, restarts + 1):
            own = r.select(model, how=Correct(max_per_prompt=1), first_step=15,
                           name=f"climb{n}_traces{k}")  # fmt: skip
            again = r.sft(start=mid, data=own, epochs=2, lr=6e-4, name=f"climb{n}_restart{k}")
            model = climb(r, again, mixed, f"climb{n}_{k + 1}")
        samples = r.sample(model, prompts=r.prompts(mixed), k=4, num_prompts=500,
                           max_new_tokens=24, name=f"climb{n}_samples")  # fmt: skip
        traces[r.select(samples, how="correct", name=f"climb{n}_data")] = TOKENS[n - 1]

    rows = r.mix(traces, by="tokens", tokenizer=mid, rows=4000, name="traces")
    sft = r.sft(start=mid, data=rows, steps=120, lr=6e-4, name="trace_distillation")
    light = {d: 4.0 if d in groups[-1] else 1.0 for d in r.domains}
    final = climb(r, sft, r.domains, "light_climb", domain_shares=light, **MANY)
    return r.evaluate(final, init=sft, max_new_tokens=24)


def climb(
    r: Recipe, start: Stage, domains: tuple[str, ...], name: str, **settings: object
) -> Stage:
    return r.rl(
        start=start,
        prompts=r.prompts(domains),
        reward=REWARD,
        advantage="group_zscore",
        surrogate=Clip(0.6, UPPER_CLIP),
        max_new_tokens=schedules.steps({0: 12, 8: 16, 16: 24}),
        group_size=16,
        steps=40,
        name=name,
        **(CLIMB | settings),
    )
