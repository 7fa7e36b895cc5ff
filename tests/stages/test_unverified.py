"""Stages on a domain without a verifier: no reward is made up, and what needs none goes on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_domain

from posttrain.engine.errors import ConfigError
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.spec import VerifierSpec, is_verified

SHORT = {"steps": 2, "prompts_per_step": 4, "max_new_tokens": 4}
FINISHED = {"judge": "finished"}


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A domain without a verifier."""
    path = tmp_path_factory.mktemp("talk") / "talk"
    return str(write_domain(path, "talk", 4, VerifierSpec(name="none")))


@pytest.fixture
def inputs(models: Mapping[str, str], domains: Mapping[str, str], talk: str) -> dict[str, str]:
    """A model, a verified domain and one without a verifier."""
    both = {"domains.short": domains["domains.short"], "domains.talk": talk}
    return {"start": models["start"], "models.one": models["one"], **both}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sampled(run_stage: Callable[..., Any], inputs: dict[str, str]) -> Any:
    settings = {"k": 2, "num_prompts": 20, "max_new_tokens": 4}
    routes = {"short": ["one"], "talk": ["one"]}
    return run_stage("sample", {**settings, "routes": routes}, inputs)


def test_the_pool_says_that_nobody_knows(talk: str, domains: Mapping[str, str]) -> None:
    places = {"talk": Path(talk), "short": Path(domains["domains.short"])}
    with VerifierPool(places, num_workers=1) as pool:
        problems = [{"domain": name, "id": "1", "answer": "x"} for name in ("talk", "short")]
        scores = pool.scores(problems, ["A", "A"])
        pool.check("talk", problems[:1])
    assert math.isnan(scores[0])
    assert scores[1] == 1.0
    config = json.loads((Path(talk) / "domain.json").read_text())["config"]
    assert not is_verified(config) and not is_verified(config["verifier"])
    assert is_verified({"name": "math", "options": {}})


def test_rollouts_have_no_reward_and_the_mean_leaves_them_out(sampled: Any) -> None:
    rows = rows_of(sampled.out / "rollouts.jsonl")
    rewards = {
        name: [r["reward"] for r in rows if r["domain"] == name] for name in ("short", "talk")
    }
    assert set(rewards["talk"]) == {None}
    assert None not in rewards["short"]
    mean = sum(rewards["short"]) / len(rewards["short"])
    assert sampled.metrics["reward"] == pytest.approx(mean)
    assert 0 < mean < 1


def test_a_stage_of_unverified_rollouts_alone_has_no_reward(
    run_stage: Callable[..., Any], inputs: dict[str, str]
) -> None:
    del inputs["domains.short"]
    settings = {"k": 1, "num_prompts": 5, "max_new_tokens": 4, "routes": {"talk": ["one"]}}
    ran = run_stage("sample", settings, inputs)
    assert ran.metrics == {"rows": 5}
    assert "reward" not in ran.lines[-1]


def test_judges_score_them_and_choices_go_by_the_score(
    run_stage: Callable[..., Any], inputs: dict[str, str], sampled: Any
) -> None:
    rollouts = {"rollouts": str(sampled.out), **inputs}
    judge = {"judge": "format", "pattern": "[a-m]"}
    scored = run_stage("score", {"judge": judge}, rollouts)
    assert {row["score"] for row in rows_of(scored.out / "rollouts.jsonl")} == {0.0, 1.0}
    found = {"rollouts": str(scored.out)}
    best = run_stage("select", {"how": {"kind": "best", "by": "score"}}, found)
    assert {row["domain"] for row in rows_of(best.out / "data.jsonl")} == {"short", "talk"}
    pairs = run_stage("pairs", {"how": {"kind": "best_against_worst", "by": "score"}}, found)
    rows = rows_of(pairs.out / "pairs.jsonl")
    assert {row["domain"] for row in rows} == {"short", "talk"}
    assert all(("rewards" in row) == (row["domain"] == "short") for row in rows)
    for how in ("correct", "best", {"kind": "all", "success": False}):
        with pytest.raises(ConfigError, match=r"by = 'reward', but .*'talk' have no reward"):
            run_stage("select", {"how": how}, found)
    with pytest.raises(ConfigError, match=r"'talk' have no reward; set by = 'score'"):
        run_stage("pairs", {"min_chosen_reward": 0.5, "how": {"kind": "all", "by": "score"}}, found)


def test_rl_learns_from_a_judge(run_stage: Callable[..., Any], inputs: dict[str, str]) -> None:
    judge = {"judge": "by_domain", "domains": {"short": {"judge": "verifier"}, "talk": FINISHED}}
    ran = run_stage("rl", {**SHORT, "group_size": 4, "reward": judge}, inputs)
    for line in ran.lines:
        assert all(math.isfinite(value) for value in line.values())
    log = rows_of(ran.out / "rollouts.jsonl")
    last = [row for row in log if row["step"] == 1]
    short = [row["reward"] for row in last if row["domain"] == "short"]
    assert ran.lines[-1]["accuracy"] == pytest.approx(sum(short) / len(short), abs=1e-5)
    assert {row["reward"] for row in last if row["domain"] == "talk"} == {None}
    assert {row["score"] for row in last if row["domain"] == "talk"} <= {0.0, 1.0}


def test_rl_on_such_a_domain_alone_has_no_accuracy(
    run_stage: Callable[..., Any], inputs: dict[str, str]
) -> None:
    del inputs["domains.short"]
    draw = {"kind": "in_turn", "retire_above": 0.9, "dynamic_sampling": 1}
    ran = run_stage("rl", {**SHORT, "group_size": 4, "reward": FINISHED, "draw": draw}, inputs)
    assert "accuracy" not in ran.lines[-1]
    assert "retired_share" in ran.lines[-1]
    assert all(math.isfinite(value) for line in ran.lines for value in line.values())


def test_distillation_takes_part_and_its_reward_is_of_the_verified_rows(
    run_stage: Callable[..., Any], inputs: dict[str, str], models: Mapping[str, str]
) -> None:
    teachers = {"teachers.t": models["two"]}
    settings = {**SHORT, "reward_weight": 0.5, "samples_per_prompt": 2, "lr": 0.01}
    settings["routes"] = {"short": "t", "talk": "t"}
    both = run_stage("distill", settings, inputs | teachers)
    for line in both.lines:
        assert all(math.isfinite(value) for value in line.values())
        # Four rows of `short`, each right or not.
        assert line["reward"] * 4 == pytest.approx(round(line["reward"] * 4))
    assert all(bool(value.isfinite().all()) for value in both.weights().values())
    del inputs["domains.short"]
    alone = run_stage("distill", settings | {"routes": {"talk": "t"}}, inputs | teachers)
    assert "reward" not in alone.lines[-1]
    assert alone.lines[-1]["kl"] > 0


def test_best_by_a_judge_reports_rewards_of_verified_domains_alone(
    run_stage: Callable[..., Any], inputs: dict[str, str], models: Mapping[str, str]
) -> None:
    candidates = {f"candidates.{name}": models[name] for name in ("one", "two")}
    places = {edge: path for edge, path in inputs.items() if edge.startswith("domains.")}
    settings = {"judge": FINISHED, "num_problems": 4, "max_new_tokens": 4, "bootstrap": 100}
    ran = run_stage("best", settings, {**candidates, **places})
    result = json.loads((ran.out / "best.json").read_text())
    assert all(set(found["rewards"]) == {"short"} for found in result["candidates"].values())
    assert all(math.isfinite(line["reward"]) for line in ran.lines)


def test_problems_without_a_demonstration_are_left_out_and_told(
    run_stage: Callable[..., Any], models: Mapping[str, str], talk: str, tmp_path: Path
) -> None:
    bare = tmp_path / "talk"
    shutil.copytree(talk, bare)
    rows = rows_of(bare / "train.jsonl")
    for row in rows[:7]:
        row["demo"] = None
    (bare / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"start": models["start"], "domains.talk": str(bare)}
    ran = run_stage("sft", {"epochs": 1, "batch_size": 10}, inputs)
    # As many steps as the other problems fill.
    assert len(ran.lines) == math.ceil((len(rows) - 7) / 10)
    (warnings,) = ran.out.parent.glob("warnings*")
    assert f"without a demonstration are not learned, 7 of {len(rows)}," in warnings.read_text()
