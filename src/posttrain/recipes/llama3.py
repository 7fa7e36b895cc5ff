"""Llama 3: six rounds of reward model, rejection sampling, SFT and DPO, weights averaged.

Source: Llama 3, arXiv 2407.21783, section 4.
In one line: `for r in 1..6: P += human(D@{m}); rm = base → reward_model(P); d = prune(best(D@m,
rm)) + human; m = merge(dpo(base → sft(d), P_latest))`.
Each round two models answer and an annotator compares them. The reward model starts from the
pre-trained model and learns all comparisons so far, only the clear ones and without a margin. It
picks the best of K samples of the last round's chat model, or of the code expert in its domain.
SFT starts from the pre-trained model, on the picks of its top quartile without near repeats and
on human data. DPO starts from it and learns only the newest comparisons. Two DPO runs are
averaged into the round's model.
Left out: edited responses; difficulty scores; merges of the reward and SFT models; long context,
tools, vision. Sizes of runs and K, 10 to 30 in the paper, are scaled down: a small reward model
picks worse from many samples, since there are more distinct wrong answers than right ones. The
first domain stands for code, a noisy oracle for annotators.
"""

from typing import Any

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import AllPairs, Dpo, Near, TopShare


def recipe(r: Recipe, base: str = "tiny", rounds: int = 6, k: int = 3) -> Stage:
    pretrained, human = r.base(base), r.demos(r.domains, noise=0.1)
    prompts, code = r.prompts(r.domains), r.domains[0]
    sft = r.sft(start=pretrained, data=human, steps=40, lr=5e-4)
    code_base = r.sft(start=pretrained, data=r.demos(code), steps=100, lr=1e-3, name="code_base")
    expert = r.sft(start=code_base, data=human, steps=20, lr=5e-4, name="code_expert")

    clear: Any = {"judge": judges.oracle(noise=0.2), "how": AllPairs(min_margin=3)}
    chat, previous, annotated = sft, expert, []
    for n in range(1, rounds + 1):
        new = {"first_prompt": 500 * (n - 1), "num_prompts": 500, "max_new_tokens": 24}
        annotated.append(
            r.sample([chat, previous], prompts=prompts, k=2, name=f"annotation{n}", **new)
        )
        compared = r.pairs(annotated, name=f"clear{n}", **clear)
        rm = r.reward_model(
            start=pretrained, data=compared, per_prompt=True, steps=100, lr=1e-3, name=f"rm{n}"
        )

        samplers = dict.fromkeys(r.domains, chat) | {code: expert}
        samples = r.sample(
            samplers, prompts=prompts, k=k, temperature=0.7, name=f"samples{n}", **new
        )
        scored = r.score(samples, judge=judges.scalar(rm), name=f"scored{n}")
        best = r.select(scored, how=TopShare(0.25, by="score", max_per_prompt=1), name=f"best{n}")
        distinct = r.dedup(best, near=Near(0.9), name=f"distinct{n}")
        mixed = r.mix({distinct: 0.8, human: 0.2}, name=f"sft_mix{n}")
        tuned = r.sft(start=pretrained, data=mixed, epochs=3, lr=3e-4, name=f"sft{n}")

        latest = r.pairs(annotated[-1], name=f"latest{n}", **clear)
        runs = [
            r.dpo(
                start=tuned,
                data=latest,
                loss=Dpo(beta=0.1, nll_weight=0.2),
                mask_formatting=True,
                steps=20,
                lr=lr,
                name=f"dpo{n}_{lr}",
            )
            for lr in (2e-5, 5e-5)
        ]
        previous, chat = chat, r.merge(runs, name=f"chat{n}")
    return r.evaluate(chat, init=sft, max_new_tokens=24)
