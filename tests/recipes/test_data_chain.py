"""Every data operator in one recipe that runs to its end; the lineage has the edges."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.algorithms import AllPairs, AllResponses, BestResponses
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.stages.worker import EXECUTE, PRELOAD
from posttrain.suites.domain import Suite

LIMIT = {"max_new_tokens": 4}
TRAIN = {"lr": 2e-3, "warmup_steps": 1, "batch_size": 16}


def recipe(r: Recipe) -> Stage:
    """Two rounds of sampling into one pool, a mix, filtered prompts, judged pairs, the best."""
    base = r.pretrain(data=r.demos(r.domains), steps=60, lr=5e-3, batch_size=64)
    s = r.sft(start=base, data=r.demos(r.domains), steps=60, lr=2e-3)
    prompts = r.prompts(r.domains)
    pool = [
        r.sample([base, s], prompts=prompts, k=4, num_prompts=20, first_prompt=20 * i,
                 name=f"round{i}", **LIMIT)
        for i in range(2)
    ]  # fmt: skip
    scored = r.score(pool, judge=judges.verifier() - 0.1 * judges.length(budget=2))
    good = r.dedup(r.select(scored, how=BestResponses("score", max_per_prompt=1, success=True)))
    mixed = r.mix({good: 3, r.demos(r.domains): 1}, rows=80)
    second = r.sft(start=base, data=mixed, steps=5, name="second", **TRAIN)
    chosen = r.filter(
        prompts,
        profile=r.profile(s, prompts=prompts, n=4, name="strong", **LIMIT),
        against=r.profile(base, prompts=prompts, n=4, name="weak", **LIMIT),
        low=0.25,
        min_gain=0.0,
        at_least=10,
    )
    tuned = r.rl(start=s, prompts=chosen, steps=4, prompts_per_step=8, group_size=4, **LIMIT)
    failures = r.select(
        tuned, how=AllResponses(max_per_prompt=None, success=False), first_step=2, name="failures"
    )
    taught = r.distill(
        start=failed(r, base, failures), teachers=dict.fromkeys(r.domains, tuned),
        prompts=chosen, steps=2, prompts_per_step=8, **LIMIT
    )  # fmt: skip
    liked = r.pairs(pool, judge=judges.oracle(), how=AllPairs(min_margin=2))
    preferred = r.dpo(start=s, data=liked, steps=3, **TRAIN)
    winner = r.best(
        [base, second, taught, preferred], num_problems=10, samples=1, bootstrap=100, **LIMIT
    )
    return r.evaluate(winner, init=base, num_problems=10, samples=1, bootstrap=100, **LIMIT)


def failed(r: Recipe, start: Stage, failures: Stage) -> Stage:
    """Not a thing to do: a model that learned what went wrong."""
    return r.sft(start=start, data=failures, steps=1, name="failed", **TRAIN)


def rows_of(found: dict[str, Artifact], name: str, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found[name].path / file).open()]


@pytest.mark.slow
def test_all_data_operators_run_in_one_recipe(tmp_path: Path, two_domains: Suite) -> None:
    def build() -> Any:
        r = Recipe(two_domains, tmp_path)
        return r.graph(recipe(r))

    store = Store(tmp_path / "store")

    def execute() -> dict[str, str]:
        events = run(build(), store, execute=EXECUTE, preload=PRELOAD)
        return {e.name: e.kind for e in events if e.kind in ("finished", "cached", "failed")}

    assert set(execute().values()) == {"finished"}
    found: dict[str, Artifact] = {artifact.name: artifact for artifact in store.list()}
    sources = {
        name: {edge: source["name"] for edge, source in artifact.inputs.items()}
        for name, artifact in found.items()
    }
    domains = {"domains.whole": "whole", "domains.last": "last"}
    pool = {"rollouts.0": "round0", "rollouts.1": "round1"}
    assert sources["round1"] == {"models.base": "base", "models.sft": "sft"} | domains
    assert sources["scored"] == sources["pairs"] == pool | domains
    assert sources["selection"] == {"rollouts": "scored"}
    assert sources["distinct"] == {"data": "selection"}
    assert sources["mix"] == {"data.0": "distinct"} | domains
    assert sources["filtered"] == {"profile": "strong", "against": "weak"} | domains
    assert sources["rl"] == {"start": "sft", "prompts": "filtered"} | domains
    assert sources["failures"] == {"rollouts": "rl"}
    candidates = ("base", "second", "student", "dpo")
    assert sources["best"] == {f"candidates.{name}": name for name in candidates} | domains

    scored = rows_of(found, "scored", "rollouts.jsonl")
    assert len(scored) == 2 * 2 * 2 * 20 * 4 and all("score" in row for row in scored)
    assert {row["model"] for row in scored} == {"base", "sft"}
    good = rows_of(found, "distinct", "data.jsonl")
    assert good and all(row["reward"] == 1 for row in good)
    mixed = Counter("reward" in row for row in rows_of(found, "mix", "data.jsonl"))
    assert mixed == {True: 60, False: 20}
    allowed = {(row["domain"], row["id"]) for row in rows_of(found, "filtered", "prompts.jsonl")}
    assert len(allowed) >= 20
    tried = {(row["domain"], row["id"]) for row in rows_of(found, "rl", "rollouts.jsonl")}
    assert tried <= allowed
    failures = rows_of(found, "failures", "data.jsonl")
    assert failures and all(row["reward"] < 1 for row in failures)
    assert all(row["strength"] >= 2 for row in rows_of(found, "pairs", "pairs.jsonl"))
    assert found["best"].metrics["winner"] in candidates
    assert (found["best"].path / "README.md").read_text().count("best of several models") == 1
    assert set(execute().values()) == {"cached"}
