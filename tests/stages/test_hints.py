"""Hints: a teacher that reads the student's response after another prompt than the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.checkpoint import load
from posttrain.backends.local import LocalBackend
from posttrain.backends.prompting import also_hinted, hinted
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch
from posttrain.stages.config import build_config

RunStage = Callable[..., Any]
BASE: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 12,
    "max_new_tokens": 6,
    "lr": 0.01,
    "warmup_steps": 1,
    "routes": {"short": "first", "words": "second"},
}
ROW = {"id": "short-1", "domain": "short", "prompt": "short {abc}", "answer": 7, "demo": None}


@pytest.fixture
def distill(
    run_stage: RunStage, models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Distil `start` from two teachers with BASE and the given changes."""

    def run(**changes: Any) -> Any:
        inputs = {"start": models["start"], "teachers.first": models["one"]}
        inputs |= {"teachers.second": models["two"], **domains}
        return run_stage("distill", BASE | changes, inputs)

    return run


@pytest.mark.parametrize(
    "changes",
    [{}, {"samples_per_prompt": 2}, {"estimator": "sampled_token"}, {"estimator": "top_k"}],
    ids=str,
)
def test_a_hint_that_is_the_prompt_changes_no_bit_and_others_do(
    distill: Callable[..., Any], same: Callable[..., bool], changes: dict[str, Any]
) -> None:
    plain = distill(**changes)
    assert same(plain, distill(hints={"short": "{prompt}", "words": "{prompt}"}, **changes))
    longer = distill(hints={"short": "{prompt} {answer}"}, **changes)
    assert not same(plain, longer)
    other = distill(hints={"words": "{prompt} {answer}"}, **changes)
    assert not same(longer, other) and not same(plain, other)
    first = {
        name: [run.lines[0][f"kl/{name}"] for run in (plain, longer)] for name in BASE["routes"]
    }
    assert first["short"][0] != first["short"][1]
    assert first["words"][0] == pytest.approx(first["words"][1], rel=1e-4)


def test_a_teacher_reads_each_response_after_its_own_prompt(models: Mapping[str, str]) -> None:
    """Rows of unequal prompts and responses: what the teacher says of the n-th response token is
    what it says of a row that has had that prompt from the beginning."""
    scorer = LocalBackend().scorer(Path(models["one"]))
    chat = scorer.chat
    prompts = [chat.prompt(text) for text in ("a", "abc", "abcdef")]
    responses = [chat.response("", text) for text in ("xyz", "x", "xyzxyzx")]
    hints = [chat.prompt("abcabc abc"), None, chat.prompt("b")]
    plain = Batch.from_tokens(prompts, responses, pad_id=chat.pad_id)
    changed = plain.with_prompts(hints, chat.pad_id)
    assert changed.responses() == responses
    whole = [prompt if hint is None else hint for prompt, hint in zip(prompts, hints, strict=True)]
    expected = Batch.from_tokens(whole, responses, pad_id=chat.pad_id)
    torch.testing.assert_close(scorer.hidden(changed), scorer.hidden(expected), atol=0, rtol=0)
    at = len(responses[0])
    hidden_ND, plain_ND = scorer.hidden(changed), scorer.hidden(plain)
    assert not torch.allclose(hidden_ND[:at], plain_ND[:at])
    torch.testing.assert_close(hidden_ND[at : at + 2], plain_ND[at : at + 2])


def test_a_model_with_a_hint_teaches_itself_without_it(
    run_stage: RunStage,
    save_model: Callable[..., str],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    """Fine-tuned on prompts with and without the answer in them, the model says more with it. Its
    hinted self is then a teacher that differs from it, and that it can come nearer to; without
    hints it is the same model, and there is nothing to learn."""
    inputs = {"start": models["start"], "domains.short": domains["domains.short"]}
    hint = "{prompt} {answer}"
    learning = {"lr": 0.01, "warmup_steps": 1}
    tuned = run_stage("sft", {"steps": 150, "hint": hint, **learning}, inputs)
    learned = save_model(load(tuned.out))
    inputs |= {"start": learned, "teachers.self": learned}
    settings = {"routes": {"short": "self"}, "steps": 40, "prompts_per_step": 64}
    settings |= {"max_new_tokens": 6, **learning}
    untaught = run_stage("distill", settings, inputs)
    taught = run_stage("distill", settings | {"hints": {"short": hint}}, inputs)
    assert untaught.lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    first = sum(line["kl"] for line in taught.lines[:3])
    last = sum(line["kl"] for line in taught.lines[-3:])
    assert first > 0.1 and last < 0.7 * first


def test_rows_with_a_hint_are_there_twice() -> None:
    rows = {"short": [ROW, ROW | {"prompt": "other"}]}
    assert also_hinted(rows, None, where="stage 's'") == rows
    prompts = [row["prompt"] for row in also_hinted(rows, "{prompt}={answer}", where="s")["short"]]
    assert prompts == ["short {abc}", "short {abc}=7", "other", "other=7"]


def test_sft_learns_from_both_prompts(
    run_stage: RunStage,
    same: Callable[..., bool],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    inputs = {"start": models["start"], **domains}
    settings = {"steps": 3, "lr": 0.01, "warmup_steps": 1}
    plain = run_stage("sft", settings, inputs)
    assert not same(plain, run_stage("sft", settings | {"hint": "{prompt} {demo}"}, inputs))
    one = {"epochs": 1, "batch_size": 20}
    once = len(run_stage("sft", one, inputs).lines)
    twice = len(run_stage("sft", one | {"hint": "{prompt} {demo}"}, inputs).lines)
    assert twice in (2 * once - 1, 2 * once)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "names no field"),
        ("{prompt", "expected '}'.*write {{ for a brace"),
        ("{prompt.upper}", "no plain name of a field"),
        ("{0}", "no plain name of a field"),
        ("{prompt!r}", "no plain name of a field"),
        ("{prompt:>9}", "no plain name of a field"),
    ],
)
def test_templates_are_checked_while_planning(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"'student' \(distill\), field 'hints\.\w+'.*{message}"):
        build_config("distill", "student", {"steps": 1, "hints": {"short": template}})
    with pytest.raises(ConfigError, match=rf"'sft' \(sft\), field 'hint'.*{message}"):
        build_config("sft", "sft", {"steps": 1, "hint": template})


@pytest.mark.parametrize("field", ["demo", "steps"])
def test_a_field_that_a_row_does_not_have_is_named(field: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"stage 's': the hint .* names {{{field}}}, which problem 'short-1' of domain "
        "'short' does not have; its fields: id, domain, prompt, answer",
    ):
        hinted(ROW, f"{{prompt}} {{{field}}}", where="stage 's'")
