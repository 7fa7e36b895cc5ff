"""Domains without a verifier or without a split: what is refused while a recipe is built, and what
is left out where no domain is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import judges
from posttrain.algorithms import BestAgainstWorst, BestResponses, Critique, RandomPairs
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import named
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe
from posttrain.suites.domain import Domain, Procedural, VerifierSpec, domain_node
from posttrain.suites.load import load_suite

SUITE = """
[domains.chat]
train = "t.jsonl"
demo = "demo"
verifier = "none"
heldout = 0
[domains.letters]
train = "t.jsonl"
demo = "demo"
verifier = "none"
validation = 0
[domains.sums]
train = "t.jsonl"
demo = "demo"
verifier = "exact"
"""
STEPS = {"steps": 2}


@pytest.fixture
def r(tmp_path: Path) -> Recipe:
    rows = [{"prompt": f"p{n}", "answer": str(n), "demo": str(n)} for n in range(90)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "s.toml").write_text(SUITE)
    return Recipe(*load_suite(str(tmp_path / "s.toml")))


@pytest.fixture
def base(r: Recipe) -> Stage:
    return r.pretrain(data=r.demos(r.domains), **STEPS)


NONE = r"domain 'chat' has none \(verifier = \"none\"\)"
JUDGE = judges.finished()
REFUSED: dict[str, Callable[[Recipe, Stage, Stage], Stage]] = {
    rf"\(rl\), field 'reward': judges\.verifier\(\) asks .*{NONE}": lambda r, b, s: r.rl(
        start=b, prompts=r.prompts(r.domains), **STEPS
    ),
    rf"field 'reward': judges\.verifier.*{NONE}": lambda r, b, s: r.rl(
        start=b, prompts=r.prompts("chat"), reward=JUDGE + 0.1 * judges.verifier(), **STEPS
    ),
    rf"judges\.oracle\(\) asks the verifier, and {NONE}": lambda r, b, s: r.score(
        s, judge=judges.oracle()
    ),
    rf"'profile' \(profile\): a pass rate is what the verifier says, and {NONE}": lambda r, b, s: (
        r.profile(b, prompts=r.prompts(r.domains))
    ),
    rf"\(select\): how = correct goes by what the verifier says, and {NONE}": lambda r, b, s: (
        r.select(s)
    ),
    rf"how = best goes by .*{NONE}.*how=BestResponses\(by='score'\)": lambda r, b, s: r.select(
        s, how="best"
    ),
    rf"how = all goes by .*{NONE}": lambda r, b, s: r.select(
        s, how={"kind": "all", "success": True}
    ),
    rf"\(pairs\): how = best_against_worst goes by .*{NONE}.*give judge=": lambda r, b, s: r.pairs(
        s
    ),
    rf"min_chosen_reward goes by .*{NONE}": lambda r, b, s: r.pairs(
        s, judge=JUDGE, min_chosen_reward=1.0
    ),
    rf"\(comparisons\): it compares what the verifier says, and {NONE}": lambda r, b, s: (
        r.comparisons(s)
    ),
    rf"noise makes demonstrations wrong by what the verifier says, and {NONE}": lambda r, b, s: (
        r.sft(start=b, data=r.demos(r.domains, noise=0.5), **STEPS)
    ),
    rf"\(best\): it compares what the verifier says, and {NONE}.*give judge=": lambda r, b, s: (
        r.best({"a": b, "b": b}, prompts=r.prompts(["sums", "chat"]))
    ),
    r"\(best\): it reads the validation split, and domain 'letters' has none \(validation = 0": (
        lambda r, b, s: r.best({"a": b, "b": b}, judge=JUDGE, prompts=r.prompts(r.domains))
    ),
    r"reward_weight is of what the verifier says, and none of its domains chat, letters has one": (
        lambda r, b, s: r.distill(
            start=b,
            teachers={"chat": "self", "letters": b},
            prompts=r.prompts(["chat", "letters"]),
            reward_weight=0.5,
            samples_per_prompt=2,
            **STEPS,
        )
    ),
    r"critique learns what the verifier says, and none of its domains chat has one": (
        lambda r, b, s: r.rl(
            start=b,
            prompts=r.prompts("chat"),
            reward=judges.itself(),
            critique=Critique(0.1),
            **STEPS,
        )
    ),
    r"\(evaluate\): it reads the heldout split, and domain 'chat' has none \(heldout = 0": (
        lambda r, b, s: r.evaluate(b, init=b, domains=["chat"])
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_needs_a_verifier_or_a_split_is_refused(r: Recipe, base: Stage, message: str) -> None:
    rollouts = r.sample(base, prompts=r.prompts(r.domains))
    with pytest.raises(ConfigError, match=message):
        REFUSED[message](r, base, rollouts)


def test_what_needs_none_is_taken(r: Recipe, base: Stage) -> None:
    every = r.prompts(r.domains)
    by_domain = judges.by_domain({"sums": judges.verifier(), "chat": JUDGE, "letters": JUDGE})
    r.rl(start=base, prompts=every, reward=by_domain, **STEPS)
    r.distill(start=base, teachers=dict.fromkeys(r.domains, "self"), prompts=every, **STEPS)
    r.distill(
        start=base,
        teachers=dict.fromkeys(r.domains, base),
        prompts=every,
        reward_weight=0.5,
        samples_per_prompt=2,
        name="rewarded",
        **STEPS,
    )
    rollouts = r.sample(base, prompts=every)
    r.select(rollouts, how="all")
    scored = r.score(rollouts, judge=JUDGE)
    r.select(scored, how=BestResponses(by="score"), name="best_of")
    r.pairs(scored, how=BestAgainstWorst(by="score"))
    r.pairs(rollouts, judge=JUDGE, how=RandomPairs(2), name="judged")
    r.pairs(rollouts, against=rollouts, name="delta")
    r.comparisons(r.sample(base, prompts=r.prompts("sums"), name="checked"))


def test_domains_that_lack_it_are_left_out_where_none_is_named(r: Recipe, base: Stage) -> None:
    def domains(stage: Stage) -> list[str]:
        return list(named(r._build.nodes[stage.name].inputs, "domains"))

    assert domains(r.best({"a": base, "b": base})) == ["sums"]
    judged = r.best({"a": base, "b": base}, judge=JUDGE, name="judged")
    assert domains(judged) == ["chat", "sums"]
    assert "chat" not in domains(r.evaluate(base, init=base))
    validated = r.evaluate(base, init=base, split="validation", name="validated")
    assert "letters" not in domains(validated)


def test_what_is_left_out_of_an_evaluation_is_told(r: Recipe, base: Stage) -> None:
    r.evaluate(base)
    told = [warned.text for warned in r.warnings if warned.stage == "evaluation"]
    assert told == ["domain 'chat' is not evaluated: it has no heldout problems (heldout = 0)"]


def test_best_needs_a_judge_where_no_domain_has_a_verifier(tmp_path: Path, r: Recipe) -> None:
    text = (tmp_path / "s.toml").read_text().replace('"exact"', '"none"')
    (tmp_path / "s.toml").write_text(text)
    alone = Recipe(*load_suite(str(tmp_path / "s.toml")))
    base = alone.pretrain(data=alone.demos("chat"), **STEPS)
    with pytest.raises(ConfigError, match=r"\(best\): no domain of suite 's' has both .*judge="):
        alone.best({"a": base, "b": base})


def test_no_heldout_problem_anywhere_is_told(tmp_path: Path, r: Recipe) -> None:
    text = (tmp_path / "s.toml").read_text().replace("validation = 0", "heldout = 0")
    (tmp_path / "s.toml").write_text(text + "heldout = 0\n")
    none = Recipe(*load_suite(str(tmp_path / "s.toml")))
    base = none.pretrain(data=none.demos("chat"), **STEPS)
    with pytest.raises(ConfigError, match="no domain of suite 's' has a heldout split"):
        none.evaluate(base, init=base)


def test_generated_problems_have_a_verifier(tmp_path: Path) -> None:
    source = Procedural(dataset="chain_sum", num_train=1, num_validation=1, num_heldout=1)
    domain = Domain(name="sums", source=source, verifier=VerifierSpec(name="none"))
    with pytest.raises(ConfigError, match=r"verifier = \"none\" is for tables of your own"):
        domain_node(domain, tmp_path)
