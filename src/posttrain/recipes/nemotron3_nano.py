"""Nemotron 3 Nano: SFT, RL on all environments at once with a curriculum, RLHF, a small DPO.

Source: Nemotron 3 Nano, arXiv 2512.20848, section 3.
In one line: `base → sft → rl[all](Gaussian curriculum) → rl[genrm] → dpo(D@self)`.
SFT with a tenth of its rows stripped of their reasoning. RL leaves out prompts that the SFT model
always solves, keeps the domains' shares of a batch fixed, and draws prompts by a Gaussian over the
pass rate whose mean falls from easy to hard; on a plateau the policy is profiled anew. RLHF asks a
generative reward model, itself trained to compare, about each response and the next, and takes
off what is longer than its group where it is good; other environments stay in. A short DPO on the
model's own samples ends it, with the SFT loss beside it.
Left out: tools and hallucinated tool calls (the DPO pairs are correct against wrong), 256k packs,
mixture of experts. The generative reward model is tiny and learns by SFT. Steps are scaled down.
"""

from posttrain import Recipe, Stage, judges, schedules
from posttrain.algorithms import BestAgainstWorst, Clip, Dpo, Gaussian, Reprofile

GROUPS = {
    "advantage": "leave_one_out",
    "surrogate": Clip(clip_high=0.28),
    "group_size": 16,
    "max_new_tokens": 48,
}


def recipe(r: Recipe, base: str = "tiny") -> Stage:
    start = r.base(base, thinking=True)
    reasoning = r.demos(r.domains, mode="think")
    data = r.mix({reasoning: 0.9, r.demos(r.domains, mode="no_think"): 0.1}, name="sft_data")
    sft = r.sft(start=start, data=data, steps=40, lr=5e-4)

    prompts = r.prompts(r.domains, mode="think")
    rates = r.profile(sft, prompts=prompts, n=8, num_prompts=800, max_new_tokens=48)
    unsolved = r.filter(prompts, profile=rates, high=0.99, at_least=50, name="not_always_solved")
    rlvr = r.rl(
        start=sft,
        prompts=unsolved,
        profile=rates,
        draw=Gaussian(
            target=schedules.linear(0.8, 0.3),
            spread=0.2,
            reprofile=Reprofile(on_plateau=15, prompts=100),
        ),
        domain_shares=dict.fromkeys(r.domains, 1.0),
        correction="icepop",
        num_minibatches=2,
        steps=50,
        lr=1e-4,
        name="rlvr",
        **GROUPS,
    )

    judge, chat = genrm(r, sft, "no_think"), r.domains[-1]
    shortest = judges.length(shape="group_relative")
    conciseness = judges.gate(
        judges.verifier(), below=0.5, then=judges.constant(0.0), otherwise=shortest
    )
    human = judges.compare(judge, pairing="circular") + judges.verifier() - 0.1 * conciseness
    rlhf = r.rl(
        start=rlvr,
        prompts=prompts,
        reward=judges.by_domain(dict.fromkeys(r.domains, judges.verifier()) | {chat: human}),
        correction="icepop",
        num_minibatches=2,
        steps=15,
        lr=5e-5,
        name="rlhf",
        **GROUPS,
    )

    own = r.sample(rlhf, prompts=prompts, k=32, num_prompts=60, max_new_tokens=48, name="own")
    final = r.dpo(
        start=rlhf,
        data=r.pairs(own, how=BestAgainstWorst(4)),
        loss=Dpo(beta=0.05),
        aux={"sft": (data, 0.2)},
        steps=20,
        lr=5e-5,
    )
    return r.evaluate(final, init=sft, modes=("think",), max_new_tokens=48, num_problems=200)


def genrm(r: Recipe, start: Stage, mode: str | None = None) -> Stage:
    """A generative reward model: it is shown two responses, and says which is better."""
    asked = r.prompts(r.domains, mode=mode)
    seen = r.sample(start, prompts=asked, k=8, num_prompts=400, max_new_tokens=24, name="genrm_in")
    compared = r.comparisons(seen, name="genrm_data")
    return r.sft(start=start, data=compared, steps=200, lr=1.5e-3, name="genrm")
