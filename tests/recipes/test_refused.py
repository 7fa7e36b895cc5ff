"""What is refused while a recipe is built, before anything runs, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.algorithms import BradleyTerry
from posttrain.engine.errors import ConfigError, GraphError
from posttrain.language.handles import Stage
from posttrain.recipe import Recipe

STEPS = {"steps": 5}


def start(r: Recipe) -> Stage:
    return r.pretrain(data=r.demos(r.domains), **STEPS)


def test_an_unknown_option_names_the_nearest(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    with pytest.raises(ConfigError, match=r"field 'batchsize': unknown .* 'batch_size'"):
        r.pretrain(data=r.demos("add"), steps=3, batchsize=2)
    with pytest.raises(ConfigError, match="field 'steps': a value is needed"):
        r.pretrain(data=r.demos("add"))


def test_an_unknown_domain_names_the_nearest(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    with pytest.raises(ConfigError, match="'sorrt' is not in suite 'mine'; did you mean 'sort'"):
        r.prompts(["add", "sorrt"])
    with pytest.raises(ConfigError, match=r"no domain is given .* choices: add, sort, turn"):
        r.demos([])


def test_a_domain_without_teacher_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    teachers = {"add": base, "sort": base}
    with pytest.raises(ConfigError, match=r"domain 'turn' has no teacher; .* add, sort; .*self"):
        r.distill(start=base, teachers=teachers, prompts=r.prompts(r.domains), **STEPS)
    with pytest.raises(ConfigError, match=r"teachers\['sort'\] would never be asked"):
        r.distill(start=base, teachers=teachers, prompts=r.prompts("add"), **STEPS)
    with pytest.raises(ConfigError, match="field 'routes': which model serves which domain"):
        r.distill(
            start=base,
            teachers={"add": base},
            prompts=r.prompts("add"),
            routes={"add": "sort"},
            **STEPS,
        )
    with pytest.raises(ConfigError, match="'tum' is not in suite"):
        r.distill(start=base, teachers={"tum": base}, prompts=r.prompts("add"), name="x", **STEPS)


def test_teachers_are_stages_or_self(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    with pytest.raises(ConfigError, match=r"teachers\['add'\] = 'base'; it takes a stage or"):
        r.distill(start=base, teachers={"add": "base"}, prompts=r.prompts("add"), **STEPS)
    named = r.sft(start=base, data=r.demos("add"), name="self", **STEPS)
    with pytest.raises(ConfigError, match="a teacher is called 'self'"):
        r.distill(
            start=base, teachers={"add": named, "sort": "self"},
            prompts=r.prompts(["add", "sort"]), **STEPS,
        )  # fmt: skip


def test_two_stages_of_one_name_are_refused(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    r.sft(start=base, data=r.demos("add"), **STEPS)
    with pytest.raises(GraphError, match=r"two stages are called 'sft' .* another name="):
        r.sft(start=base, data=r.demos("sort"), **STEPS)


def test_a_stage_may_not_have_the_name_of_a_domain(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = r.pretrain(data=r.demos("add"), **STEPS)
    with pytest.raises(GraphError, match="two stages are called 'add'"):
        r.sft(start=base, data=r.demos("add"), name="add", **STEPS)
    r.sft(start=base, data=r.demos("add"), name="sort", **STEPS)
    with pytest.raises(GraphError, match="the sft stage 'sort' has the name of a domain"):
        r.rl(start=base, prompts=r.prompts("sort"), **STEPS)


def test_a_cycle_is_printed(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    first = r.sft(start=r.stage("second"), data=r.demos("add"), name="first", **STEPS)
    second = r.rl(start=first, prompts=r.prompts("add"), name="second", **STEPS)
    with pytest.raises(GraphError, match=r"cycle: (first -> second -> first|second -> first -> s)"):
        r.graph(second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, b: r.sft(start=b, data=r.prompts("add"), **STEPS), "it needs r.demos"),
        (lambda r, b: r.rl(start=b, prompts=r.demos("add"), **STEPS), "it needs r.prompts"),
        (
            lambda r, b: r.sft(start=b, data=b, **STEPS),
            "needs r.demos.* or a stage of kind table, select",
        ),
        (lambda r, b: r.sft(start="base", data=r.demos("add"), **STEPS), "'base' is not a model"),
        (lambda r, b: r.select(b), "needs the rollouts of a stage of kind .* not 'base'"),
        (
            lambda r, b: r.sample({"add": b}, prompts=r.prompts(["add", "sort"])),
            "no model for domain 'sort'",
        ),
        (
            lambda r, b: r.evaluate(r.select(r.sample(b, prompts=r.prompts("add"))), init=b),
            "student = .* is not a model",
        ),
    ],
)
def test_edges_of_the_wrong_kind_are_refused(
    make_recipe: Callable[..., Recipe], call: Callable[..., Any], message: str
) -> None:
    r = make_recipe()
    with pytest.raises(ConfigError, match=message):
        call(r, start(r))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda r, b, s: r.pairs(b),
            r"'pairs' \(pairs\): it needs the rollouts of a stage of kind",
        ),
        (lambda r, b, s: r.pairs(s, against=b), "rollouts of a stage of kind .*, not 'base'"),
        (
            lambda r, b, s: r.pairs(s, how="strong_against_weak"),
            r"how = strong_against_weak needs a second stage; write r.pairs\(strong, against=weak",
        ),
        (
            lambda r, b, s: r.pairs(s, against=s, how="best_against_worst"),
            "how = best_against_worst reads no second stage",
        ),
        (
            lambda r, b, s: r.dpo(start=b, data=s),
            r"its data is 'rollouts' \(sample\); it needs pref",
        ),
        (lambda r, b, s: r.dpo(start=s, data=r.pairs(s), **STEPS), "start = .* is not a model"),
        (
            lambda r, b, s: r.dpo(start=b, data=r.pairs(s), reference=s, **STEPS),
            "reference = .* is not a model",
        ),
        (
            lambda r, b, s: r.dpo(start=b, data=r.pairs(s), reference=b, loss="simpo", **STEPS),
            "loss = simpo reads no reference; leave reference= out",
        ),
        (
            lambda r, b, s: r.sft(start=b, data=r.pairs(s), **STEPS),
            "needs r.demos.* or a stage of kind table, select",
        ),
    ],
)
def test_preference_edges_of_the_wrong_kind_are_refused(
    make_recipe: Callable[..., Recipe], call: Callable[..., Any], message: str
) -> None:
    r = make_recipe()
    base = start(r)
    with pytest.raises(ConfigError, match=message):
        call(r, base, r.sample(base, prompts=r.prompts("add")))


def swapped(path: str) -> str:
    """The checkpoint with the ids of two tokens exchanged."""
    file = Path(path, "tokenizer.json")
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return path


def test_a_reference_of_another_vocabulary_is_refused_at_plan_time(
    make_recipe: Callable[..., Recipe], checkpoint: Callable[..., str]
) -> None:
    r = make_recipe()
    base = r.model(checkpoint("one"))
    other = r.model(swapped(checkpoint("other")), name="other")
    pairs = r.pairs(r.sample(base, prompts=r.prompts("add")))
    with pytest.raises(ConfigError, match="reference 'other' and student 'base' differ"):
        r.dpo(start=base, data=pairs, reference=other, **STEPS)


def test_teachers_of_another_vocabulary_are_refused_at_plan_time(
    make_recipe: Callable[..., Recipe], checkpoint: Callable[..., str]
) -> None:
    r = make_recipe()
    base = r.model(checkpoint("one"))
    twin = r.model(checkpoint("twin"), name="twin")
    more = r.model(checkpoint("more", extra="<|more|>"), name="more")
    other = r.model(swapped(checkpoint("other")), name="other")
    student = {"start": base, "prompts": r.prompts("add"), **STEPS}
    r.distill(teachers={"add": twin}, name="fine", **student)
    # A token that no text uses, and rows for it.
    r.distill(teachers={"add": more}, name="fine2", **student)
    tuned = r.sft(start=other, data=r.demos("add"), **STEPS)
    with pytest.raises(
        ConfigError, match=r"teacher 'sft' and student 'base' .*token 'a' has id 71 in"
    ):
        r.distill(teachers={"add": tuned}, **student)


def test_a_teacher_may_end_elsewhere_but_not_be_broken(
    make_recipe: Callable[..., Recipe], checkpoint: Callable[..., str]
) -> None:
    one, two = checkpoint("one"), checkpoint("two")
    path = Path(two, "generation_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 9}))
    r = make_recipe()
    base, other = r.model(one), r.model(two, name="other")
    r.distill(start=base, teachers={"add": other}, prompts=r.prompts("add"), **STEPS)
    (told,) = [warned.text for warned in r.warnings if "does not name" in warned.text]
    assert "does not name <|end|> (4), which ends it by the tokenizer and the chat template" in told
    assert "learn to end with <|end|> (4), and stop at id 9, too" in told
    Path(two, "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"two/tokenizer.json: not JSON .* line 1 column 2"):
        make_recipe().model(two)


def test_a_checkpoint_that_nothing_would_stop_is_refused_at_plan_time(
    make_recipe: Callable[..., Recipe], checkpoint: Callable[..., str]
) -> None:
    path = checkpoint("one")
    for name, change in (
        ("generation_config.json", {"eos_token_id": None}),
        ("config.json", {"eos_token_id": 300}),
        ("tokenizer_config.json", {"eos_token": None}),
    ):
        file = Path(path, name)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    # Its template still writes an end.
    assert make_recipe().model(path)
    Path(path, "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(ConfigError, match=r"one: nothing would ever end a response: .*; set eos_"):
        make_recipe().model(path)


def test_modes_are_refused_where_the_base_has_none(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    sft = r.sft(start=start(r), data=r.demos("add"), **STEPS)
    prompts = r.prompts("add", mode="think")
    rollouts = r.sample(sft, prompts=prompts)
    with pytest.raises(ConfigError, match=r"'rollouts' .* think is asked of 'sft', .* 'base'"):
        r.graph(rollouts)


def test_strengths_are_refused_where_nobody_says_them(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    rollouts = r.sample(base, prompts=r.prompts("add"), k=4)
    said = r.pairs(rollouts, judge=judges.oracle(), how="all", name="said")
    r.graph(
        r.reward_model(
            start=base, data=said, loss=BradleyTerry(margins="strength"), name="clear", **STEPS
        )
    )
    r.reward_model(
        start=base,
        data=r.pairs(rollouts),
        loss=BradleyTerry(margins="strength"),
        name="unclear",
        **STEPS,
    )
    with pytest.raises(ConfigError, match=r"'unclear' .* those of 'pairs' have none"):
        r.graph(base)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda r, b: r.rl(start=b, prompts=r.prompts("add"), reward=b, **STEPS), "is no judge"),
        (lambda r, b: r.rl(start=b, prompts=r.prompts("add"), reward=1.0, **STEPS), "is no judge"),
        (lambda r, b: r.merge(b), "it is given 'base' alone; it takes a list"),
        (
            lambda r, b: r.distill(start=b, teachers=b, prompts=r.prompts("add"), **STEPS),
            "is no dict of domain to teacher",
        ),
        (lambda r, b: r.sft(start=b, data=r.demos("add"), steps=True), "True is no number"),
        (lambda r, b: r.sft(start=b, data=r.demos("add"), steps="3"), "write 3 without quotes"),
        (lambda r, b: r.rl(start=b, prompts=r.prompts("add"), stpes=3), "did you mean 'steps'"),
        (
            lambda r, b: r.score(
                r.sample(b, prompts=r.prompts("add")),
                judge=judges.llm("http://localhost/v1", "m", rubric=True),
            ),
            "the rows of domain 'add' have none; name their column with rubric = ...",
        ),
    ],
)
def test_a_mistake_names_the_stage_and_the_fix(
    make_recipe: Callable[..., Recipe],
    mistake: Callable[[Recipe, Stage], object],
    message: str,
) -> None:
    r = make_recipe()
    with pytest.raises(ConfigError, match=r"^stage '") as caught:
        mistake(r, start(r))
    assert message in str(caught.value)


def test_what_an_evaluation_cannot_compare_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    other = r.sft(start=base, data=r.demos("add"), steps=2, name="other")
    cases: list[tuple[object, dict[str, Any], str]] = [
        (3, {}, r"students are 3; it takes a model, a dict of names to models"),
        ("other", {}, r"did you mean r.stage\('other'\)\?"),
        ({}, {}, "it has no students; name a model"),
        ({"a b": base}, {}, "the name 'a b'; it takes letters, digits, _ and -"),
        ({"init": base}, {}, "the name 'init', which means something else"),
        ({"score": base}, {}, "the name 'score', which means something else"),
        ({"a": base, "b": base}, {}, "'a' and 'b' of its students are the same stage 'base'"),
        ([base, base], {}, "'base' is among its students twice"),
        ({"a": r.prompts("add")}, {}, r"students\['a'\] = .* is not a model; it takes a stage"),
        (base, {"along": {}}, "it has no along; leave along= out"),
        ({"a": base}, {"along": {"a": other}}, "'a' is the name of a student and of a model"),
        (base, {"init": "other"}, "init = 'other' is not a model"),
        (base, {"judges": judges.verifier()}, "it takes a dict of domain to judge"),
        (base, {"judges": {"add": other}}, r"judges\['add'\] = .* is no judge"),
        (
            base,
            {"judges": {"ad": judges.format("x")}},
            "'ad' is not one of its domains; did you mean 'add'",
        ),
        (
            base,
            {"judges": {"turn": judges.format("x")}, "domains": ["add"]},
            "'turn' is not one of its domains",
        ),
        (base, {"judges": {"add": judges.compare(other)}}, "there is no init to compare with"),
        (
            base,
            {"judges": {"add": judges.whitened(judges.format("x"))}},
            "the score of judge whitened depends on what other responses",
        ),
        (base, {"judges": {"add": judges.human()}}, "judges.human"),
    ]
    for student, how, message in cases:
        with pytest.raises(ConfigError, match=message):
            r.evaluate(student, name=f"e{len(r._build.nodes)}", **how)  # type: ignore[arg-type]


def test_the_edges_of_an_evaluation(make_recipe: Callable[..., Recipe]) -> None:
    r = make_recipe()
    base = start(r)
    a, b, m = (r.sft(start=base, data=r.demos("add"), steps=n, name=f"s{n}") for n in (2, 3, 4))
    scorer = r.reward_model(
        start=base, data=r.pairs(r.sample(base, prompts=r.prompts("add"))), steps=1, name="rm"
    )
    r.evaluate(
        {"mopd": a, "merged": b},
        init=base,
        teachers={"add": a, "sort": "self"},
        along={"round1": m},
        judges={"sort": judges.scalar(scorer)},
        domains=["add", "sort"],
    )
    node = r._build.nodes["evaluation"]
    assert node.inputs == {
        "students.mopd": "s2",
        "students.merged": "s3",
        "along.round1": "s4",
        "init": "base",
        "domains.add": "add",
        "domains.sort": "sort",
        "teachers.s2": "s2",
        "judges.rm": "rm",
    }
    assert node.identity is not None and set(node.identity) == {"judges", "routes"}
    r.evaluate(a, name="alone")
    assert list(r._build.nodes["alone"].inputs)[:1] == ["student"]
    assert r._build.nodes["alone"].identity == {}
    plain = r.evaluate(a, init=base, teachers={"add": b}, name="plain")
    assert list(r._build.nodes[plain.name].inputs) == [
        *("student", "init", "domains.add", "domains.sort", "domains.turn", "teachers.s3")
    ]
