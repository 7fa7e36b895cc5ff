"""A preference recipe runs to its end: sample, pairs, dpo, evaluate; the lineage has the edges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import Dpo, DpoNorm, StrongAgainstWeak
from posttrain.engine import ancestry
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.stages.worker import EXECUTE, PRELOAD
from posttrain.suites.domain import Suite

DPO = {"lr": 2e-3, "warmup_steps": 1, "batch_size": 16}
LIMIT = {"max_new_tokens": 4}


def recipe(r: Recipe) -> Stage:
    """A weak and a strong model, delta pairs, then on-policy pairs with the start as reference."""
    weak = r.pretrain(data=r.demos(r.domains), steps=60, lr=5e-3, batch_size=64)
    strong = r.sft(start=weak, data=r.demos(r.domains), steps=60, lr=2e-3)
    prompts = r.prompts(r.domains)
    good = r.sample(strong, prompts=prompts, k=4, name="good", **LIMIT)
    bad = r.sample(weak, prompts=prompts, k=4, name="bad", **LIMIT)
    delta = r.pairs(good, against=bad, how=StrongAgainstWeak(2), name="delta")
    first = r.dpo(start=strong, data=delta, steps=5, loss=DpoNorm(beta=5.0), name="first", **DPO)
    on_policy = r.pairs(r.sample(first, prompts=prompts, k=8, **LIMIT))
    second = r.dpo(
        start=first,
        data=on_policy,
        reference=strong,
        epochs=1.0,
        loss=Dpo(nll_weight=0.2),
        mask_formatting=True,
        name="second",
        **DPO,
    )
    return r.evaluate(second, init=strong, num_problems=10, samples=1, bootstrap=100, **LIMIT)


@pytest.mark.slow
def test_a_preference_recipe_runs_to_its_end(tmp_path: Path, two_domains: Suite) -> None:
    def build() -> Any:
        r = Recipe(two_domains, tmp_path)
        return r.graph(recipe(r))

    store = Store(tmp_path / "store")

    def execute() -> dict[str, str]:
        events = run(build(), store, execute=EXECUTE, preload=PRELOAD)
        return {e.name: e.kind for e in events if e.kind in ("finished", "cached", "failed")}

    assert set(execute().values()) == {"finished"}
    found: dict[str, Artifact] = {artifact.name: artifact for artifact in store.list()}
    assert {edge: source["name"] for edge, source in found["second"].inputs.items()} == {
        "start": "first",
        "data": "pairs",
        "reference": "sft",
    }
    assert {edge: source["name"] for edge, source in found["delta"].inputs.items()} == {
        "rollouts": "good",
        "against": "bad",
    }
    assert found["pairs"].inputs["rollouts"]["name"] == "rollouts"
    ancestors = [
        ancestor.record["name"] for ancestor in ancestry.lineage(store, found["evaluation"])
    ]
    assert {"second", "first", "delta", "pairs", "good", "bad", "rollouts", "sft"} <= set(ancestors)
    assert 0 < found["second"].metrics["loss"] < 10
    assert "learning from preference pairs" in (found["second"].path / "README.md").read_text()
    pairs = [json.loads(line) for line in (found["pairs"].path / "pairs.jsonl").open()]
    assert all(row["rewards"] == [1.0, 0.0] for row in pairs)
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    result = json.loads((found["evaluation"].path / "evaluation.json").read_text())
    assert set(result["domains"]) == {"whole", "last"}

    assert set(execute().values()) == {"cached"}
