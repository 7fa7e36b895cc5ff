"""Hard cases of the recipe language: which model starts, samples, judges or criticises where.

Each is the smallest recipe that has the case in it. It runs on a tiny model, and what is asserted
are the edges that the store's records have afterwards.
"""

from __future__ import annotations

from typing import Any

import pytest

from posttrain import judges
from posttrain.algorithms import AllResponses, Aux, BestResponses, Critique
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe

pytestmark = pytest.mark.slow

LEARN: dict[str, Any] = {"steps": 2, "lr": 1e-3, "warmup_steps": 1, "batch_size": 8}
DRAW: dict[str, Any] = {"num_prompts": 12, "max_new_tokens": 4}
RL: dict[str, Any] = {
    "steps": 2,
    "lr": 1e-3,
    "warmup_steps": 1,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 4,
}
DOMAIN = {"domains.reasoning": "reasoning"}


def ranked(r: Recipe, model: Stage, name: str = "pairs") -> Stage:
    """Pairs of a model's own responses, best against worst."""
    rollouts = r.sample(model, prompts=r.prompts("reasoning"), k=6, name=f"{name}_from", **DRAW)
    return r.pairs(rollouts, name=name)


def test_case_01_a_line_that_only_makes_data(bench: Any) -> None:
    """Case 1, DeepSeek-R1: Dev1 and Dev2 only produce data; Dev3 restarts from the base."""
    r = bench.recipe(1)
    base = bench.base(r)
    dev1 = r.sft(start=base, data=r.demos("reasoning"), name="dev1", **LEARN)
    dev2 = r.rl(start=dev1, prompts=r.prompts("reasoning"), name="dev2", **RL)
    written = r.select(r.sample([dev1, dev2], prompts=r.prompts("reasoning"), k=2, **DRAW))
    dev3 = r.sft(start=base, data=written, name="dev3", **LEARN)
    made = bench.run(r, dev3)
    assert made["dev3"].edges == {"start": "base", "data": "selection"}
    assert made["selection"].edges == {"rollouts": "rollouts"}
    assert made["rollouts"].edges == {"models.dev1": "dev1", "models.dev2": "dev2"} | DOMAIN
    assert made["dev2"].edges == {"start": "dev1"} | DOMAIN
    assert made["dev1"].edges == {"start": "base"} | DOMAIN


def test_case_02_three_model_edges_in_one_round(bench: Any) -> None:
    """Case 2, Llama 3: in each round reward model and SFT start from the base, DPO from this
    round's SFT, and the last round's best model samples."""
    r = bench.recipe(2)
    base = best = bench.base(r)
    for i in (1, 2):
        rollouts = r.sample(
            best, prompts=r.prompts("reasoning"), k=6, name=f"rollouts_{i}", seed=i, **DRAW
        )
        pairs = r.pairs(rollouts, name=f"pairs_{i}")
        scorer = r.reward_model(start=base, data=pairs, name=f"scorer_{i}", **LEARN)
        scored = r.score(rollouts, judge=judges.scalar(scorer), name=f"scored_{i}")
        chosen = r.select(scored, how=BestResponses("score", max_per_prompt=1), name=f"chosen_{i}")
        sft = r.sft(start=base, data=chosen, name=f"sft_{i}", **LEARN)
        best = r.dpo(start=sft, data=pairs, name=f"dpo_{i}", **LEARN)
    made = bench.run(r, best)
    for i, sampler in ((1, "base"), (2, "dpo_1")):
        assert made[f"rollouts_{i}"].edges == {f"models.{sampler}": sampler} | DOMAIN
        assert made[f"pairs_{i}"].edges == {"rollouts": f"rollouts_{i}"}
        assert made[f"scorer_{i}"].edges == {"start": "base", "data": f"pairs_{i}"}
        judge = {f"judges.scorer_{i}": f"scorer_{i}"}
        assert made[f"scored_{i}"].edges == {"rollouts": f"rollouts_{i}"} | judge | DOMAIN
        assert made[f"chosen_{i}"].edges == {"rollouts": f"scored_{i}"}
        assert made[f"sft_{i}"].edges == {"start": "base", "data": f"chosen_{i}"}
        assert made[f"dpo_{i}"].edges == {"start": f"sft_{i}", "data": f"pairs_{i}"}


def test_case_03_another_size_samples_than_learns(bench: Any) -> None:
    """Case 3, Llama 2's rejection sampling: the 70B model samples, the 7B model learns."""
    r = bench.recipe(3)
    small, large = bench.base(r), bench.base(r, hidden_size=48, name="large")
    rollouts = r.sample(large, prompts=r.prompts("reasoning"), k=4, **DRAW)
    chosen = r.select(rollouts, how=BestResponses(max_per_prompt=1))
    made = bench.run(r, r.sft(start=small, data=chosen, **LEARN))
    assert made["rollouts"].edges == {"models.large": "large"} | DOMAIN
    assert made["selection"].edges == {"rollouts": "rollouts"}
    assert made["sft"].edges == {"start": "base", "data": "selection"}
    width = {name: made[name].read("config.json")["hidden_size"] for name in ("large", "sft")}
    assert width == {"large": 48, "sft": 32}


def test_case_04_a_reward_model_is_only_where_the_critic_starts(bench: Any) -> None:
    """Case 4, Tülu 3: a reward model initialises the critic, and verifiers give the reward."""
    r = bench.recipe(4)
    base = bench.base(r)
    scorer = r.reward_model(start=base, data=ranked(r, base), **LEARN)
    policy = r.rl(start=base, prompts=r.prompts("reasoning"), critic=scorer, advantage="gae", **RL)
    made = bench.run(r, policy)
    assert made["rl"].edges == {"start": "base", "critic": "reward_model"} | DOMAIN
    assert made["reward_model"].edges == {"start": "base", "data": "pairs"}
    assert made["rl"].config["reward"] == {"judge": "verifier"}
    assert all(line["value_loss"] > 0 for line in made["rl"].rows("metrics.jsonl"))


def test_case_05_what_rl_sampled_feeds_a_later_sft(bench: Any) -> None:
    """Case 5, MAI-Thinking-1, GLM-4.5, K2.5: an RL stage's rollouts by step and success are the
    data of a later SFT."""
    r = bench.recipe(5)
    base = bench.base(r)
    policy = r.rl(start=base, prompts=r.prompts("reasoning"), **RL | {"steps": 4})
    late = r.select(policy, how=AllResponses(success=True), first_step=2, last_step=3)
    made = bench.run(r, r.sft(start=base, data=late, **LEARN))
    assert made["sft"].edges == {"start": "base", "data": "selection"}
    assert made["selection"].edges == {"rollouts": "rl"}
    rows = made["rl"].rows("rollouts.jsonl")
    assert {row["step"] for row in rows} == {0, 1, 2, 3}
    wanted = {
        (row["id"], row["response"]) for row in rows if row["step"] >= 2 and row["reward"] == 1
    }
    assert {(row["id"], row["demo"]) for row in made["selection"].rows("data.jsonl")} == wanted
    assert 0 < len(wanted) < len(rows)


def test_case_06_the_policy_is_its_own_judge(bench: Any) -> None:
    """Case 6, DeepSeek-V4, Kimi K2: the judge is the policy, which learns to judge beside its work:
    by prompts of its own, and by comparisons of responses whose rewards are known: those of another
    model, and its own of every step."""
    r = bench.recipe(6)
    base = bench.base(r)
    seen = r.sample(base, prompts=r.prompts("reasoning"), k=6, **DRAW)
    compared = r.comparisons(seen)
    itself = judges.lexicographic(judges.verifier(), judges.itself(pairing="circular", swap=False))
    policy = r.rl(
        start=base,
        prompts=r.prompts(["reasoning", "judging"]),
        reward=judges.by_domain({"reasoning": itself, "judging": judges.verifier()}),
        aux={"judging": (compared, Aux(0.5, batch_size=8))},
        critique=Critique(0.5, domains=("reasoning",)),
        **RL,
    )
    made = bench.run(r, policy)
    # No judge among the edges: it has no weights but the policy's.
    assert (
        made["rl"].edges
        == {
            "start": "base",
            "aux.judging": "comparisons",
            "domains.judging": "judging",
        }
        | DOMAIN
    )
    assert made["comparisons"].edges == {"rollouts": "rollouts"}
    lines = made["rl"].rows("metrics.jsonl")
    assert all(line["aux/judging"] > 0 for line in lines)
    assert any(line["critique_pairs"] > 0 and line["critique_loss"] > 0 for line in lines)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in made["rl"].rows("rollouts.jsonl"):
        groups.setdefault((row["step"], row["domain"], row["id"]), []).append(row)
    decided = []
    for (_, domain, _), rows in groups.items():
        tied = len({row["reward"] for row in rows}) == 1
        judged = any(row["score"] != row["reward"] for row in rows)
        assert judged == (domain == "reasoning" and tied)
        decided.append(judged)
    assert any(decided)
