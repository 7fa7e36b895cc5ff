"""Hard cases of the recipe language: further losses, settings by domain, settings fed back.

As in `test_hard_cases_lines.py`, and what the stages logged shows that the knob was turned.
"""

from __future__ import annotations

from typing import Any

import pytest

from posttrain import judges, schedules
from posttrain.algorithms import KL, Aux, Clip

pytestmark = pytest.mark.slow

LEARN: dict[str, Any] = {"steps": 2, "lr": 1e-3, "warmup_steps": 1, "batch_size": 8}
RL: dict[str, Any] = {
    "steps": 2,
    "lr": 1e-3,
    "warmup_steps": 1,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 4,
}
BOTH = {"domains.reasoning": "reasoning", "domains.general": "general"}


def test_case_13_losses_beside_the_stage_s_own(bench: Any) -> None:
    """Case 13, InstructGPT's PPO-ptx, Kimi K2, Llama 3, Nemotron 3 Nano: SFT, RL, DPO and
    distillation each with a cross-entropy on data of its own."""
    r = bench.recipe(13)
    base = bench.base(r)
    demos = r.demos("general")
    sft = r.sft(
        start=base,
        data=r.demos("reasoning"),
        aux={"ptx": (demos, Aux(0.5, batch_size=8))},
        **LEARN,
    )
    policy = r.rl(
        start=sft,
        prompts=r.prompts("reasoning"),
        aux={
            "ptx": (demos, Aux(0.5, batch_size=8)),
            "judge": (r.demos("judging"), Aux(0.1, batch_size=8)),
        },
        **RL | {"group_size": 8},
    )
    own = r.select(policy, how="best")
    preferring = {"data": r.pairs(policy), "aux": {"sft": (own, Aux(0.2, batch_size=8))}}
    liked = r.dpo(start=policy, **preferring, **LEARN)
    student = r.distill(
        start=liked,
        teachers={"reasoning": policy},
        prompts=r.prompts("reasoning"),
        aux={"ptx": (demos, Aux(0.3, batch_size=8))},
        steps=2,
        prompts_per_step=4,
        max_new_tokens=4,
    )
    made = bench.run(r, student)
    one = {"domains.reasoning": "reasoning"}
    ptx = {"aux.ptx.general": "general"}
    assert made["sft"].edges == {"start": "base"} | ptx | one
    assert made["rl"].edges == {"start": "sft", "aux.judge.judging": "judging"} | ptx | one
    assert made["dpo"].edges == {"start": "rl", "data": "pairs", "aux.sft": "selection"}
    assert made["student"].edges == {"start": "dpo", "teachers.rl": "rl"} | ptx | one
    named = {"sft": ("ptx",), "rl": ("ptx", "judge"), "dpo": ("sft",), "student": ("ptx",)}
    for name, losses in named.items():
        lines = made[name].rows("metrics.jsonl")
        assert len(lines) == 2
        assert all(line[f"aux/{loss}"] > 0 for line in lines for loss in losses)
    weights = {name: aux["weight"] for name, aux in made["rl"].config["aux"].items()}
    assert weights == {"ptx": 0.5, "judge": 0.1}


def test_case_14_knobs_by_domain(bench: Any) -> None:
    """Case 14, DeepSeek-V3.2, Nemotron Cascade 2: the weight of the KL and the penalties go by
    domain, and the prompts are in thinking mode only."""
    r = bench.recipe(14)
    demos = r.demos(["reasoning", "general"], mode=("think", "no_think"))
    thinker = bench.base(r, data=demos, thinking=True, name="thinker")
    cost = 0.1 * judges.length(budget=1)
    penalties = {"reasoning": judges.verifier(), "general": judges.verifier() - cost}
    given: dict[str, Any] = {
        "start": thinker,
        "prompts": r.prompts(["reasoning", "general"], mode="think"),
        "reward": judges.by_domain(penalties),
        **RL | {"steps": 3, "max_new_tokens": 8},
    }
    free = r.rl(kl=KL(1.0, domains={"reasoning": 0.0, "general": 1.0}), name="free", **given)
    held = r.rl(kl=KL(1.0, domains={"reasoning": 1.0, "general": 1.0}), name="held", **given)
    made = bench.run(r, r.merge([free, held]))
    for name in ("free", "held"):
        assert made[name].edges == {"start": "thinker"} | BOTH
    assert made["free"].config["kl"]["domains"] == {"reasoning": 0.0, "general": 1.0}
    assert made["free"].weights != made["held"].weights
    rows = made["free"].rows("rollouts.jsonl")
    assert {row["mode"] for row in rows} == {"think"}
    assert {row["domain"] for row in rows} == {"reasoning", "general"}
    for row in rows:
        taken = 0.1 * (row["num_tokens"] - 1) if row["domain"] == "general" else 0.0
        assert row["score"] == pytest.approx(row["reward"] - taken, abs=1e-6)
    assert any(row["num_tokens"] > 1 for row in rows if row["domain"] == "general")


def test_case_19_metrics_feed_back_into_settings(bench: Any) -> None:
    """Case 19, MAI-Thinking-1's adaptive entropy, Kimi K2.5's Toggle: the upper clip follows the
    entropy, and the length limit switches between two values."""
    r = bench.recipe(19)
    target = 3.4
    upper = schedules.track("entropy", target=target, first=0.28, change=0.04, low=0.2, high=0.36)
    policy = r.rl(
        start=bench.base(r),
        prompts=r.prompts("reasoning"),
        num_minibatches=2,
        surrogate=Clip(clip_high=upper),
        max_new_tokens=schedules.alternate(6, 3, every=2),
        **{k: v for k, v in RL.items() if k != "max_new_tokens"}
        | {"steps": 6, "prompts_per_step": 8},
    )
    made = bench.run(r, policy)
    assert made["rl"].edges == {"start": "base", "domains.reasoning": "reasoning"}
    config = made["rl"].config
    assert config["surrogate"]["clip_high"]["schedule"] == "track"
    assert config["max_new_tokens"]["schedule"] == "alternate"
    lines = made["rl"].rows("metrics.jsonl")
    wanted = 0.28
    for line in lines:
        assert line["setting/surrogate/clip_high"] == pytest.approx(wanted)
        wanted += 0.04 if line["entropy"] < target else -0.04
        wanted = min(max(wanted, 0.2), 0.36)
    assert len({line["setting/surrogate/clip_high"] for line in lines}) > 1
    assert [line["setting/max_new_tokens"] for line in lines] == [6, 6, 3, 3, 6, 6]
    rows = made["rl"].rows("rollouts.jsonl")
    longest = [max(row["num_tokens"] for row in rows if row["step"] == step) for step in range(6)]
    assert all(length <= limit for length, limit in zip(longest, [6, 6, 3, 3, 6, 6], strict=True))
    assert max(longest) > 3
