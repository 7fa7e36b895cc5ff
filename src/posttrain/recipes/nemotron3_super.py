"""Nemotron 3 Super: three RLVR blends, pivot RL, end-to-end RL, RLHF with a GenRM, MTP healing.

Source: Nemotron 3 Super technical report, post-training, as summarised in NVIDIA-NeMo/Nemotron.
In one line: `base → sft → rl(blend 1) → rl(blend 2) → rl(blend 3) → rl[pivot] → rl[end to end] →
rl[genrm](KL 1e-4) → sft(trainable = a part)`.
Every stage starts from the one before. RLVR runs three times with other shares of the domains and
otherwise the same settings; prompts that are always solved are left out. The hard domain, which
stands for software engineering, comes by itself: first single decisions (short responses, a light
filter for overlong ones), then whole episodes with larger groups. RLHF has a generative reward
model and a KL penalty of 1e-4. Healing trains one part of the weights with the rest frozen.
Left out: agents, low-effort prompts, asynchrony. There is no MTP head here: the last norm stands
for it. Steps, lengths and learning rates are scaled down.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, Clip, Correct
from posttrain.recipes.nemotron3_nano import genrm

RL = {
    "advantage": "group_mean",
    "surrogate": Clip(clip_high=0.28),
    "correction": "icepop",
    "num_minibatches": 2,
    "max_new_tokens": 24,
}


def recipe(r: Recipe, base: str = "tiny", healed: str = "model.norm.weight") -> Stage:
    sft = r.sft(start=r.base(base), data=r.demos(r.domains), steps=40, lr=5e-4)
    rates = r.profile(sft, prompts=r.prompts(r.domains), n=8, num_prompts=800, max_new_tokens=24)
    prompts = r.filter(r.prompts(r.domains), profile=rates, high=0.99, at_least=50, name="unsolved")
    hard = r.domains[-1]

    model = sft
    for n, weight in enumerate((0.5, 1.0, 2.0), start=1):
        # The blend moves towards the later half of the domains.
        half = len(r.domains) // 2
        blend = {d: 1.0 if i < half else weight for i, d in enumerate(r.domains)}
        model = r.rl(start=model, prompts=prompts, domain_shares=blend, group_size=16,
                     steps=30, lr=1e-4, name=f"rlvr{n}", **RL)  # fmt: skip

    alone = r.prompts(hard)
    single = RL | {"max_new_tokens": 16, "mask_unfinished": True}
    pivot = r.rl(start=model, prompts=alone, group_size=16, prompts_per_step=16, steps=15,
                 lr=5e-5, name="swe_pivot", **single)  # fmt: skip
    episodes = r.rl(start=pivot, prompts=alone, group_size=32, prompts_per_step=16, steps=15,
                    lr=5e-5, name="swe_end_to_end", **RL)  # fmt: skip

    rules = judges.verifier()
    preferred = rules + judges.compare(genrm(r, sft), pairing="circular")
    rlhf = r.rl(
        start=episodes,
        prompts=r.prompts(r.domains),
        reward=judges.by_domain({d: preferred if d == hard else rules for d in r.domains}),
        kl=KL(1e-4),
        steps=20,
        lr=5e-5,
        name="rlhf",
        **RL,
    )
    data = r.select(rlhf, how=Correct(max_per_prompt=1), name="rl_data")
    final = r.sft(start=rlhf, data=data, trainable=[healed], steps=20, lr=1e-4, name="mtp_healing")
    return r.evaluate(final, init=sft, max_new_tokens=24)
