"""Qwen3: long-CoT cold start, reasoning RL, thinking-mode fusion, general RL; strong to weak.

Source: Qwen3, arXiv 2505.09388, section 4.
In one line: `base → sft(long traces) → rl[verify] → sft(select(D@self) + no_think) → rl[general];
small: base → sft(D@big) → opd{big}(logits)`.
Cold start is short SFT of the base on QwQ's correct answers, to queries that a model without
thoughts does not solve. Reasoning RL takes few other prompts, hard but not hopeless for it.
Fusion starts from that model and mixes its own correct answers to the cold-start queries with
answers without thoughts. General RL asks in both modes. With model=small a small base learns the
flagship's samples in both modes, then its own samples are corrected by the flagship's logits.
Left out: query annotation by domain; more than 20 tasks of general RL: the first domain has a
reward model, the others have rules. Sizes are scaled down.
"""

from typing import Literal

from posttrain import Recipe, Stage, judges
from posttrain.algorithms import AllPairs, Repetition

BOTH = ("think", "no_think")


def recipe(
    r: Recipe, base: str = "tiny", model: Literal["flagship", "small"] = "flagship"
) -> Stage:
    start = r.base(base, thinking=True)
    thinking = r.prompts(r.domains, mode="think")
    asked = {"modes": BOTH, "max_new_tokens": 48, "num_problems": 200}

    qwq = r.sft(
        start=start, data=r.demos(r.domains, mode="think"), steps=300, lr=1.5e-3, name="qwq"
    )
    easy = r.profile(start, prompts=r.prompts(r.domains, mode="no_think"), n=4, name="without_cot")
    queries = r.filter(thinking, profile=easy, high=0.5, at_least=200, name="queries")
    traces = r.sample(qwq, prompts=queries, k=2, max_new_tokens=48, name="qwq_samples")
    cold = r.select(traces, how="correct", max_repetition=Repetition(0.5), name="cold_start_data")
    s1 = r.sft(start=start, data=cold, steps=30, lr=5e-4, name="cold_start")

    rates = r.profile(s1, prompts=thinking, n=8, first_prompt=1000, max_new_tokens=48)
    learnable = r.filter(thinking, profile=rates, low=0.1, high=0.8, at_least=50, name="learnable")
    s2 = r.rl(start=s1, prompts=learnable, group_size=16, num_minibatches=4, steps=40, lr=2e-4,
              max_new_tokens=48, name="reasoning_rl")  # fmt: skip

    own = r.sample(s2, prompts=queries, k=2, max_new_tokens=48, name="own_samples")
    thoughts = r.select(own, how="correct", name="thinking_data")
    fusion = r.mix({thoughts: 0.5, r.demos(r.domains, mode="no_think"): 0.5}, name="fusion_data")
    s3 = r.sft(start=s2, data=fusion, steps=60, lr=5e-4, name="fusion")

    both = r.prompts(r.domains, mode=BOTH)
    answers = r.sample(s3, prompts=both, k=4, num_prompts=500, max_new_tokens=48, name="answers")
    clear = r.pairs(answers, judge=judges.oracle(noise=0.5), how=AllPairs(min_margin=3))
    rm = r.reward_model(start=s3, data=clear, per_prompt=True, steps=100, lr=1e-3)
    rules = dict.fromkeys(r.domains[1:], judges.verifier())
    reward = judges.by_domain(rules | {r.domains[0]: judges.scalar(rm)})
    final = r.rl(start=s3, prompts=both, reward=reward, steps=40, lr=1e-4, max_new_tokens=48,
                 name="general_rl")  # fmt: skip
    if model == "flagship":
        return r.evaluate(final, init=s1, **asked)

    small = r.base("mini" if base == "tiny" else base, thinking=True, name="small_base")
    big = r.sample(final, prompts=both, k=1, max_new_tokens=48, name="flagship_samples")
    taught = r.select(big, how="all", name="flagship_data")
    off_policy = r.sft(start=small, data=taught, steps=100, lr=1e-3, name="off_policy")
    teachers = dict.fromkeys(r.domains, final)
    student = r.distill(start=off_policy, teachers=teachers, prompts=both, steps=150, lr=1e-3,
                        max_new_tokens=48, name="on_policy")  # fmt: skip
    return r.evaluate(student, init=off_policy, teachers=teachers, **asked)
