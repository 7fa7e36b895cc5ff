"""Llama 2-Chat: five rounds of rejection sampling from the base, a gate of two reward models, PPO.

Source: Llama 2, arXiv 2307.09288, sections 3.1 and 3.2.
In one line: `m = base → sft; for r in 1..5: P += human(D@{m, m′}); h, s = m → reward_model(P);
pool += best(D@m, [h, s]); m = base → sft(pool; last only if r ≤ 3); finally m → rl[gate(s,
h)](PPO)`.
Each round the two newest chat models answer prompts of a helpfulness and of a safety task, and
annotators say which answer is better and how clearly. Two reward models start from the newest
chat model and learn all comparisons so far with a margin: the helpful one those of both tasks,
the safety one its own and some helpful ones. The gate of both picks the best of K samples.
Fine-tuning starts from the base every time: on the last round's picks up to round 3, on those of
all rounds from then on. PPO follows the last round, on the whitened gate; its critic starts from
the helpful model.
Left out: ghost attention; open preference sets; the 70B that samples for smaller models. The
first half of the domains stands for safety prompts, a noisy oracle for the annotators, and its
marginal preferences are dropped. Sizes, K and temperatures are scaled down: a small reward model
picks worse from many samples, since there are more distinct wrong answers than right ones.
"""

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import KL, AllPairs, BestResponses, BradleyTerry, Gae


def recipe(r: Recipe, base: str = "tiny", rounds: int = 5, k: int = 3) -> Stage:
    half = (len(r.domains) + 1) // 2
    safety, helpful, everything = r.domains[:half], r.domains[-half:], r.prompts(r.domains)
    start = r.base(base)
    sft = r.sft(start=start, data=r.demos(r.domains, noise=0.1), steps=40, lr=5e-4)

    newest, safe, good, picked = [sft], [], [], []
    for n in range(1, rounds + 1):
        new = {"first_prompt": 400 * (n - 1), "num_prompts": 400, "max_new_tokens": 24}
        for task, domains, answers in (("helpful", helpful, good), ("safety", safety, safe)):
            prompts = r.prompts(domains)
            answers.append(r.sample(newest[-2:], prompts=prompts, k=4, name=f"{task}{n}", **new))
        rm_helpful = reward_model(r, newest[-1], good + safe, f"rm_helpful{n}")
        rm_safety = reward_model(r, newest[-1], safe + good[:1], f"rm_safety{n}")

        reward = gate(r, rm_helpful, rm_safety, safety)
        samples = r.sample(
            newest[-1], prompts=everything, k=k, temperature=0.7, name=f"samples{n}", **new
        )
        picked.append(r.score(samples, judge=reward, name=f"scored{n}"))
        pool = picked if n > 3 else picked[-1:]
        best = r.select(pool, how=BestResponses(by="score", max_per_prompt=1), name=f"best{n}")
        newest.append(r.sft(start=start, data=best, steps=60, lr=3e-4, name=f"chat{n}"))

    final = r.rl(
        start=newest[-1],
        prompts=everything,
        reward=judges.whitened(reward),
        advantage=Gae(),
        critic=rm_helpful,
        kl=KL(0.1, estimator="k1", where="reward"),
        steps=30,
        prompts_per_step=256,
        group_size=1,
        num_minibatches=8,
        lr=3e-5,
        max_new_tokens=24,
        name="ppo",
    )
    return r.evaluate(final, init=sft, max_new_tokens=24)


def reward_model(r: Recipe, start: Stage, answers: list[Stage], name: str) -> Stage:
    """From annotated answers, with a margin for how clear a preference is."""
    pairs = r.pairs(
        answers, judge=judges.oracle(noise=0.2), how=AllPairs(min_margin=3), name=f"{name}_pairs"
    )
    return r.reward_model(
        start=start,
        data=pairs,
        loss=BradleyTerry(margins="strength"),
        per_prompt=True,
        steps=100,
        lr=1e-3,
        name=name,
    )


def gate(r: Recipe, helpful: Stage, safety: Stage, domains: tuple[str, ...]) -> judges.Judge:
    """The safety model on its prompts and wherever it is below 0.15, else the helpful one."""
    safe, unsafe = judges.scalar(safety), judges.scalar(safety, squash=True)
    gated = judges.gate(unsafe, below=0.15, then=safe, otherwise=judges.scalar(helpful))
    return judges.by_domain({d: safe if d in domains else gated for d in r.domains})
