"""Reward models and critics in recipes: their edges, the errors, and a run that makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from posttrain.algorithms import BestAgainstWorst, Gae
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.runner import run
from posttrain.engine.store import Store
from posttrain.recipe import Recipe
from posttrain.rewards.spec import VerifierSpec
from posttrain.stages.worker import EXECUTE, PRELOAD
from posttrain.suites.domain import Domain, Suite, Table

QUICK = {"lr": 2e-3, "warmup_steps": 1, "batch_size": 16}


def recipe(folder: Path) -> Recipe:
    rows = [{"prompt": f"{i} apples", "answer": str(i), "demo": str(i)} for i in range(100, 220)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = Domain(
        name="apples",
        source=Table(train="rows.jsonl", demo="demo"),
        # Right by chance, so that a bad model has pairs.
        verifier=VerifierSpec(name="regex", options={"pattern": "^[0-4]"}),
    )
    return Recipe(Suite(name="mine", domains={"apples": domain}), folder)


@pytest.mark.slow
def test_a_reward_model_starts_another_and_a_critic(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    base = r.pretrain(data=r.demos(r.domains), steps=20, lr=5e-3, batch_size=64)
    rollouts = r.sample(base, prompts=r.prompts(r.domains), k=6, max_new_tokens=4)
    pairs = r.pairs(rollouts, how=BestAgainstWorst(max_per_prompt=3))
    first = r.reward_model(start=base, data=pairs, steps=4, per_prompt=True, **QUICK)
    second = r.reward_model(start=first, data=pairs, epochs=0.5, name="second", **QUICK)
    policy = r.rl(
        start=base,
        prompts=r.prompts(r.domains),
        critic=second,
        advantage=Gae(critic_lr=5e-3),
        steps=3,
        prompts_per_step=16,
        group_size=1,
        max_new_tokens=4,
        lr=2e-3,
    )
    store = Store(tmp_path / "store")
    events = [e.kind for e in run(r.graph(policy), store, execute=EXECUTE, preload=PRELOAD)]
    assert "failed" not in events
    found: dict[str, Artifact] = {artifact.name: artifact for artifact in store.list()}
    edges = {edge: source["name"] for edge, source in found["second"].inputs.items()}
    assert edges == {"start": "reward_model", "data": "pairs"}
    assert found["second"].kind == "reward_model"
    assert 0 <= found["second"].metrics["heldout_accuracy"] <= 1
    card = (found["second"].path / "README.md").read_text()
    assert "a reward model from preference pairs" in card
    edges = {edge: source["name"] for edge, source in found["rl"].inputs.items()}
    assert edges == {"start": "base", "critic": "second", "domains.apples": "apples"}
    model = AutoModelForSequenceClassification.from_pretrained(found["second"].path)
    assert model.config.num_labels == 1


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    base = r.pretrain(data=r.demos(r.domains), steps=2)
    rollouts = r.sample(base, prompts=r.prompts(r.domains))
    pairs = r.pairs(rollouts)
    with pytest.raises(ConfigError, match=r"\(reward_model\): its data is 'rollouts'"):
        r.reward_model(start=base, data=rollouts, steps=1)
    with pytest.raises(ConfigError, match=r"start = .* is not a model; .* dpo, reward_model.*$"):
        r.reward_model(start=pairs, data=pairs, steps=1)
    scores = r.reward_model(start=base, data=pairs, steps=1)
    with pytest.raises(ConfigError, match=r"'sft': start = .*reward_model.* is not a model"):
        r.sft(start=scores, data=r.demos(r.domains), steps=1)
    with pytest.raises(ConfigError, match=r"'dpo': reference = .* is not a model"):
        r.dpo(start=base, data=pairs, reference=scores, steps=1)
    with pytest.raises(ConfigError, match=r"critic = .*'pairs'.* is not a model"):
        r.rl(start=base, prompts=r.prompts(r.domains), critic=pairs, advantage="gae", steps=1)
    with pytest.raises(ConfigError, match=r"critic = 'reward_model' is read with advantage = gae"):
        r.rl(start=base, prompts=r.prompts(r.domains), critic=scores, steps=1)
