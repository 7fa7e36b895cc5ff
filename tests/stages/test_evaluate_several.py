"""evaluation.json of several students, of models along the way, without init, without verifier, and
with judges."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_warnings
from posttrain.rl.batch import Batch
from posttrain.stages.config import build_config
from posttrain.stages.evaluate import summary_of

BASE: dict[str, Any] = {
    "num_problems": 8,
    "samples": 2,
    "max_new_tokens": 6,
    "bootstrap": 200,
    "transcripts": 2,
}


@pytest.fixture
def evaluate(run_stage: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Run evaluate on these inputs; returns evaluation.json, with the stage's run as "ran"."""

    def run(inputs: Mapping[str, str], **changes: Any) -> dict[str, Any]:
        ran = run_stage("evaluate", BASE | changes, inputs)
        result: dict[str, Any] = json.loads((ran.out / "evaluation.json").read_text())
        assert ran.metrics == pytest.approx(summary_of(result))
        return result | {"ran": ran}

    return run


@pytest.fixture
def silent(tmp_path: Path, domains: Mapping[str, str]) -> dict[str, str]:
    """The domain `short` as one whose responses nobody verifies."""
    folder = tmp_path / "silent" / "short"
    shutil.copytree(domains["domains.short"], folder)
    record = json.loads((folder / "domain.json").read_text())
    record["config"]["verifier"] = {"name": "none", "options": {}}
    (folder / "domain.json").write_text(json.dumps(record))
    return {"domains.short": str(folder)}


def test_of_each_of_several_students_there_is_what_it_has_alone(
    evaluate: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    shared = {"init": models["start"], "teachers.first": models["one"], **domains}
    how = {"routes": {"short": "first"}}
    both = evaluate(
        {"students.a": models["two"], "students.b": models["one"], "along.r": models["two"]}
        | shared,
        **how,
    )
    assert list(both["students"]) == ["a", "b"]
    for name, model in {"a": "two", "b": "one"}.items():
        alone = evaluate({"student": models[model]} | shared, **how)
        assert "students" not in alone
        # The best constant answer is looked for in what all models of the evaluation say.
        for row in (*both["students"][name]["domains"].values(), *alone["domains"].values()):
            assert row.pop("constant")["value"] <= 1
        for key, value in both["students"][name].items():
            assert value == alone[key], key
    # Three models are asked, though five have a role.
    assert [line["step"] for line in both["ran"].lines] == [1, 2, 3]
    (pair,) = both["pairs"]
    assert (pair["first"], pair["second"]) == ("a", "b")
    rows = [both["students"][name]["domains"] for name in ("a", "b")]
    for domain in ("short", "words"):
        wanted = rows[0][domain]["student"]["value"] - rows[1][domain]["student"]["value"]
        assert pair["domains"][domain]["value"] == pytest.approx(wanted)
        assert both["along"]["r"][domain]["sampled"] == rows[0][domain]["student"]
        assert both["along"]["r"][domain]["greedy"] == rows[0][domain]["greedy"]["student"]
    means = [pair["domains"][domain]["value"] for domain in ("short", "words")]
    assert pair["all"]["value"] == pytest.approx(np.mean(means))


def test_one_student_alone_has_accuracies_and_no_gain(
    evaluate: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    result = evaluate({"student": models["one"], **domains})
    view = result["students"]["student"]
    assert view["gain"] is None and view["norm"] is None
    row = view["domains"]["short"]
    assert row["init"] is None and row["gain"] is None and row["recovery"] is None
    assert row["student"]["low"] < row["student"]["value"] < row["student"]["high"]
    assert (result["pairs"], result["along"]) == ([], {})


def test_a_domain_without_verifier_has_kl_and_lengths(
    evaluate: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    silent: Mapping[str, str],
) -> None:
    inputs = {"students.a": models["two"], "students.b": models["start"], "init": models["start"]}
    inputs |= {"teachers.first": models["one"]}
    result = evaluate(
        {**inputs, "domains.words": domains["domains.words"], **silent}, routes={"short": "first"}
    )
    assert list(result["models"]["init"]) == ["words"]
    assert list(result["students"]["a"]["domains"]) == ["words"]
    short = result["unverified"]["short"]
    assert (short["num_problems"], short["teacher"]) == (8, "first")
    a, b, init, teacher = (
        short["models"][edge] for edge in ("students.a", "students.b", "init", "teachers.first")
    )
    for key in ("kl_init", "kl_teacher", "length"):
        assert a[key]["low"] < a[key]["value"] < a[key]["high"]
    assert a["kl_init"]["value"] > 0
    assert 0 <= a["truncated"] <= 1
    # What is compared with itself has no KL, and only students have one to a teacher.
    assert b["kl_init"] is None and init["kl_init"] is None
    assert b["kl_teacher"] is not None
    assert teacher["kl_init"] is not None and teacher["kl_teacher"] is None
    texts = json.loads((result["ran"].out / "transcripts.json").read_text())["short"]
    assert all(isinstance(said["sampled"], str) for said in texts[0]["responses"].values())
    assert {said["sampled_score"] for row in texts for said in row["responses"].values()} == {None}


def test_nothing_but_domains_without_verifier(
    evaluate: Callable[..., Any], models: Mapping[str, str], silent: Mapping[str, str]
) -> None:
    result = evaluate({"student": models["two"], "init": models["start"], **silent})
    assert result["students"]["student"]["domains"] == {}
    assert result["students"]["student"]["gain"] is None
    assert set(result["ran"].metrics) == {"kl_init/student/short"}


def test_a_judge_scores_and_says_who_wins(
    evaluate: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    silent: Mapping[str, str],
) -> None:
    inputs = {"student": models["two"], "init": models["start"], **domains, **silent}
    format_judge = {"judge": "format", "pattern": "[a-m]"}
    cost = {"judge": "sum", "terms": [{"weight": -3, "of": format_judge}]}
    result = evaluate(inputs, judges={"short": format_judge, "words": cost}, transcripts=8)
    texts = json.loads((result["ran"].out / "transcripts.json").read_text())
    short, words = result["judged"]["short"], result["judged"]["words"]
    assert (short["unit"], words["unit"]) == (True, False)
    assert short["judge"] == ["format"]
    # Of a judge by domain the one of this domain.
    by_domain = {
        "judge": "by_domain",
        "domains": {"short": format_judge, "words": {"judge": "verifier"}},
    }
    own = evaluate(inputs, judges={"short": by_domain, "words": by_domain})["judged"]
    assert (own["short"]["judge"], own["short"]["models"]) == (["format"], short["models"])
    greedy = {
        edge: [row["responses"][edge]["greedy_judged"] for row in texts["short"]]
        for edge in ("student", "init")
    }
    for edge, scores in greedy.items():
        cell = short["models"][edge]["greedy"]["score"]
        assert cell["value"] == pytest.approx(np.mean(scores))
    higher = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in zip(greedy["student"], greedy["init"], strict=True)
    ]
    assert short["models"]["student"]["greedy"]["win"]["value"] == pytest.approx(np.mean(higher))
    assert short["models"]["init"]["win"] is None
    # A verified domain keeps its accuracy.
    assert "words" in result["students"]["student"]["domains"]
    assert words["models"]["student"]["score"]["value"] <= 0


@pytest.mark.parametrize("kind", ["compare", "oracle"])
def test_a_judge_that_compares_is_asked_in_both_orders(
    evaluate: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
    kind: str,
) -> None:
    """A copy of the init wins half against it, whatever the judge likes."""
    # In another directory, so that it is not known to be the same model.
    twin = shutil.copytree(models["start"], tmp_path / "twin")
    inputs = {"students.same": str(twin), "students.other": models["two"]}
    inputs |= {"init": models["start"], **domains}
    if kind == "compare":
        inputs["judges.one"] = models["one"]
        judge = {"judge": "compare", "model": "judges.one", "swap": False}
    else:
        judge = {"judge": "oracle"}
    result = evaluate(inputs, judges={"short": judge})["judged"]["short"]
    other = result["models"]["students.other"]
    assert 0 < other["win"]["value"] < 1
    assert (other["score"] is None) == (kind == "compare")
    assert result["models"]["students.same"]["win"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert result["models"]["init"]["win"] is None


def test_what_cannot_be_told_is_warned_about(
    evaluate: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "constant"
    shutil.copytree(domains["domains.short"], folder)
    record = json.loads((folder / "domain.json").read_text())
    record["config"]["verifier"]["options"] = {"pattern": "never ever"}
    (folder / "domain.json").write_text(json.dumps(record))
    result = evaluate(
        {"student": models["one"], "domains.short": str(folder)}, max_new_tokens=1, samples=4
    )
    told = read_warnings(result["ran"].out.parent)
    cut, same = told
    assert re.search(
        r"cut at max_new_tokens = 1 \(\d+ % of student, which ends with '<\|end\|>' \(4\)", cut
    )
    assert "the same score (short: 0 on all 8 problems)" in same
    calm = evaluate({"student": models["one"], **domains}, max_new_tokens=50)
    assert not any("every response" in t for t in read_warnings(calm["ran"].out.parent))
    # A teacher is looked at in the domains that it teaches.
    inputs = {"student": models["one"], "teachers.t": models["two"], **domains}
    taught = evaluate(inputs, max_new_tokens=1, routes={"words": "t"})
    assert any(" of t, which" in text for text in read_warnings(taught["ran"].out.parent))
    untaught = evaluate(inputs, max_new_tokens=1)
    assert not any(" of t, which" in text for text in read_warnings(untaught["ran"].out.parent))


def test_judges_that_an_evaluation_cannot_ask_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"judges\.human\(\) is for"):
        build_config("evaluate", "e", {"judges": {"short": {"judge": "human"}}})
    with pytest.raises(ConfigError, match="schedule"):
        weight = {"schedule": "linear", "start": 0, "end": 1}
        term = {"weight": weight, "of": {"judge": "format", "pattern": "a"}}
        build_config("evaluate", "e", {"judges": {"short": {"judge": "sum", "terms": [term]}}})


def test_kl_is_the_mean_log_ratio_over_sampled_tokens(
    monkeypatch: pytest.MonkeyPatch, models: Mapping[str, str], new_context: Callable[..., Any]
) -> None:
    """Log-ratios of problem 0 are .1, .2 and .3 on three tokens of two responses, of problem 1 -.1
    and 0: the mean over the five tokens is .5 / 5 = .1, not a mean over responses or problems.

    Resamples that hold problem 0 alone have .6 / 3, those with problem 1 alone -.1 / 2, and each
    is a quarter of all.
    """
    from posttrain.stages.settings.models import Evaluate
    from posttrain.stages.unverified import Behaviour

    batch = Batch.from_tokens([[1], [1], [2], [2]], [[5], [6, 7], [8], [9]], pad_id=0)
    batch["sampler_logp_N"] = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    batch["group_B"] = torch.tensor([0, 0, 1, 1])
    batch["finished_B"] = torch.tensor([True, True, False, True])
    batch.problems.extend([{"domain": "chat"}] * 4)
    ctx = new_context({"init": models["start"], "student": models["one"]})
    paths = {edge: ctx.inputs[edge] for edge in ("init", "student")}
    behaviour = Behaviour(Evaluate(bootstrap=100), ctx, paths, {"chat": batch.problems})
    scorer = ctx.scorer("init")

    class Fixed:
        chat = scorer.chat

        def logprobs(self, rows: Batch) -> torch.Tensor:
            return torch.tensor([-1.1, -1.2, -1.3, -0.9, -1.0])

    behaviour._scorers[paths["init"]] = Fixed()  # type: ignore[assignment]
    found = behaviour.of(paths["student"], "chat", scorer.chat, batch)
    assert found["kl_init"]["value"] == pytest.approx(0.1)
    assert found["length"]["value"] == pytest.approx((1.5 + 1.0) / 2)
    assert found["truncated"] == pytest.approx(0.25)
    assert found["kl_init"]["low"] == pytest.approx(-0.05)
    assert found["kl_init"]["high"] == pytest.approx(0.2)


def test_kl_to_a_model_with_another_template_is_read_behind_its_own_prompt(
    models: Mapping[str, str], new_context: Callable[..., Any], tmp_path: Path
) -> None:
    """By hand: the mean of the log ratios, the other model's behind what its template writes."""
    from posttrain.stages.settings.models import Evaluate
    from posttrain.stages.unverified import Behaviour

    shutil.copytree(models["one"], tmp_path / "other")
    template = "{% for m in messages %}ask: {{ m['content'] }} {% endfor %}say: "
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    ctx = new_context({"init": str(tmp_path / "other"), "student": models["start"]})
    paths = {edge: ctx.inputs[edge] for edge in ("init", "student")}
    sampler = ctx.sampler("student")
    how = {"group_size": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 0}
    batch = sampler.sample([sampler.chat.prompt(text) for text in "ab"], **how)
    batch.problems.extend({"domain": "chat", "prompt": text} for text in "aabb")
    batch["group_B"] = torch.tensor([0, 0, 1, 1])
    behaviour = Behaviour(Evaluate(bootstrap=100), ctx, paths, {"chat": batch.problems})
    found = behaviour.of(paths["student"], "chat", sampler.chat, batch)
    other = ctx.scorer("init")
    prompts = [other.chat.begin(f"ask: {text} say: ") for text in "aabb"]
    read_N = other.logprobs(Batch.from_tokens(prompts, batch.responses(), pad_id=0))
    ratio_N = batch["sampler_logp_N"] - read_N
    assert found["kl_init"]["value"] == pytest.approx(float(ratio_N.mean()), abs=1e-5)
    wrong_N = batch["sampler_logp_N"] - other.logprobs(batch)
    assert abs(float((ratio_N - wrong_N).mean())) > 1e-2
