"""Shipped recipes from DeepSeek-V3.1 on: each has the edges that make it that recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.graph import Graph, Node
from posttrain.engine.store import Store
from posttrain.language.loader import load_recipe

Load = Callable[..., Graph]
DOMAINS = ("add", "reverse", "sort", "palindrome")
BOTH = ["think", "no_think"]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The graph of a shipped recipe on the core suite."""

    def load(name: str, *settings: str) -> Graph:
        return load_recipe(name, store=Store(tmp_path / "none"), settings=settings).graph

    return load


def of_kind(graph: Graph, kind: str) -> dict[str, Node]:
    return {name: node for name, node in graph.nodes.items() if node.kind == kind}


def edges(node: Node, prefix: str) -> dict[str, str]:
    """Inputs under `prefix.`, by what follows it."""
    start = f"{prefix}."
    return {e.removeprefix(start): to for e, to in node.inputs.items() if e.startswith(start)}


def line(graph: Graph, name: str) -> list[str]:
    """A model and what it starts from, back to the first."""
    found = [name]
    while "start" in graph.nodes[found[-1]].inputs:
        found.append(graph.nodes[found[-1]].inputs["start"])
    return found


@pytest.mark.parametrize("name", ["deepseek_v31", "deepseek_v32"])
def test_specialists_only_sample_and_the_base_learns_from_them(load: Load, name: str) -> None:
    graph = load(name)
    nodes = graph.nodes
    for mode in BOTH:
        models = {f"{d}_{mode}_expert" for d in DOMAINS}
        assert set(edges(nodes[f"{mode}_samples"], "models")) == models
        assert all(line(graph, model)[-1] == "base" for model in models)
    assert set(edges(nodes["sft_data"], "data").values()) == {"think_data", "no_think_data"}
    assert nodes["sft"].inputs == {"start": "base", "data": "sft_data"}
    assert line(graph, "mixed_grpo") == ["mixed_grpo", "sft", "base"]
    assert nodes["mixed_grpo"].config["modes"] == BOTH


def test_v32_has_its_stabilisers(load: Load) -> None:
    config = load("deepseek_v32", "delta=0.3").nodes["mixed_grpo"].config
    assert config["advantage"] == {"kind": "group_mean"}
    assert config["kl"]["estimator"] == "unbiased"
    assert config["kl"]["domains"] == {"add": 0.0} and config["kl"]["coef"] > 0
    assert config["off_policy_delta"] == 0.3 and config["num_minibatches"] > 1


def test_v4_merges_twelve_experts_by_their_logits(load: Load) -> None:
    graph = load("deepseek_v4")
    student = graph.nodes["student"]
    efforts = ("non_think", "high", "max")
    experts = {f"{d}_{effort}" for d in DOMAINS for effort in efforts}
    assert set(edges(student, "teachers")) == experts and len(experts) == 12
    assert student.inputs["start"] == "sft"
    assert student.config["estimator"]["kind"] == "reverse_kl"
    assert student.config["routes"]["sort/think"] == ["sort_high", "sort_max"]
    assert student.config["routes"]["sort/no_think"] == "sort_non_think"
    for name in experts:
        assert line(graph, name) == [name, f"{name}_sft", "sft", "base"]
        reward = graph.nodes[name].config["reward"]
        assert reward["judge"] == "lexicographic" and reward["second"]["judge"] == "itself"
        # The actor learns to judge before RL, and beside it on what it samples.
        assert graph.nodes[f"{name}_sft"].inputs["aux.judging"] == "judging_data"
        assert graph.nodes[name].config["critique"]["weight"] > 0
    assert "sum" in str(graph.nodes["add_high"].config["reward"]["first"]["judge"])
    assert graph.nodes["add_max"].config["reward"]["first"] == {"judge": "verifier"}


def test_mimo_has_six_teachers_and_the_student_itself(load: Load) -> None:
    graph = load("mimo_v2_flash", "rounds=2")
    first, second = graph.nodes["mopd1"], graph.nodes["mopd2"]
    teachers = edges(first, "teachers")
    assert len(teachers) == 7 and teachers["self"] == "sft" == first.inputs["start"]
    for name in teachers.keys() - {"self"}:
        assert line(graph, name)[2:] == ["sft", "base"]
    for name in edges(second, "teachers").keys() - {"self"}:
        assert "mopd1" in line(graph, name)
    assert second.inputs["start"] == "mopd1"
    for node in (first, second):
        assert node.config["estimator"]["kind"] == "sampled_token"
        assert node.config["reward_weight"] > 0
        assert node.config["correction"]["kind"] == "icepop"


def test_nano_has_a_curriculum_a_generative_judge_and_a_small_dpo(load: Load) -> None:
    graph = load("nemotron3_nano")
    rlvr, rlhf, dpo = (graph.nodes[name] for name in ("rlvr", "rlhf", "dpo"))
    assert line(graph, "dpo") == ["dpo", "rlhf", "rlvr", "sft", "base"]
    draw = rlvr.config["draw"]
    assert draw["kind"] == "gaussian" and draw["reprofile"]["on_plateau"]
    assert rlvr.inputs["prompts"] == "not_always_solved" and rlvr.inputs["profile"] == "profile"
    assert set(rlvr.config["domain_shares"]) == set(DOMAINS)
    assert edges(rlhf, "judges") == {"genrm": "genrm"}
    assert "circular" in str(rlhf.config["reward"])
    assert dpo.config["aux"]["sft"]["weight"] == 0.2 and dpo.config["loss"]["beta"] == 0.05
    assert graph.nodes["own"].config["k"] == 32


def test_super_is_one_line_of_eight_trainings(load: Load) -> None:
    graph = load("nemotron3_super")
    chain = ["mtp_healing", "rlhf", "swe_end_to_end", "swe_pivot", "rlvr3", "rlvr2", "rlvr1", "sft"]
    assert line(graph, "mtp_healing") == [*chain, "base"]
    blends = [graph.nodes[f"rlvr{n}"].config["domain_shares"] for n in (1, 2, 3)]
    assert blends[0] != blends[1] != blends[2]
    assert graph.nodes["rlhf"].config["kl"]["coef"] == 1e-4
    assert edges(graph.nodes["rlhf"], "judges") == {"genrm": "genrm"}
    assert graph.nodes["mtp_healing"].config["trainable"] == ["model.norm.weight"]
    assert graph.nodes["rl_data"].inputs == {"rollouts": "rlhf"}


def test_ultra_refreshes_some_teachers_and_keeps_others(load: Load) -> None:
    graph = load("nemotron3_ultra")
    first, second = (edges(graph.nodes[f"mopd{n}"], "teachers") for n in (1, 2))
    assert line(graph, "mopd1") == ["mopd1", "mopd_warmup", "rlvr", "sft", "base"]
    assert graph.nodes["mopd2"].inputs["start"] == "mopd1"
    assert set(first.values()) & set(second.values()) == {"reverse_teacher1"}
    assert all("mopd1" in line(graph, name) for name in set(second.values()) - set(first.values()))
    assert set(second) == {"add_teacher2", "reverse_teacher1", "sort_teacher2", "self"}
    assert second["self"] == "mopd1"
    assert graph.nodes["mopd_warmup"].inputs["data"] == "warmup_data"
    assert graph.nodes["evaluation"].inputs["init"] == "rlvr"


def test_cascade_teachers_are_earlier_checkpoints_of_its_line(load: Load) -> None:
    graph = load("nemotron_cascade2")
    final = graph.nodes["evaluation"].inputs["student"]
    chain = line(graph, final)
    ends = [name.partition("_")[0] for name in reversed(chain)]
    assert ends == ["base", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8a", "c8b"]
    teachers = edges(graph.nodes["c4_mopd"], "teachers")
    assert set(teachers) == {"c1_sft", "side_rlhf", "best_so_far"}
    assert line(graph, "side_rlhf") == ["side_rlhf", "c1_sft", "base"]
    candidates = edges(graph.nodes["best_so_far"], "candidates")
    assert set(candidates.values()) == {"c1_sft", "c2_if_rl", "c3_multi_domain"}
    kl = {name: node.config["kl"] for name, node in of_kind(graph, "rl").items()}
    assert {name for name, value in kl.items() if value} == {"c5_rlhf"}


def test_mai_climbs_restart_from_the_base(load: Load) -> None:
    graph = load("mai_thinking1", "restarts=2")
    for n in (1, 2, 3):
        for k in (1, 2):
            restart = graph.nodes[f"climb{n}_restart{k}"]
            assert restart.inputs["start"] == "base"
            before = f"climb{n}" if k == 1 else f"climb{n}_{k}"
            data = graph.nodes[restart.inputs["data"]]
            assert data.inputs == {"rollouts": before} and data.config["first_step"] > 0
            assert graph.nodes[f"climb{n}_{k + 1}"].inputs["start"] == f"climb{n}_restart{k}"
    mix = graph.nodes["traces"]
    assert mix.config["by"] == "tokens"
    assert [part["weight"] for part in mix.config["parts"]] == [89.0, 9.0, 2.0]
    assert line(graph, "light_climb") == ["light_climb", "trace_distillation", "base"]
    clip = graph.nodes["climb1"].config["surrogate"]["clip_high"]
    assert clip["schedule"] == "track" and clip["metric"] == "entropy"


def test_kimi_judges_itself_with_a_squared_loss(load: Load) -> None:
    graph = load("kimi_k2")
    config = graph.nodes["joint_rl"].config
    assert config["surrogate"]["kind"] == "kimi" and set(config["aux"]) == {"ptx"}
    assert config["critique"]["weight"] > 0
    assert config["temperature"]["last"] < config["temperature"]["first"]
    judges = config["reward"]["domains"]
    assert "itself" in str(judges["palindrome"]) and "itself" not in str(judges["add"])
    assert graph.nodes["joint_rl"].inputs["prompts"] == "moderate"
    assert graph.nodes["joint_rl"].inputs["start"] == "sft_critic"


def test_glm45_joins_three_kinds_of_experts_and_ends_with_pathology(load: Load) -> None:
    graph = load("glm45", "iterations=2")
    models = set(edges(graph.nodes["expert_samples"], "models").values())
    assert models == {"add_reasoning", "reverse_reasoning", "sort_agent2", "palindrome_chat"}
    assert graph.nodes["hybrid"].inputs["start"] == "base"
    assert line(graph, "pathology_rl") == ["pathology_rl", "general_rl", "hybrid", "base"]
    assert line(graph, "sort_agent2") == ["sort_agent2", "sort_restart2", "base"]
    assert graph.nodes["sort_successes2"].inputs == {"rollouts": "sort_agent1"}
    hard = graph.nodes["add_reasoning"]
    assert hard.inputs["start"] == "add_moderate_rl" and hard.inputs["prompts"] == "add_hard"
    assert hard.config["temperature"]["schedule"] == "on_plateau"


def test_glm5_is_distilled_from_the_stages_it_has_passed(load: Load) -> None:
    graph = load("glm5")
    student = graph.nodes["cross_stage"]
    assert line(graph, "general_rl") == ["general_rl", "agentic_rl", "reasoning_rl", "sft", "base"]
    teachers = {"sft": "sft", "reasoning_rl": "reasoning_rl", "self": "general_rl"}
    assert edges(student, "teachers") == teachers
    assert student.inputs["start"] == "general_rl"
    assert student.config["samples_per_prompt"] == 1
    for node in of_kind(graph, "rl").values():
        assert node.config["correction"]["kind"] == "icepop"
        assert node.config["surrogate"]["clip_high"] == 0.28


def test_composer_25_teaches_itself_with_a_hint(load: Load) -> None:
    two, half = load("composer2", "version=2"), load("composer2")
    config: dict[str, Any] = dict(two.nodes["composer2"].config)
    assert not of_kind(two, "distill") and two.nodes["sft"].config["hint"] is None
    assert config["advantage"] == {"kind": "group_mean"}
    assert config["aggregation"]["kind"] == "constant"
    assert (config["kl"]["estimator"], config["kl"]["where"]) == ("k1", "reward")
    assert "concave" in str(config["reward"])
    student = half.nodes["composer25"]
    assert edges(student, "teachers") == {"self": "composer2"} and set(
        student.config["hints"]
    ) == set(DOMAINS)
    assert half.nodes["continued"].config["hint"] == student.config["hints"]["add"]
