"""What `make real` is made of, as far as it needs no model: settings, stages, tables, figures."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import real
from posttrain.engine.graph import Graph
from posttrain.engine.store import Store
from posttrain.language.loader import load_recipe
from posttrain.suites.load import load_suite
from suite import real_budget, real_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that a plan can read."""
    from tests.conftest import weights_file

    place = tmp_path_factory.mktemp("base") / "m"
    place.mkdir()
    config = {"model_type": "llama", "vocab_size": 2, "eos_token_id": 1, "hidden_size": 2}
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (place / "model.safetensors").write_bytes(weights_file({"model.norm.weight": ("F32", (2,))}))
    return str(place)


def graph(name: str, base: str, store: Path, *, smoke: bool = False) -> Graph:
    """The graph of a run of `make real`, without running it."""
    options = real.set_options(real.read_settings(real.SETTINGS, smoke=smoke), name)
    given = [text for text in options if text != "--set"]
    suite = "words"
    if name == "forgetting":
        given += [f"base={base}", f"models={json.dumps({'sft': base})}"]
        given.append(f"specialists={json.dumps({'legs_teacher': base})}")
        suite = str(real.FOLDER / "general.toml")
    else:
        given.append(f"base={base}")
    recipe = real.RECIPES[name]
    return load_recipe(recipe, store=Store(store), settings=given, suite=suite).graph


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
def test_the_arms_stand_on_the_stages_of_mopd(base: str, tmp_path: Path, smoke: bool) -> None:
    main = graph("mopd", base, tmp_path, smoke=smoke)
    beside = graph("beside", base, tmp_path, smoke=smoke)
    ours, theirs = main.fingerprints(), beside.fingerprints()
    shared = set(ours) - {"evaluation"}
    assert {"sft", "student", "story_sft", "story_teacher", "legs_teacher"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    kinds = {beside.nodes[name].kind for name in beside.nodes}
    assert {"rl", "distill", "sample", "select", "merge", "evaluate"} <= kinds
    estimators = {
        node.config["estimator"]["kind"] for node in beside.nodes.values() if node.kind == "distill"
    }
    assert estimators == {"reverse_kl", "sampled_token"}


def test_tuning_makes_stages_of_mopd_on_validation_problems(base: str, tmp_path: Path) -> None:
    settings = real.read_settings(real.SETTINGS, smoke=False)
    options = real.set_options(settings, "tune", domain="legs")
    given = [text for text in options if text != "--set"] + [f"base={base}", "domain=legs"]
    store = Store(tmp_path)
    tuned = load_recipe(real.RECIPES["tune"], store=store, settings=given, suite="words").graph
    found, main = tuned.fingerprints(), graph("mopd", base, tmp_path).fingerprints()
    assert {name: main[name] for name in set(found) - {"tuning"}}.items() <= found.items()
    assert "legs_teacher" in found and "order_teacher" not in found
    assert tuned.nodes["tuning"].config["split"] == "validation"


def test_every_stage_computes_in_bfloat16(base: str, tmp_path: Path) -> None:
    for name in ("mopd", "beside", "forgetting"):
        nodes = graph(name, base, tmp_path).nodes.values()
        assert {n.config["precision"] for n in nodes if "precision" in n.config} == {"bfloat16"}


def test_smoke_leaves_one_step_everywhere(base: str, tmp_path: Path) -> None:
    nodes = graph("beside", base, tmp_path, smoke=True).nodes.values()
    assert {node.config["steps"] for node in nodes if node.config.get("steps")} == {1}
    assert graph("forgetting", base, tmp_path, smoke=True).target == "knowledge"


def test_the_general_questions_are_many_and_no_training_split_has_them() -> None:
    suite, directory = load_suite(str(real.FOLDER / "general.toml"))
    rows = [json.loads(line) for line in (directory / "general.jsonl").read_text().splitlines()]
    unused = (directory / "general_unused.jsonl").read_text()
    assert len(rows) >= 100 and len({row["prompt"] for row in rows}) == len(rows)
    assert not any(row["prompt"] in unused for row in rows)
    told = [r for r in rows if re.search(rf"\b{r['answer']}\b", r["prompt"], re.IGNORECASE)]
    assert not told
    assert suite.domains["general"].verifier.name == "regex"


def test_a_wrong_file_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / Path(real.MEMBER).name).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"its sha256 is .*; remove it"):
        real.fetched(tmp_path)


def test_make_real_installs_the_extra_and_runs_the_script() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "real"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-e '.[gguf]'" in done.stdout
    assert done.stdout.rstrip().endswith("python benchmarks/real.py")
    tests = subprocess.run(
        ["make", "--no-print-directory", "-n", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "real.py" not in tests.stdout


def test_the_budget_in_the_readme_is_that_of_the_settings() -> None:
    suite, _ = load_suite("words")
    settings = real.read_settings(real.SETTINGS, smoke=False)
    costs = real_budget.budget(settings, list(suite.domains))
    assert real_budget.budget_table(costs) in (ROOT / "benchmarks" / "README.md").read_text()
    assert sum(cost.seconds for cost in costs.values()) < 150 * 60
    twice = settings | {"smoke": {"legs_teacher.steps": 2 * settings["mopd"]["*_teacher.steps"]}}
    more = real_budget.budget(twice, list(suite.domains))["RL"].sampled - costs["RL"].sampled
    rl = settings["mopd"]
    rows = rl["*_teacher.steps"] * rl["*_teacher.prompts_per_step"] * rl["*_teacher.group_size"]
    assert more == rows * real_budget.LENGTHS["legs"][1]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def comparison() -> dict[str, Any]:
    """Two domains, one student, as `evaluate` writes it."""
    edges = ("along.base", "along.a_before_rl", "along.b_before_rl", "init")
    edges += ("teachers.a_teacher", "teachers.b_teacher", "students.kl")
    models = {
        edge: {d: {"sampled": number / 10, "greedy": number / 8} for d in "ab"}
        for number, edge in enumerate(edges)
    }
    row = {"init": interval(0.3), "teacher": interval(0.4), "student": interval(0.6)}
    rows = {d: row | {"num_problems": 8, "constant": {"value": 0}, "greedy": row} for d in "ab"}
    norm: dict[str, Any] = {"norm": 0.5, "norm_low": 0.4, "norm_high": 0.6, "domains": rows}
    both = {"sampled": interval(0.1), "greedy": interval(0.2)}
    return {
        "students": {"kl": norm | {"greedy": norm | {"norm": None}}},
        "along": {name: {"a": both, "b": both} for name in ("a_before_rl", "b_before_rl")},
        "pairs": [
            {"first": "kl", "second": "x", "all": interval(0.05) | {"greedy": interval(0.02)}}
        ],
        "routes": {"a": "a_teacher", "b": "b_teacher"},
        "models": models,
    }


def test_the_page_says_what_was_measured() -> None:
    knowledge = {"models": {"students.sft": {"general": {"sampled": 0.5, "greedy": 0.25}},
                            "init": {"general": {"sampled": 1.0, "greedy": 0.75}}}}  # fmt: skip
    stage = {"name": "sft", "kind": "sft", "seconds": 90.0, "tokens": 1200, "peak_memory": 2**31}
    result = {
        "date": "2026-01-01",
        "smoke": False,
        "base": "tiny.gguf",
        "machine": {"cpu": "a cpu", "cores": 2, "python": "3.11", "packages": {"torch": "2"}},
        "wall_seconds": 600.0,
        "stages": {"sft-1": stage},
        "evaluations": {"beside": comparison(), "forgetting": knowledge},
    }
    page = real_page.markdown(result, ["x_lineage.svg"])
    # Base first, then what was made one after another.
    names = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    order = ["| base", "| a before rl", "| b before rl", "| SFT", "| a teacher", "| b teacher"]
    assert names[2:8] == order
    assert "| a | 10.0 [0.0, 20.0] | 40.0 [30.0, 50.0] | 20.0 [10.0, 30.0] |" in page
    assert "| kl | 60.0 | 75.0 | 0.50 [0.40, 0.60] | - |" in page
    assert "| kl - x | 5.0 [-5.0, 15.0] | 2.0 [-8.0, 12.0] |" in page
    # In the other domain the teacher of a has 0.4, the SFT 0.3.
    assert "| a teacher | +10.0 | +12.5 |" in page
    assert "| base | 100.0 / 75.0 |\n| sft | 50.0 / 25.0 |" in page
    assert "| sft | 1 | 90 | 1,200 | 2.0 |" in page
    assert "From the first stage to the report: 10 minutes." in page
    assert "SMOKE" not in page and page.endswith("![x_lineage.svg](x_lineage.svg)\n")
