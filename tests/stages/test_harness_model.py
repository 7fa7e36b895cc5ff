"""What lm-eval asks of a model, answered by our sampler and scorer as by lm-eval's own for
transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from posttrain.backends.checkpoint import save
from posttrain.engine.errors import StageError
from posttrain.stages.context import Context
from posttrain.stages.harness_model import Answers, HarnessModel, cut
from posttrain.stages.settings.models import Harness

PAIRS = [
    ("12+7=", "19"),
    ("12+7= ", "19"),
    ("", "hello"),
    ("a long context of several words, and more: ", "7"),
    ("x", "abc def"),
]


@pytest.fixture(scope="session")
def checkpoint(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("harness") / "model"
    save(make_model("llama", stop=(4,)), path)
    return str(path)


@pytest.fixture
def make(new_context: Callable[..., Context], checkpoint: str) -> Callable[..., Any]:
    """`make(**settings)`: our model for lm-eval on a small random one."""

    def make(ctx: Context | None = None, **settings: Any) -> HarnessModel:
        ctx = ctx or new_context({"model": checkpoint})
        return HarnessModel(
            lambda: ctx.sampler("model"),
            ctx.scorer("model"),
            Harness(tasks=["any"], **settings),
            answers=Answers(ctx.work / "answers.jsonl"),
            ctx=ctx,
        )

    return make


@pytest.fixture
def theirs(checkpoint: str) -> HFLM:
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=1)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, place) for place, args in enumerate(arguments)]


def test_continuations_score_as_with_lm_evals_own(make: Callable[..., Any], theirs: HFLM) -> None:
    requests = asked("loglikelihood", *PAIRS)
    ours = make(chat_template=False).loglikelihood(requests)
    for (logp, greedy), (expected, same) in zip(ours, theirs.loglikelihood(requests), strict=True):
        assert logp == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == same


def test_what_greedy_decoding_gives_is_greedy(make: Callable[..., Any]) -> None:
    model = make(chat_template=False)
    (response,) = model.generate_until(
        asked("generate_until", ("12+7=", {"until": [], "max_gen_toks": 3}))
    )
    assert response
    ((_, greedy), (_, other)) = model.loglikelihood(
        asked("loglikelihood", ("12+7=", response), ("12+7=", "zzzz"))
    )
    assert (greedy, other) == (True, False)


def test_one_model_at_a_time_is_in_memory(make: Callable[..., Any]) -> None:
    model = make(chat_template=False)
    model.loglikelihood(asked("loglikelihood", *PAIRS))
    assert "sampler" not in vars(model) and model.scorer.weights.awake
    model.generate_until(asked("generate_until", ("12+7=", {"max_gen_toks": 3})))
    assert "sampler" in vars(model) and not model.scorer.weights.awake


def test_a_continuation_that_does_not_fit_is_refused(make: Callable[..., Any]) -> None:
    model = make(chat_template=False)
    long = "7" * model.chat.max_positions
    with pytest.raises(StageError, match="positions of the model leave room for"):
        model.loglikelihood(asked("loglikelihood", ("12+", long)))


def test_whole_texts_score_as_with_lm_evals_own(make: Callable[..., Any], theirs: HFLM) -> None:
    long = "many words " * 60
    requests = asked("loglikelihood_rolling", ("a text of some words",), (long,))
    model = make(chat_template=False)
    # Our rows hold the token that is predicted last as well, so windows are one token shorter.
    theirs._max_length = model.chat.max_positions - 1
    ours = model.loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-4)


def test_responses_are_those_of_lm_evals_own(make: Callable[..., Any], theirs: HFLM) -> None:
    how = {"until": ["7"], "do_sample": False, "max_gen_toks": 12}
    requests = asked("generate_until", ("12+7=", dict(how)), ("one two", dict(how)))
    ours = make(chat_template=False).generate_until(requests)
    assert ours == theirs.generate_until(requests)


def test_a_stopped_stage_asks_only_what_is_left(
    make: Callable[..., Any], new_context: Callable[..., Context], checkpoint: str
) -> None:
    ctx = new_context({"model": checkpoint})
    requests = asked("loglikelihood", *PAIRS)
    first = make(ctx).loglikelihood(requests)
    path = ctx.work / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(PAIRS)
    # As a kill leaves it: two answers are there, the third is half written.
    path.write_text("".join(lines[:2]) + lines[2][:7])
    again = make(ctx)
    assert len(again.answers.known) == 2
    found = again.loglikelihood(requests)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in first])
    assert len(path.read_text().splitlines()) >= len(PAIRS)


def test_sampled_questions_that_repeat_are_asked_again(make: Callable[..., Any]) -> None:
    how = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = asked("generate_until", *[("12+7=", dict(how))] * 6)
    found = make(chat_template=False).generate_until(requests)
    assert len(set(found)) > 1
    assert found == make(chat_template=False).generate_until(requests)


def test_a_conversation_goes_through_the_template(make: Callable[..., Any]) -> None:
    model = make()
    history = [{"role": "user", "content": "12+7="}]
    text = model.apply_chat_template(history)
    assert model.chat.encoded(text) == model.chat.prompt("12+7=")
    begun = [*history, {"role": "assistant", "content": "The"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == text + "The"


def test_cut() -> None:
    assert cut("a b\nc", ["\n", "b"]) == "a "
    assert cut("abc", "c") == "ab"
    assert cut("abc", ["", "z"]) == "abc"


def test_long_questions_lose_their_beginning(
    make: Callable[..., Any], new_context: Callable[..., Context], checkpoint: str
) -> None:
    ctx = new_context({"model": checkpoint})
    model = make(ctx, max_new_tokens=8)
    limit = model.chat.max_positions
    ids = model._prompt("word " * limit, room=8)
    assert len(ids) == limit - 8
    told = (Path(ctx.work) / "warnings.jsonl").read_text()
    assert "cut at their beginning" in told
