"""Judges as a recipe writes them: their JSON form, their stages, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from posttrain import judges, schedules
from posttrain.engine.errors import ConfigError
from posttrain.language.handles import Stage
from posttrain.rewards.judge_kinds import check_use, parse_judge

RM = Stage("helpful", "reward_model")
VERIFIER = {"judge": "verifier"}


def config(judge: judges.Judge) -> dict[str, Any]:
    return json.loads(json.dumps(judge.to_json()))


def test_sums_keep_their_weights_in_order() -> None:
    judge = judges.verifier() - 0.5 * judges.length(budget=8) + 2 * (3 * judges.finished())
    length = {"judge": "length", "shape": "linear", "budget": 8}
    assert config(judge) == {
        "judge": "sum",
        "terms": [
            {"weight": 1.0, "of": VERIFIER},
            {"weight": -0.5, "of": length},
            {"weight": 6, "of": {"judge": "finished"}},
        ],
    }


def test_a_weighted_sum_is_nested() -> None:
    inner = judges.verifier() + judges.finished()
    outer = config(2 * inner)
    assert outer["terms"] == [{"weight": 2, "of": config(inner)}]


def test_a_weight_may_be_a_schedule() -> None:
    weight = schedules.steps({0: 0.0, 400: 1.0})
    spec = config(judges.verifier() - weight * judges.finished())
    scheduled = {
        "judge": "sum",
        "terms": [{"weight": weight.model_dump(mode="json"), "of": {"judge": "finished"}}],
    }
    assert spec["terms"][1] == {"weight": -1.0, "of": scheduled}
    assert config(parse_judge(spec)) == spec


def test_stages_become_edges() -> None:
    safe, model = Stage("safe", "reward_model"), Stage("genrm", "sft")
    judge = judges.gate(
        judges.scalar(safe, squash=True),
        below=0.15,
        then=judges.scalar(safe, squash=True),
        otherwise=judges.lexicographic(judges.scalar(RM), judges.compare(model)),
    )
    assert judge.stages == {"judges.safe": safe, "judges.helpful": RM, "judges.genrm": model}
    asked = [part.edge for part in parse_judge(config(judge)).walk() if part.edge is not None]
    assert asked == ["judges.safe", "judges.safe", "judges.helpful", "judges.genrm"]


@pytest.mark.parametrize(
    "judge",
    [
        judges.oracle(noise=0.5),
        judges.constant(-1),
        judges.language(alphabet="a-z]^"),
        judges.language(regex="[a-z]", unit="character"),
        judges.format("^<think>.*</think>"),
        judges.repetition(n=2, unit="character"),
        judges.llm("http://x/v1", "m", reference=True, rubric=True, key="KEY"),
        judges.compare("https://x/v1", "m", pairing="circular", swap=False),
        judges.itself(template="{prompt} {a} {b}"),
        judges.human(),
        judges.normalised(judges.verifier(), judges.finished()),
        judges.whitened(judges.scalar(RM)),
        judges.answer(judges.language(regex="[a-z]")),
        judges.by_domain({"a": judges.verifier(), "b": judges.finished()}),
        judges.length(budget=8, shape="pass_rate"),
        judges.length(budget=8, shape="concave", k=0.5, q=0.5),
        judges.length(shape="group_relative"),
    ],
    ids=lambda judge: judge.judge,
)
def test_the_json_form_is_read_again(judge: judges.Judge) -> None:
    assert config(parse_judge(config(judge))) == config(judge)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: judges.length(budget=0), "budget = 0; it has to be greater than 0"),
        (lambda: judges.length(), "judge length: with shape = linear it needs budget"),
        (
            lambda: judges.length(budget=4, shape="linaer"),
            "it has to be 'linear', 'budget', 'soft_overlong'",
        ),
        (
            lambda: judges.length(budget=4, cache=2),
            "with shape = linear it reads no 'cache'; choices: budget",
        ),
        (lambda: judges.length(budget=4, shape="soft_overlong", cache=5), "cache = 5 is more than"),
        (lambda: judges.scalar(Stage("s", "sft")), "it takes a stage of kind reward_model"),
        (lambda: judges.scalar("rm"), "'rm' is no stage"),
        (lambda: judges.language(), "exactly one of alphabet and regex"),
        (lambda: judges.format("("), "pattern = '('; it has to be a valid regular expression"),
        (lambda: judges.llm("localhost", "m"), "a url that begins with http"),
        (lambda: judges.llm("http://x", "m", rubric=False), "rubric = False; it has to be a text"),
        (lambda: judges.llm("http://x", "m", template="{prompt}"), "{prompt}, {response}"),
        (
            lambda: judges.llm("http://x", "m", reference=True, template="{prompt}{response}"),
            "shows {answer} where reference is given",
        ),
        (lambda: judges.compare("http://x"), "needs model="),
        (lambda: judges.compare(RM, "m"), "belong to the url"),
        (lambda: judges.compare(Stage("rm", "reward_model")), "language model"),
        (lambda: judges.itself(pairing="some"), "it has to be 'all' or 'circular'"),
        (lambda: judges.human() + judges.verifier(), "people compare pairs by themselves"),
        (
            lambda: judges.answer(judges.verifier() - judges.length(budget=8)),
            "length counts the tokens of whole responses",
        ),
        (lambda: judges.whitened(judges.human()), "people compare pairs by themselves"),
        (lambda: "x" * judges.verifier(), "weight = 'x'; it has to be a number or a schedule"),
        (lambda: "x" * (2 * judges.verifier()), "weight = 'x'; it has to be a number or a sched"),
        (lambda: judges.whitened(-1 * judges.oracle(noise=-1)), "judge oracle: noise = -1"),
        (lambda: judges.normalised(judges.verifier()), "it takes 2 or more"),
        (lambda: judges.by_domain({}), "domains = {}; it takes 1 or more"),
        (
            lambda: judges.by_domain({"a": 1}),
            "by_domain.domains.a: 1 is no judge",
        ),
        (lambda: judges.verifier() + 1, "a number is written judges.constant(...)"),
        (lambda: 1 + judges.verifier(), "judge sum.terms.0.of: 1 is no judge"),
        (lambda: judges.verifier() - RM, "a reward model is asked by judges.scalar(stage)"),
        (lambda: 1 - judges.verifier(), "judge sum.terms.0.of: 1 is no judge"),
        (
            lambda: judges.gate(judges.verifier(), below=1, then=0, otherwise=judges.constant(0)),
            "judge gate.then: 0 is no judge",
        ),
    ],
)
def test_mistakes_are_told_when_the_recipe_is_built(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("verifier", "'verifier' is no judge; it takes what posttrain.judges makes, or JSON"),
        ({"judge": "verifer"}, "did you mean 'verifier'?"),
        ({"judge": "oracle", "noise": -1}, "noise = -1; it has to be greater than or equal to 0"),
        ({"judge": "scalar", "model": "rm", "squash": False}, "the edge of a stage"),
        ({"judge": "sum", "terms": []}, "terms = []; it takes 1 or more"),
        ({"judge": "sum", "terms": [{"of": VERIFIER}]}, "sum.terms.0: weight is needed"),
        ({"judge": "sum", "terms": [3]}, "is no term"),
        ({"judge": "whitened", "of": {"judge": "x"}}, "rl.reward.whitened.of.x"),
        (
            {"judge": "whitened", "of": {"judge": "oracle", "noise": -1, "nois": 1}},
            "rl.reward.whitened.of.oracle: it reads no 'nois'; did you mean 'noise'?",
        ),
        ({"judge": "length", "budget": 0}, "rl.reward.length: budget = 0"),
        ({"judge": "whitened"}, "of is needed"),
        ({"judge": "by_domain", "domains": 3}, "domains = 3; it has to be a valid dictionary"),
        ({"judge": "gate", "below": "x", "condition": VERIFIER, "then": VERIFIER,
          "otherwise": VERIFIER}, "below = 'x'"),
    ],
)  # fmt: skip
def test_json_of_the_command_line_is_checked(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_judge(spec, where="rl.reward")
    assert message in str(caught.value)


def test_every_domain_needs_its_judge() -> None:
    judge = judges.by_domain({"add": judges.verifier()})
    judge.check(("add",), where="stage 'rl'")
    with pytest.raises(
        ConfigError, match=r"stage 'rl': judges\.by_domain has none for domain 'sub'"
    ):
        judge.check(("add", "sub"), where="stage 'rl'")


def test_some_judges_are_for_some_stages() -> None:
    itself, human = judges.itself(), judges.human()
    check_use(itself, "rl", where="stage 'x'")
    check_use(human, "pairs", where="stage 'x'")
    with pytest.raises(ConfigError, match="trains a policy"):
        check_use(itself, "score", where="stage 'x'")
    with pytest.raises(ConfigError, match="pairs, score and best"):
        check_use(human, "rl", where="stage 'x'")


def test_judges_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from posttrain import judges; import posttrain.rewards.judging;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_judges_add_up_with_sum() -> None:
    parts = [judges.verifier(), judges.constant(2.0)]
    assert sum(parts) == parts[0] + parts[1]


def test_fields_that_have_a_default_may_be_left_out() -> None:
    assert parse_judge({"judge": "oracle"}) == judges.oracle()
    assert parse_judge({"judge": "length", "shape": "pass_rate", "budget": 8}) == judges.length(
        budget=8, shape="pass_rate"
    )
