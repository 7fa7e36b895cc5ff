"""InstructGPT to OLMo 3, DeepSeek, Qwen3: who starts from whom, who samples, who judges,
as their papers have it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.graph import Graph, Node
from posttrain.engine.store import Store
from posttrain.language.loader import load_recipe, shipped_recipes

NAMES = (
    "instructgpt", "llama2", "llama3", "tulu3", "olmo3_think", "olmo3_instruct", "olmo3_rl_zero",
    "deepseek_v3", "deepseek_r1_zero", "deepseek_r1", "qwen3",
)  # fmt: skip
DOMAINS = ("add", "reverse", "sort", "palindrome")
MAX_CODE_LINES = 60


def load(tmp_path: Path, name: str, *settings: str) -> Graph:
    return load_recipe(name, store=Store(tmp_path / "no-store"), settings=settings).graph


def models(node: Node, edge: str) -> set[str]:
    """The stages at an edge and at the numbered or named edges below it."""
    return {source for e, source in node.inputs.items() if e == edge or e.startswith(f"{edge}.")}


def values(config: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """What these settings are."""
    return tuple(config[name] for name in names)


def judged(node: Node) -> set[str]:
    return models(node, "judges")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_short_and_says_where_it_is_from(name: str) -> None:
    text = Path(shipped_recipes()[name]).read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    assert "Source:" in docstring and "arXiv" in docstring and "Left out:" in docstring
    first = tree.body[0].end_lineno or 0
    code = [line.strip() for line in text.splitlines()[first:]]
    code = [line for line in code if line and not line.startswith(("#", '"""'))]
    assert len(code) <= MAX_CODE_LINES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_ends_in_an_evaluation_against_where_its_learning_began(
    name: str, tmp_path: Path
) -> None:
    graph = load(tmp_path, name)
    evaluation = graph.nodes[graph.target]
    assert evaluation.kind == "evaluate"
    student, init = evaluation.inputs["student"], evaluation.inputs["init"]
    assert student != init and init in graph.ancestors(student)


def test_instructgpt(tmp_path: Path) -> None:
    nodes = load(tmp_path, "instructgpt").nodes
    assert nodes["sft"].inputs["start"] == nodes["ppo_init"].inputs["start"] == "base"
    assert nodes["ppo_init"].config["aux"]["pretraining"]["weight"] == 0.1
    assert models(nodes["samples1"], "models") == {"sft"}
    assert nodes["rm1"].inputs["start"] == "sft"
    assert (
        nodes["rm1"].config["per_prompt"] and nodes["comparisons1"].config["how"]["kind"] == "all"
    )
    ppo = nodes["ppo_ptx1"]
    assert ppo.inputs["start"] == "ppo_init" and ppo.inputs["critic"] == "rm1"
    assert judged(ppo) == {"rm1"} and models(ppo, "aux.ptx") == set(DOMAINS)
    assert values(ppo.config["kl"], "coef", "estimator", "where") == (0.02, "k1", "reward")
    assert ppo.config["optimizer"]["ema"] == 0.992

    second = load(tmp_path, "instructgpt", "rounds=2").nodes
    assert models(second["samples2"], "models") == {"ppo_ptx1"}
    assert models(second["comparisons2"], "rollouts") == {"samples1", "samples2"}
    assert second["ppo_ptx2"].inputs["start"] == "ppo_ptx1"


def test_llama2(tmp_path: Path) -> None:
    nodes = load(tmp_path, "llama2").nodes
    for n in range(1, 6):
        newest = f"chat{n - 1}" if n > 1 else "sft"
        assert nodes[f"chat{n}"].inputs["start"] == "base"
        assert models(nodes[f"samples{n}"], "models") == {newest}
        assert judged(nodes[f"scored{n}"]) == {f"rm_helpful{n}", f"rm_safety{n}"}
        for task in ("rm_helpful", "rm_safety"):
            assert nodes[f"{task}{n}"].inputs["start"] == newest
            assert nodes[f"{task}{n}"].config["loss"]["margins"] == "strength"
    assert models(nodes["safety3"], "models") == {"chat1", "chat2"}
    safety = {f"safety{n}" for n in (1, 2, 3)}
    assert models(nodes["rm_safety3_pairs"], "rollouts") == safety | {"helpful1"}
    assert models(nodes["best3"], "rollouts") == {"scored3"}
    assert models(nodes["best4"], "rollouts") == {f"scored{n}" for n in range(1, 5)}
    ppo = nodes["ppo"]
    assert ppo.inputs["start"] == "chat5" and ppo.inputs["critic"] == "rm_helpful5"
    assert judged(ppo) == {"rm_helpful5", "rm_safety5"}
    assert values(ppo.config["kl"], "estimator", "where") == ("k1", "reward")


def test_llama3(tmp_path: Path) -> None:
    nodes = load(tmp_path, "llama3").nodes
    for n in range(1, 7):
        assert nodes[f"rm{n}"].inputs["start"] == nodes[f"sft{n}"].inputs["start"] == "base"
        assert nodes[f"rm{n}"].config["loss"]["margins"] == "none"
        assert models(nodes[f"clear{n}"], "rollouts") == {f"annotation{m + 1}" for m in range(n)}
        assert models(nodes[f"latest{n}"], "rollouts") == {f"annotation{n}"}
        newest = f"chat{n - 1}" if n > 1 else "sft"
        assert models(nodes[f"samples{n}"], "models") == {newest, "code_expert"}
        assert judged(nodes[f"scored{n}"]) == {f"rm{n}"}
        runs = models(nodes[f"chat{n}"], "models")
        assert len(runs) == 2
        for run in runs:
            assert nodes[run].inputs["start"] == f"sft{n}"
            assert nodes[run].inputs["data"] == f"latest{n}"
            assert values(nodes[run].config["loss"], "nll_weight", "beta") == (0.2, 0.1)


def test_tulu3(tmp_path: Path) -> None:
    graph = load(tmp_path, "tulu3")
    nodes = graph.nodes
    assert "sft" in models(nodes["pool"], "models") and len(models(nodes["pool"], "models")) == 3
    assert nodes["dpo"].inputs["start"] == nodes["value_init"].inputs["start"] == "sft"
    assert values(nodes["dpo"].config["loss"], "kind", "beta") == ("dpo_norm", 5)
    assert nodes["rlvr"].inputs["start"] == "dpo"
    assert nodes["rlvr"].inputs["critic"] == "value_init"
    assert not judged(nodes["rlvr"]), "the reward model gives no reward"
    without = load(tmp_path, "tulu3", "rl=grpo")
    assert "value_init" not in without.order()
    assert without.nodes["rlvr"].config["advantage"] == {"kind": "group_zscore"}


def test_olmo3_think(tmp_path: Path) -> None:
    nodes = load(tmp_path, "olmo3_think").nodes
    assert len(models(nodes["think_sft"], "models")) == 2
    assert models(nodes["delta_pairs"], "rollouts") == {"chosen"}
    assert models(nodes["delta_pairs"], "against") == {"rejected"}
    assert nodes["dpo"].inputs["start"] == "think_sft"
    assert nodes["profile"].inputs["model"] == "dpo"
    assert nodes["unsolved"].config["high"] == 0.625
    final = nodes["think"]
    assert final.inputs["start"] == "dpo" and final.inputs["prompts"] == "unsolved"
    assert_olmo_rl(final.config)


def test_olmo3_instruct_starts_from_the_very_think_sft(tmp_path: Path) -> None:
    graph = load(tmp_path, "olmo3_instruct")
    nodes = graph.nodes
    think = load(tmp_path, "olmo3_think").fingerprints()["think_sft"]
    assert graph.fingerprints()["think_sft"] == think
    assert nodes["instruct_sft"].inputs["start"] == "think_sft"
    for kind in ("delta", "judged"):
        assert nodes[f"{kind}_dpo"].inputs["start"] == "instruct_sft"
        assert nodes[f"{kind}_rl"].inputs["start"] == f"{kind}_dpo"
        assert_olmo_rl(nodes[f"{kind}_rl"].config)
    assert models(nodes["best"], "candidates") == {"delta_rl", "judged_rl"}
    assert nodes["evaluation"].inputs["student"] == "best"


def test_olmo3_rl_zero(tmp_path: Path) -> None:
    nodes = load(tmp_path, "olmo3_rl_zero").nodes
    for name in (*DOMAINS, "mix"):
        model = nodes[f"{name}_zero"]
        assert model.inputs["start"] == nodes[f"{name}_profile"].inputs["model"] == "base"
        assert model.inputs["prompts"] == f"{name}_prompts"
        assert_olmo_rl(model.config)


def assert_olmo_rl(config: Any) -> None:
    assert config["kl"] is None and config["advantage"] == {"kind": "group_mean"}
    assert values(config["surrogate"], "kind", "clip_low", "clip_high") == ("clip", 0.2, 0.272)
    assert values(config["correction"], "kind", "high") == ("truncated", 2)
    assert config["draw"]["dynamic_sampling"] > 0 and config["aggregation"] == {"kind": "token"}


def test_deepseek_v3(tmp_path: Path) -> None:
    nodes = load(tmp_path, "deepseek_v3").nodes
    experts = {f"{domain}_expert" for domain in DOMAINS}
    for domain in DOMAINS:
        assert nodes[f"{domain}_expert"].inputs["start"] == f"{domain}_styles"
        assert nodes[f"{domain}_styles"].config["modes"] == ["think", "no_think"]
        assert nodes[f"{domain}_expert"].config["temperature"] > 1
    assert models(nodes["expert_samples"], "models") == experts
    assert nodes["sft"].inputs["start"] == "base"
    assert nodes["reward_model"].inputs["start"] == nodes["grpo"].inputs["start"] == "sft"
    assert judged(nodes["grpo"]) == {"reward_model"}
    assert nodes["grpo"].config["kl"]["estimator"] == "k3"


def test_deepseek_r1(tmp_path: Path) -> None:
    graph = load(tmp_path, "deepseek_r1")
    nodes = graph.nodes
    starts = {
        name: nodes[name].inputs["start"] for name in ("r1_zero", "dev1", "dev2", "dev3", "r1")
    }
    assert starts == {
        "r1_zero": "base", "dev1": "base", "dev2": "dev1", "dev3": "base", "r1": "dev3",
    }  # fmt: skip
    assert models(nodes["zero_samples"], "models") == {"r1_zero"}
    assert models(nodes["dev2_samples"], "models") == {"dev2"}
    assert judged(nodes["r1"]) == {"helpful"} and not judged(nodes["dev2"])
    final = nodes["r1"].config
    assert final["temperature"] == 0.7
    late = final["domain_shares"]["values"]
    assert late["0"]["palindrome"] == 0 and late["24"]["palindrome"] > 0

    small = load(tmp_path, "deepseek_r1", "model=distilled").nodes
    assert small["r1_distilled"].inputs["start"] == "small_base"
    assert small["r1_distilled"].inputs["data"] == small["dev3"].inputs["data"]


def test_deepseek_r1_zero(tmp_path: Path) -> None:
    graph = load(tmp_path, "deepseek_r1_zero")
    zero = graph.nodes["r1_zero"]
    assert {graph.nodes[name].kind for name in graph.order()} == {
        "domain", "pretrain", "rl", "evaluate",
    }  # fmt: skip
    config = zero.config
    assert values(config["kl"], "coef", "estimator", "where") == (0.001, "k3", "loss")
    assert values(config, "group_size", "num_minibatches") == (16, 16)
    assert config["surrogate"]["clip_high"] == 10
    assert config["kl"]["reference_every"] >= 1 and "schedule" in config["max_new_tokens"]


def test_qwen3(tmp_path: Path) -> None:
    nodes = load(tmp_path, "qwen3").nodes
    stages = ("cold_start", "reasoning_rl", "fusion", "general_rl")
    assert [nodes[name].inputs["start"] for name in stages] == [
        "base", "cold_start", "reasoning_rl", "fusion",
    ]  # fmt: skip
    assert models(nodes["qwq_samples"], "models") == {"qwq"}
    assert models(nodes["own_samples"], "models") == {"reasoning_rl"}
    # Rejection sampling answers the queries of the cold start once more.
    assert nodes["own_samples"].inputs["prompts"] == nodes["qwq_samples"].inputs["prompts"]
    assert nodes["profile"].inputs["model"] == "cold_start"
    assert nodes["general_rl"].config["modes"] == ["think", "no_think"]

    small = load(tmp_path, "qwen3", "model=small").nodes
    assert small["off_policy"].inputs["start"] == "small_base"
    assert models(small["flagship_samples"], "models") == {"general_rl"}
    student = small["on_policy"]
    assert student.inputs["start"] == "off_policy"
    assert models(student, "teachers") == {"general_rl"}
    assert student.config["estimator"]["kind"] == "reverse_kl"
