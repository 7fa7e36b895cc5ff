"""Recipes as graphs: what every shipped one builds, and what a change of a setting changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError, GraphError
from posttrain.engine.graph import Graph
from posttrain.engine.store import Store
from posttrain.language.handles import Stage
from posttrain.language.loader import load_recipe, shipped_recipes
from posttrain.recipe import Recipe

DOMAINS = ("add", "sort", "turn")
STEPS = {"steps": 5}


def load(tmp_path: Path, name: str = "mopd", *settings: str, **options: Any) -> Graph:
    store = Store(tmp_path / "no-store")
    return load_recipe(name, store=store, settings=settings, **options).graph


def whole(r: Recipe, **specialist: Any) -> Graph:
    """Base, sft, a teacher per domain, student and evaluation."""
    base = r.pretrain(data=r.demos(r.domains), **STEPS)
    tuned = r.sft(start=base, data=r.demos(r.domains), **STEPS)
    teachers = {
        d: r.rl(start=tuned, prompts=r.prompts(d), name=f"{d}_rl", **STEPS) for d in r.domains
    }
    student = r.distill(start=tuned, teachers=teachers, prompts=r.prompts(r.domains), **STEPS)
    return r.graph(r.evaluate(student, teachers=teachers, init=tuned))


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_builds_a_graph_on_the_core_suite(name: str, tmp_path: Path) -> None:
    graph = load(tmp_path, name)
    assert len(graph.fingerprints()) == len(graph.order())
    assert graph.fingerprints() == load(tmp_path, name).fingerprints()
    assert not (tmp_path / "no-store").exists(), "building a graph makes nothing"


def test_building_imports_no_torch() -> None:
    program = (
        "import sys; from pathlib import Path; from posttrain.engine.store import Store;"
        "from posttrain.language.loader import load_recipe, shipped_recipes\n"
        "for name in shipped_recipes():\n"
        "    load_recipe(name, store=Store(Path('no-store'))).graph.fingerprints()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'reasoning_gym', 'datasets', 'matplotlib'}\n"
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def changed(before: Graph, after: Graph) -> set[str]:
    old, new = before.fingerprints(), after.fingerprints()
    assert old.keys() == new.keys()
    return {name for name in old if old[name] != new[name]}


def test_a_specialists_steps_concern_it_the_distillation_and_the_evaluation(
    tmp_path: Path,
) -> None:
    before = load(tmp_path)
    after = load(tmp_path, "mopd", "add_teacher.steps=7")
    assert changed(before, after) == {"add_teacher", "student", "evaluation"}
    after = load(tmp_path, "mopd", "add_sft.steps=7")
    assert changed(before, after) == {"add_sft", "add_teacher", "student", "evaluation"}


def test_the_seed_concerns_every_stage_but_the_data(tmp_path: Path) -> None:
    before, after = load(tmp_path), load(tmp_path, seed=1)
    domains = {name for name, node in before.nodes.items() if node.kind == "domain"}
    assert changed(before, after) == set(before.nodes) - domains


def test_mopd_has_its_shape(tmp_path: Path) -> None:
    """Every specialist and the student start from the same sft checkpoint, each specialist sees one
    domain, and each domain is distilled from its own specialist."""
    graph = load(tmp_path)
    domains = sorted(name for name, node in graph.nodes.items() if node.kind == "domain")
    assert len(domains) >= 4
    student = graph.nodes["student"]
    assert student.config["routes"] == {name: f"{name}_teacher" for name in domains}
    assert student.inputs["start"] == "sft"
    for name in domains:
        light, teacher = graph.nodes[f"{name}_sft"], graph.nodes[f"{name}_teacher"]
        assert light.inputs == {"start": "sft", f"domains.{name}": name}
        assert teacher.inputs == {"start": light.name, f"domains.{name}": name}
        assert student.inputs[f"teachers.{teacher.name}"] == teacher.name
    assert set(graph.nodes["sft"].inputs) == {"start", *(f"domains.{n}" for n in domains)}
    assert graph.nodes["evaluation"].inputs["init"] == "sft"


def test_overrides_reach_the_stages_they_name(make_recipe: Callable[..., Recipe]) -> None:
    overrides = {"add_rl.steps": 9, "*_rl.group_size": 3, "s*.lr": 0.5, "*.seed": 4}
    graph = whole(make_recipe(overrides=overrides))
    config = {name: node.config for name, node in graph.nodes.items() if node.kind != "domain"}
    assert [config[f"{d}_rl"]["steps"] for d in DOMAINS] == [9, 5, 5]
    assert {config[f"{d}_rl"]["group_size"] for d in DOMAINS} == {3}
    assert (config["sft"]["lr"], config["student"]["lr"]) == (0.5, 0.5)
    assert config["base"]["lr"] != 0.5
    assert {c["seed"] for c in config.values()} == {4}


def test_a_glob_passes_over_stages_without_the_setting(
    make_recipe: Callable[..., Recipe],
) -> None:
    graph = whole(make_recipe(overrides={"*.steps": 2}))
    steps = {n: node.config.get("steps") for n, node in graph.nodes.items()}
    assert {steps[n] for n in ("base", "sft", "add_rl", "student")} == {2}
    assert steps["evaluation"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"studnet.steps": 2}, "no stage of this recipe .* did you mean 'student'"),
        (
            {"base.step": 2},
            "stage 'base' .pretrain., field 'step': unknown .* did you mean 'steps'",
        ),
        ({"evaluation.steps": 2}, "stage 'evaluation' .evaluate., field 'steps': unknown option"),
        ({"*_rl.stepz": 2}, "none of the stages add_rl, sort_rl, turn_rl .* did you mean 'steps'"),
        ({"*_ppo.steps": 2}, "no stage of this recipe"),
        ({"add.steps": 2}, "no stage of this recipe with settings has that name"),
        ({"add_rl.steps": "many"}, "'many' is not allowed"),
        ({"add_rl.steps": 2.5}, "2.5 is not allowed"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(
    make_recipe: Callable[..., Recipe], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        whole(make_recipe(overrides=overrides))


def start(r: Recipe) -> Stage:
    return r.pretrain(data=r.demos(r.domains), **STEPS)


def test_self_is_the_start_of_the_student(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    other = r.sft(start=base, data=r.demos("add"), **STEPS)
    student = r.distill(
        start=base, teachers={"add": other, "sort": "self"}, prompts=r.prompts(["add", "sort"]),
        **STEPS,
    )  # fmt: skip
    node = r.graph(r.evaluate(student, teachers={"add": other, "sort": "self"}, init=base))
    config, inputs = node.nodes["student"].config, node.nodes["student"].inputs
    assert config["routes"] == {"add": "sft", "sort": "self"}
    assert (inputs["teachers.sft"], inputs["teachers.self"]) == ("sft", "base")
    # The start is scored as init already.
    assert node.nodes["evaluation"].config["routes"] == {"add": "sft"}
    assert "teachers.self" not in node.nodes["evaluation"].inputs


def test_a_stage_may_be_named_before_it_is_defined(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    tuned = r.sft(start=r.stage("base"), data=r.demos("add"), **STEPS)
    with pytest.raises(GraphError, match=r"'base', which is not a stage"):
        r.graph(tuned)
    start(r)
    assert r.graph(tuned).order()[-2:] == ["base", "sft"]


def test_rejection_sampling_is_a_graph(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    rollouts = r.sample({"add": base, "sort": base}, prompts=r.prompts(["add", "sort"]), k=8)
    graph = r.graph(r.sft(start=base, data=r.select(rollouts, how="best"), **STEPS))
    assert graph.order()[-3:] == ["rollouts", "selection", "sft"]
    assert graph.nodes["sft"].inputs == {"start": "base", "data": "selection"}


def test_preferences_are_a_graph(make_recipe: Callable[..., Recipe]) -> None:
    """On-policy pairs, and those of a strong and a weak model; the reference is an edge of its own
    where it is given."""
    r = make_recipe()
    base = start(r)
    tuned = r.sft(start=base, data=r.demos("add"), **STEPS)
    strong = r.sample(tuned, prompts=r.prompts(r.domains), name="strong")
    weak = r.sample(base, prompts=r.prompts(r.domains), name="weak")
    first = r.dpo(start=tuned, data=r.pairs(strong), name="first", **STEPS)
    delta = r.pairs(strong, against=weak, name="delta")
    second = r.dpo(start=first, data=delta, reference=tuned, loss="kto", **STEPS)
    graph = r.graph(r.evaluate(second, init=tuned))
    nodes = graph.nodes
    assert nodes["pairs"].inputs == {"rollouts": "strong"}
    assert nodes["delta"].inputs == {"rollouts": "strong", "against": "weak"}
    hows = {name: nodes[name].config["how"]["kind"] for name in ("pairs", "delta")}
    assert hows == {"pairs": "best_against_worst", "delta": "strong_against_weak"}
    assert nodes["first"].inputs == {"start": "sft", "data": "pairs"}
    assert nodes["dpo"].inputs == {"start": "first", "data": "delta", "reference": "sft"}
    assert graph.order()[-2:] == ["dpo", "evaluation"]


def test_outside_checkpoints_are_identified_by_their_bytes(
    make_recipe: Callable[..., Recipe], checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    one, copy = checkpoint("one"), checkpoint("copy")

    def fingerprint(source: str) -> str:
        r = make_recipe()
        return r.graph(r.model(source)).fingerprints()["base"]

    assert fingerprint(one) == fingerprint(copy)
    config = Path(copy, "config.json")
    config.write_text(config.read_text() + " ")
    assert fingerprint(one) != fingerprint(copy)
    (tmp_path / "empty").mkdir()
    for source in ("nowhere", str(tmp_path / "empty")):
        with pytest.raises(ConfigError, match="model '"):
            make_recipe().model(source)


def test_a_user_checkpoint_takes_the_place_of_the_tiny_base(
    checkpoint: Callable[..., str], tmp_path: Path
) -> None:
    graph = load(tmp_path, "mopd", f"base={checkpoint('one')}")
    assert graph.nodes["base"].kind == "model"
    missing: Mapping[str, Any] = load(tmp_path).nodes
    assert missing["base"].kind == "pretrain"


def test_hints_are_settings_of_the_stages_that_read_them(
    make_recipe: Callable[..., Recipe],
) -> None:
    r = make_recipe()
    sft = r.sft(start=start(r), data=r.demos(DOMAINS, hint="{prompt} {answer}"), **STEPS)
    student = {"start": sft, "teachers": {"add": "self"}, "prompts": r.prompts("add"), **STEPS}
    hints = {"add": "{prompt} {answer}"}
    taught = r.distill(hints=hints, **student)
    nodes = r.graph(r.evaluate(taught, init=sft)).nodes
    assert nodes["sft"].config["hint"] == "{prompt} {answer}"
    assert nodes["student"].config["hints"] == hints
    with pytest.raises(ConfigError, match="field 'hints': 'sort' is not a domain of its prompts"):
        r.distill(hints={"sort": "{prompt}"}, name="other", **student)
    with pytest.raises(ConfigError, match=r"'mix' \(mix\): demonstrations with a hint are for sft"):
        r.mix({r.demos("add", hint="{prompt} {answer}"): 1.0})
    with pytest.raises(ConfigError, match=r"aux\['ptx'\] has a hint"):
        data = r.demos("add", hint="{prompt} {answer}")
        r.sft(start=sft, data=r.demos("add"), aux={"ptx": (data, 1.0)}, name="more", **STEPS)


def test_a_domain_has_teachers_by_mode_or_several_in_turn(
    make_recipe: Callable[..., Recipe],
) -> None:
    r = make_recipe()
    base = r.pretrain(data=r.demos(r.domains), thinking=True, **STEPS)
    one, two = (r.sft(start=base, data=r.demos("add"), name=n, **STEPS) for n in ("one", "two"))
    modes = ("think", "no_think")
    both = {"start": base, "prompts": r.prompts(("add", "sort"), mode=modes), **STEPS}
    teachers = {"add": {"think": [one, two], "no_think": "self"}, "sort": two}
    student = r.distill(teachers=teachers, **both)
    shown = {"add": {"think": one, "no_think": two}}
    nodes = r.graph(r.evaluate(student, init=base, teachers=shown, modes=modes)).nodes
    routes = {"add/think": ["one", "two"], "add/no_think": "self", "sort": "two"}
    assert nodes["student"].config["routes"] == routes
    edges = {edge: to for edge, to in nodes["student"].inputs.items() if "teachers" in edge}
    assert edges == {"teachers.one": "one", "teachers.two": "two", "teachers.self": "base"}
    assert nodes["evaluation"].config["routes"] == {"add/think": "one", "add/no_think": "two"}
    refused: list[tuple[Any, str]] = [
        ({"add": {"think": one}, "sort": two}, "modes think, and its prompts have think, no_think"),
        ({"add": [], "sort": two}, r"teachers\['add'\] names no teacher"),
        ({"add": [one, "two"], "sort": two}, r"teachers\['add'\] = 'two'; it takes a stage"),
    ]
    for number, (given, message) in enumerate(refused):
        with pytest.raises(ConfigError, match=message):
            r.distill(teachers=given, name=f"refused{number}", **both)
    with pytest.raises(ConfigError, match="are 2 teachers; an evaluation compares with one"):
        r.evaluate(student, init=base, teachers={"add": [one, two]}, name="more")
