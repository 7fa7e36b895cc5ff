"""Llama 2-Chat: five rounds of rejection sampling from the base, a gate of two reward models, PPO.

Source: Llama 2, arXiv 2307.09288, sections 3.1 and 3.2.
Each round the newest two chat models answer, an annotator says which answer is better and how clearly,
and a helpfulness and a safety reward model start from the newest chat model and learn all comparisons so
far with a margin. The gate of both picks the best of K samples. Fine-tuning starts from the base
every time: on the last round's picks up to round 3, on those of all rounds from then on. PPO follows
the last round, on the whitened gate; its critic starts from the helpfulness model.
Left out: ghost attention; open preference sets; the 70B that samples for smaller models. Half of the
domains stand for safety prompts, a noisy oracle for annotators of both.
"""

from posttrain import Recipe, Stage, judges


def recipe(r: Recipe, base: str = "tiny", rounds: int = 5, k: int = 8) -> Stage:
    half = (len(r.domains) + 1) // 2
    safety, helpful = r.domains[:half], r.domains[-half:]
    start = r.base(base)
    sft = r.sft(start=start, data=r.demos(r.domains, noise=0.1), steps=40, lr=5e-4)

    chat, previous, annotated, picked = sft, sft, [], []
    for n in range(1, rounds + 1):
        new = {"first_prompt": 300 * (n - 1), "num_prompts": 300, "max_new_tokens": 24}
        annotated.append(
            r.sample(
                [chat, previous] if chat != previous else chat,
                prompts=r.prompts(r.domains),
                k=2,
                name=f"annotation{n}",
                **new,
            )
        )
        compared = r.pairs(annotated, judge=judges.oracle(), name=f"preferences{n}")
        rm = {}
        for kind, domains in {"helpful": helpful, "safety": safety}.items():
            rm[kind] = r.reward_model(
                start=chat, data=compared, margins="strength", steps=60, lr=1e-3, name=f"{kind}{n}"
            )
        reward = gate(r, rm, safety)
        samples = r.sample(
            chat, prompts=r.prompts(r.domains), k=k, temperature=1.2, name=f"samples{n}", **new
        )
        picked.append(r.score(samples, judge=reward, name=f"scored{n}"))
        pool = r.select(
            picked if n > 3 else picked[-1:],
            how="best",
            by="score",
            max_per_prompt=1,
            name=f"picked{n}",
        )
        previous, chat = chat, r.sft(start=start, data=pool, steps=60, lr=5e-4, name=f"chat{n}")

    final = r.rl(
        start=chat,
        prompts=r.prompts(r.domains),
        reward=judges.whitened(reward),
        advantage="gae",
        critic=rm["helpful"],
        kl_coef=0.01,
        kl_estimator="k1",
        kl_in="reward",
        steps=40,
        group_size=1,
        prompts_per_step=256,
        updates_per_batch=8,
        lr=1e-4,
        max_new_tokens=24,
        name="ppo",
    )
    return r.evaluate(final, init=sft, max_new_tokens=24)


def gate(r: Recipe, rm: dict[str, Stage], safety: tuple[str, ...]) -> judges.Judge:
    """The safety model on safety prompts and wherever it is below 0.15, else the helpful one."""
    safe, good = judges.scalar(rm["safety"]), judges.scalar(rm["helpful"])
    unsafe = judges.scalar(rm["safety"], squash=True)
    gated = judges.gate(unsafe, below=0.15, then=safe, otherwise=good)
    return judges.by_domain({d: safe if d in safety else gated for d in r.domains})
