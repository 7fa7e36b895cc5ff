"""The data verbs of a recipe: their edges, the domains of their handles, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.algorithms import AllResponses, BestAgainstWorst, BestResponses
from posttrain.engine.errors import ConfigError
from posttrain.recipe import Recipe
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Suite, Table

STEPS = {"steps": 2}


@pytest.fixture
def r(tmp_path: Path) -> Recipe:
    """Over three domains in one small table."""
    columns = {"answer": "7", "demo": "7", "thought": "so"}
    rows = [{"prompt": f"{i} apples"} | columns for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table(train="rows.jsonl", demo="demo", thought="thought")
    verifier = VerifierSpec(name="exact")
    names = ("add", "sort", "reverse")
    domains = {name: Domain(name=name, source=table, verifier=verifier) for name in names}
    return Recipe(Suite(name="mine", domains=domains), tmp_path)


def start(r: Recipe, name: str = "base") -> Any:
    return r.pretrain(data=r.demos("add"), name=name, **STEPS)


def test_several_models_sample_a_domain(r: Recipe) -> None:
    one, two = start(r, "one"), start(r, "two")
    both = r.sample([one, two], prompts=r.prompts(["add", "sort"]), name="both")
    own = r.sample({"add": one, "sort": [two, one]}, prompts=r.prompts(["add", "sort"]))
    nodes = r.graph(r.select([both, own])).nodes
    assert nodes["both"].config["routes"] == {"add": ["one", "two"], "sort": ["one", "two"]}
    assert nodes["rollouts"].config["routes"] == {"add": ["one"], "sort": ["two", "one"]}
    edges = {"models.one": "one", "models.two": "two"}
    assert edges.items() <= nodes["both"].inputs.items()
    assert nodes["selection"].inputs == {"rollouts.0": "both", "rollouts.1": "rollouts"}


def test_handles_know_the_domains_of_their_data(r: Recipe) -> None:
    base = start(r)
    prompts = r.prompts(["sort", "add"])
    profiled = r.profile(base, prompts=prompts)
    chosen = r.filter(prompts, profile=profiled)
    rollouts = r.sample(base, prompts=chosen)
    assert profiled.domains == chosen.domains == rollouts.domains == ("sort", "add")
    selection = r.select(rollouts)
    assert selection.domains == r.dedup(selection).domains == ("sort", "add")
    assert r.pairs(rollouts).domains == ("sort", "add")
    mixed = r.mix({selection: 1, r.demos("reverse"): 2})
    assert set(mixed.domains) == {"sort", "add", "reverse"}
    assert r.stage("filtered") == chosen
    assert r.stage("later").domains == ()


def test_filtered_prompts_stand_where_prompts_do(r: Recipe) -> None:
    base = start(r)
    prompts = r.prompts(["add", "sort"])
    chosen = r.filter(prompts, profile=r.profile(base, prompts=prompts), low=0.1)
    harder = r.filter(
        chosen, profile=r.profile(base, prompts=chosen, name="again"), high=0.5, name="harder"
    )
    tuned = r.rl(start=base, prompts=harder, **STEPS)
    with pytest.raises(ConfigError, match="domain 'sort' has no teacher"):
        r.distill(start=base, teachers={"add": tuned}, prompts=harder, name="lacking", **STEPS)
    student = r.distill(
        start=base, teachers={"add": tuned, "sort": "self"}, prompts=chosen, **STEPS
    )
    nodes = r.graph(student).nodes
    for name, source in {"rl": "harder", "student": "filtered", "again": "filtered"}.items():
        edges = {"prompts": source, "domains.add": "add", "domains.sort": "sort"}
        assert edges.items() <= nodes[name].inputs.items()
    assert nodes["harder"].inputs["prompts"] == "filtered"


def test_modes_travel_with_filtered_prompts(r: Recipe) -> None:
    base = r.pretrain(data=r.demos(r.domains), thinking=True, **STEPS)
    prompts = r.prompts("add", mode="think")
    profiled = r.profile(base, prompts=prompts)
    chosen = r.filter(prompts, profile=profiled)
    nodes = r.graph(r.rl(start=base, prompts=chosen, **STEPS)).nodes
    assert nodes["profile"].config["modes"] == nodes["filtered"].config["modes"] == ["think"]
    assert nodes["rl"].config["modes"] == []


def test_a_mix_names_its_parts(r: Recipe) -> None:
    base = start(r)
    selection = r.select(r.sample(base, prompts=r.prompts("add")))
    sources = {selection: 3, r.demos(["add", "sort"], mode="think", noise=0.1): 1}
    mixed = r.mix(sources, by="tokens", tokenizer=base, rows=100)
    node = r.graph(r.sft(start=base, data=r.dedup([mixed, selection]), **STEPS)).nodes["mix"]
    bare = {"domains": [], "modes": [], "demo_noise": 0.0}
    assert node.config["parts"] == [
        bare | {"edge": "data.0", "weight": 3.0},
        {
            "edge": None,
            "domains": ["add", "sort"],
            "modes": ["think"],
            "demo_noise": 0.1,
            "weight": 1.0,
        },
    ]
    assert node.inputs["data.0"] == "selection" and node.inputs["tokenizer"] == "base"
    assert {"domains.add", "domains.sort"} <= set(node.inputs)


def test_the_best_of_several_models_is_a_model(r: Recipe) -> None:
    one, two = start(r, "one"), start(r, "two")
    chosen = r.best({"first": one, "second": two}, prompts=r.prompts("add"))
    nodes = r.graph(r.sft(start=chosen, data=r.demos("add"), **STEPS)).nodes
    assert nodes["best"].inputs == {
        "candidates.first": "one",
        "candidates.second": "two",
        "domains.add": "add",
    }
    listed = r.best([one, two], name="listed")
    assert set(listed.domains) == set(r.domains)


def test_judges_bring_their_stages_and_domains(r: Recipe) -> None:
    base, other = start(r), start(r, "other")
    one, two = (r.sample(base, prompts=r.prompts(d), name=f"{d}_rollouts") for d in ("add", "sort"))
    scored = r.score([one, two], judge=judges.compare(other) - 0.1 * judges.length(budget=9))
    liked = r.pairs(scored, judge=judges.oracle(), how="random")
    chosen = r.best([base, other], judge=judges.compare(other), prompts=r.prompts("add"))
    nodes = r.graph(r.dpo(start=chosen, data=liked, **STEPS)).nodes
    domains = {"domains.add": "add", "domains.sort": "sort"}
    pool = {"rollouts.0": "add_rollouts", "rollouts.1": "sort_rollouts"}
    assert nodes["scored"].inputs == pool | {"judges.other": "other"} | domains
    assert nodes["scored"].config["judge"]["judge"] == "sum"
    assert nodes["pairs"].inputs == {"rollouts": "scored"} | domains
    assert r.graph(liked).nodes["pairs"].config["judge"]["judge"] == "oracle"
    assert nodes["best"].inputs["judges.other"] == "other"


def test_rollouts_of_rl_are_selected_by_step(r: Recipe) -> None:
    tuned = r.rl(start=start(r), prompts=r.prompts("add"), **STEPS)
    graph = r.graph(r.select(tuned, first_step=1, how=AllResponses(success=False)))
    assert graph.nodes["selection"].inputs == {"rollouts": "rl"}
    assert graph.nodes["selection"].config["first_step"] == 1


def rollouts(r: Recipe, base: Any) -> Any:
    return r.sample(base, prompts=r.prompts("add"))


def rollouts2(r: Recipe, base: Any) -> Any:
    return r.sample(base, prompts=r.prompts("add"), name="other")


BAD: list[tuple[Callable[[Recipe, Any], Any], str]] = [
    (lambda r, b: r.sample([b, b], prompts=r.prompts("add")), "names 'base' twice; give each"),
    (lambda r, b: r.sample({"add": []}, prompts=r.prompts("add")), "names no model"),
    (lambda r, b: r.sample("base", prompts=r.prompts("add")), "'base' is not a model"),
    (lambda r, b: r.sample(b, prompts=r.stage("x")), r"its prompts are 'x' \(not defined yet\)"),
    (lambda r, b: r.sample(b, prompts=b), r"its prompts are 'base' \(pretrain\); it needs"),
    (lambda r, b: r.select([]), "it is given no rollouts"),
    (lambda r, b: r.select(rollouts(r, b), first_step=0), "and 'rollouts' is a sample stage"),
    (lambda r, b: r.pairs([rollouts(r, b), b]), "not 'base'"),
    (lambda r, b: r.pairs(rollouts(r, b), how="strong_against_weak"), "needs a second stage"),
    (lambda r, b: r.profile(r.demos("add"), prompts=r.prompts("add")), "model = .* is not a"),
    (lambda r, b: r.filter(r.prompts("add"), profile=b), r"profile = 'base' \(pretrain\) is no"),
    (
        lambda r, b: r.filter(r.prompts("sort"), profile=r.profile(b, prompts=r.prompts("add"))),
        "'profile' has no problem of domain 'sort', only of add",
    ),
    (
        lambda r, b: r.filter(
            r.prompts("add"), profile=r.profile(b, prompts=r.prompts("add")), min_gain=0.1
        ),
        "min_gain = 0.1 is about a second profile",
    ),
    (lambda r, b: r.mix({}), "it takes a dict of data to weight"),
    (lambda r, b: r.mix({b: 1}), r"'base' \(pretrain\); it needs r.demos"),
    (lambda r, b: r.mix({r.demos("add"): 0}), "field 'parts.0.weight': 0 is not allowed"),
    (lambda r, b: r.mix({r.demos("add"): 1}, by="tokens"), "by = tokens needs tokenizer="),
    (lambda r, b: r.mix({r.demos("add"): 1}, tokenizer=b), "by = rows reads no tokenizer="),
    (lambda r, b: r.mix({r.demos("add"): 1}, parts=[]), "field 'parts': which source has which"),
    (lambda r, b: r.dedup([]), "it is given no data"),
    (lambda r, b: r.dedup(rollouts(r, b)), "'rollouts' .sample.; it needs"),
    (lambda r, b: r.best([b]), "it has 1 candidates; it chooses among two or more"),
    (lambda r, b: r.best([b, b]), "'base' is among its candidates twice"),
    (lambda r, b: r.best({"a": b, "b": r.demos("add")}), r"candidates\['b'\] = .* is not a model"),
    (lambda r, b: r.best({"a": b, "b": b}, prompts=b), r"it takes r\.prompts"),
    (lambda r, b: r.rl(start=b, prompts=rollouts(r, b), **STEPS), "its prompts are 'rollouts'"),
    (
        lambda r, b: r.select(rollouts(r, b), how=BestResponses(by="score")),
        "by = score, and 'rollouts' is a sample stage",
    ),
    (
        lambda r, b: r.pairs(rollouts(r, b), how=BestAgainstWorst(by="score")),
        "whose rollouts have rewards only",
    ),
    (lambda r, b: r.score(rollouts(r, b), judge="oracle"), "judge = 'oracle' is no judge"),
    (lambda r, b: r.score(b, judge=judges.oracle()), "not 'base'"),
    (
        lambda r, b: r.score(r.stage("later"), judge=judges.oracle()),
        "the domains of what it judges are not known",
    ),
    (
        lambda r, b: r.score(rollouts(r, b), judge=judges.by_domain({"sort": judges.oracle()})),
        r"judges.by_domain has none for domain 'add'",
    ),
    (
        lambda r, b: r.score(rollouts(r, b), judge=judges.compare(rollouts2(r, b))),
        r"judges.other = .* is not a model",
    ),
    (lambda r, b: r.pairs(rollouts(r, b), judge=judges.itself()), r"judges.itself\(\) is for rl"),
    (
        lambda r, b: r.pairs(rollouts(r, b), against=rollouts2(r, b), judge=judges.oracle()),
        "how = strong_against_weak asks no judge",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_work_is_refused(
    r: Recipe, call: Callable[[Recipe, Any], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(r, start(r))
