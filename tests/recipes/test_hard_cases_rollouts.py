"""Hard cases of the recipe language: what the rollouts of an rl stage are.

Each builds the recipe, runs it on a tiny model, and looks at its lineage and at its rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.algorithms import KL
from posttrain.engine.record import Artifact
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Suite, Table

RL = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "warmup_steps": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe over one domain of 60 problems: repeat the number's last digit."""
    rows = [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(60)]
    rows = [row | {"demo": row["answer"]} for row in rows]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table(train="digits.jsonl", demo="demo")
    digits = Domain(name="digits", source=table, verifier=VerifierSpec(name="exact"))
    return Recipe(Suite(name="mine", domains={"digits": digits}), tmp_path)


def edges(artifact: Artifact) -> dict[str, str]:
    return {edge: source["name"] for edge, source in artifact.inputs.items()}


def read(artifact: Artifact, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / file).open(encoding="utf-8")]


def start(r: Recipe) -> Stage:
    """A model that solves some of the problems."""
    return r.pretrain(data=r.demos(r.domains), steps=60, lr=5e-3, batch_size=32)


@pytest.mark.slow
def test_case_20_rollouts_carry_the_mask_of_their_sampling(
    recipe: Recipe, execute: Callable[..., dict[str, Artifact]]
) -> None:
    """Case 20, DeepSeek-V3.2: the mask of top-p sampling is replayed by the policy, before its
    updates as well, and by the reference. That the ratio of the two engines is 1 says that the
    rollouts carried it; a stage that forgets it finds a ratio below 1."""
    r, base = recipe, start(recipe)
    settings = RL | {"top_p": 0.8, "correction": "truncated", "kl": KL(0.01)}
    prompts = r.prompts(r.domains)
    kept = r.rl(start=base, prompts=prompts, name="kept", **settings)
    found = execute(
        r, r.rl(start=kept, prompts=prompts, name="lost", replay_mask=False, **settings)
    )
    assert edges(found["kept"]) == {"start": "base", "domains.digits": "digits"}
    assert edges(found["lost"]) == {"start": "kept", "domains.digits": "digits"}
    with_mask = read(found["kept"], "metrics.jsonl")
    assert [line["sampler_ratio"] for line in with_mask] == pytest.approx([1, 1], abs=1e-4)
    assert with_mask[0]["kl_reference"] == pytest.approx(0, abs=1e-5)
    assert all(line["nucleus_size"] >= 1 for line in with_mask)
    assert all(line["sampler_ratio"] < 0.98 for line in read(found["lost"], "metrics.jsonl"))
