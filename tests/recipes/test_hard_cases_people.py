"""Hard cases of the recipe language: people decide, and recipes share what they made.

As in `test_hard_cases_lines.py`. Where people are asked, the run stops, the test fills in their
file, and the same run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.cli import main
from posttrain.engine.errors import Waiting
from posttrain.engine.store import Store
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


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def fill(path: Path, better: Callable[[str, str], bool], leave: int = 0) -> list[dict[str, Any]]:
    """Answer the questions of a file but the first `leave`: a where `better(a, b)`, else b.

    Returns its rows.
    """
    rows = read(path)
    for row in rows[leave:]:
        row["preferred"] = "a" if better(row["a"], row["b"]) else "b"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_case_16_people_pick_among_candidates(bench: Any) -> None:
    """Case 16, OLMo 3 Instruct: two DPO candidates each get RL, then people pick one.

    Two panels of opposite tastes see the same answers, so that their picks differ.
    """
    r = bench.recipe(16)
    base = bench.base(r)
    pairs = r.pairs(r.sample(base, prompts=r.prompts("reasoning"), k=6, **DRAW))
    candidates = {}
    for name, lr in {"mild": 1e-4, "bold": 2e-2}.items():
        liked = r.dpo(start=base, data=pairs, name=f"{name}_dpo", **LEARN | {"lr": lr})
        candidates[name] = r.rl(
            start=liked, prompts=r.prompts("reasoning"), name=f"{name}_rl", **RL
        )
    files = {name: bench.folder / f"{name}.jsonl" for name in ("some", "others")}
    asked = {"prompts": r.prompts("reasoning"), "samples": 1, "num_problems": 9, "bootstrap": 100}
    panels = [
        r.best(candidates, judge=judges.human(str(file)), name=name, max_new_tokens=4, **asked)
        for name, file in files.items()
    ]
    target = r.merge(panels)
    with pytest.raises(Waiting, match=r"(?s)stage some waits: .*stage others waits: "):
        bench.run(r, target)
    assert fill(files["some"], lambda a, b: a > b)
    fill(files["others"], lambda a, b: a < b)
    made = bench.run(r, target)
    people = {"candidates.mild": "mild_rl", "candidates.bold": "bold_rl"} | DOMAIN
    assert made["some"].edges == made["others"].edges == people
    for name in candidates:
        assert made[f"{name}_rl"].edges == {"start": f"{name}_dpo"} | DOMAIN
        assert made[f"{name}_dpo"].edges == {"start": "base", "data": "pairs"}
    found = [made[name].read("best.json") for name in files]
    shares = [{n: c["value"] for n, c in one["candidates"].items()} for one in found]
    assert shares[0]["mild"] == pytest.approx(1 - shares[1]["mild"]) != pytest.approx(0.5)
    for one, share, name in zip(found, shares, files, strict=True):
        assert one["winner"] == max(share, key=lambda n: share[n])
        # What people said is part of the artifact, and the winner's weights are the stage's own.
        assert "comparisons.jsonl" in made[name].artifact.files
        assert made[name].weights == made[f"{one['winner']}_rl"].weights
    assert found[0]["winner"] != found[1]["winner"]


def test_case_21_recipes_share_an_artifact(bench: Any) -> None:
    """Case 21, OLMo 3 32B: its RL learns from the prompts that were filtered for the 7B model,
    by another recipe."""

    def filtered(r: Recipe) -> tuple[Stage, Stage]:
        small, prompts = bench.base(r), r.prompts("reasoning")
        rates = r.profile(small, prompts=prompts, n=4, **DRAW)
        return small, r.filter(prompts, profile=rates, low=0.1, high=0.9)

    first = bench.recipe(21)
    small, prompts = filtered(first)
    ours = bench.run(first, first.rl(start=small, prompts=prompts, name="rl_7b", **RL))
    second = bench.recipe(21)
    _, prompts = filtered(second)
    large = bench.base(second, hidden_size=48, name="large")
    theirs = bench.run(second, second.rl(start=large, prompts=prompts, name="rl_32b", **RL))
    assert ours["rl_7b"].edges == {"start": "base", "prompts": "filtered"} | DOMAIN
    assert theirs["rl_32b"].edges == {"start": "large", "prompts": "filtered"} | DOMAIN
    assert theirs["rl_32b"].artifact.inputs["prompts"] == ours["rl_7b"].artifact.inputs["prompts"]
    assert theirs["filtered"].edges == {"profile": "profile"} | DOMAIN
    assert theirs["profile"].edges == {"model": "base"} | DOMAIN
    kept = {row["id"] for row in theirs["filtered"].rows("prompts.jsonl")}
    assert {row["id"] for row in theirs["rl_32b"].rows("rollouts.jsonl")} <= kept
    assert 0 < len(kept) < 12


RECIPE = '''
"""Llama 2: people compare the model's responses; a reward model learns from them."""
from posttrain import judges


def recipe(r):
    base = r.pretrain(data=r.demos("reasoning"), steps=30, lr=5e-3, batch_size=32, hidden_size=32)
    seen = r.sample(base, prompts=r.prompts("reasoning"), k=4, num_prompts=8, max_new_tokens=4)
    said = r.pairs(seen, judge=judges.human("annotate.jsonl"), how="random")
    scorer = r.reward_model(start=base, data=said, steps=2, lr=1e-3, batch_size=4)
    return r.rl(start=base, prompts=r.prompts("reasoning"), reward=judges.scalar(scorer), steps=1,
                prompts_per_step=4, group_size=2, max_new_tokens=3)
'''


def test_case_22_people_annotate_while_the_run_waits(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Case 22, Llama 2 and 3: annotation by people is a stage; the run ends with exit code 3 and
    names the file, and the same command goes on when it is filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_STORE", raising=False)
    Path("llama.py").write_text(RECIPE)
    command = ["run", "llama.py", "--suite", str(bench.folder / "hard.toml")]
    assert main(command) == 3
    printed = capfd.readouterr()
    assert "stage pairs waits" in printed.err and "annotate.jsonl" in printed.err
    store = Store(tmp_path / "posttrain-store")
    assert {a.name for a in store.list()} == {"reasoning", "base", "rollouts"}
    asked = read(Path("annotate.jsonl"))
    assert asked and all(row["preferred"] == "" for row in asked)
    # All but one are not enough.
    fill(Path("annotate.jsonl"), lambda a, b: a > b, leave=1)
    assert main(command) == 3
    assert f"1 of {len(asked)} comparisons" in capfd.readouterr().err
    said = fill(Path("annotate.jsonl"), lambda a, b: a > b)
    assert main(command) == 0
    assert "cached" in capfd.readouterr().out
    made = bench.lineage(store, store.named("rl", "rl")[0])
    assert made["pairs"].edges == {"rollouts": "rollouts"} | DOMAIN
    assert made["reward_model"].edges == {"start": "base", "data": "pairs"}
    assert made["rl"].edges == {"start": "base", "judges.reward_model": "reward_model"} | DOMAIN
    assert set(made) == {"reasoning", "base", "rollouts", "pairs", "reward_model", "rl"}
    rows = made["pairs"].rows("pairs.jsonl")
    pairs = {(row["id"], row["chosen"], row["rejected"]) for row in rows}
    assert pairs == {(row["id"], max(row["a"], row["b"]), min(row["a"], row["b"])) for row in said}
