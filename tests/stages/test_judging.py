"""Judges that need a stage: its verifiers, its models, its work directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from posttrain import judges
from posttrain.backends.base import LearnerSettings
from posttrain.backends.checkpoint import load
from posttrain.backends.local import LocalBackend, LocalLearner, chat_of
from posttrain.backends.scalar import load_scalar, save_scalar
from posttrain.engine.errors import ConfigError, Waiting
from posttrain.language.handles import Stage
from posttrain.rewards.judging import Responses, RewardFunction
from posttrain.stages.context import Context
from posttrain.stages.judging import make_reward, verdict_ids

if TYPE_CHECKING:
    from posttrain.backends.checkpoint import LanguageModel

MODEL = Stage("one", "sft")


@pytest.fixture
def context(
    tmp_path: Path, models: Mapping[str, str], domains: Mapping[str, str]
) -> Iterator[Context]:
    inputs = {"judges.one": models["one"], "judges.rm": str(tmp_path / "rm"), **domains}
    save_scalar(scored(models["two"]), tmp_path / "rm")
    ctx = Context(name="x", work=tmp_path, inputs=inputs, threads=1, backend=LocalBackend())
    yield ctx
    ctx.close()


def scored(path: str) -> LanguageModel:
    """A reward model whose rewards are far from 0."""
    model = load_scalar(path)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.model.score.weight)
    return model


def learner(model: LanguageModel) -> LocalLearner:
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
    return LocalLearner(model, settings)


def batch(*texts: str, **more: Any) -> Responses:
    problem = {"id": "1", "domain": "short", "prompt": "short abc", "answer": "abc", "demo": "abc"}
    count = len(texts)
    columns = {"finished": [True] * count, "num_tokens": [len(text) + 1 for text in texts]}
    return Responses(problems=[problem] * count, texts=texts, group=[0] * count, **columns | more)


def score(reward: RewardFunction, responses: Responses) -> list[float]:
    return reward.score(responses)[0]


def test_the_verifier_judges_by_what_was_verified(context: Context) -> None:
    reward = make_reward(judges.verifier(), context)
    known = batch("Abc", "abc", verdicts=[0.25, 0.5])
    assert score(reward, known) == [0.25, 0.5]


def test_the_oracle_likes_what_is_right(context: Context) -> None:
    reward = make_reward(judges.oracle(noise=0), context)
    right, wrong = score(reward, batch("Abc", "abc"))
    assert right - wrong == pytest.approx(5 * 0.8)
    noisy = score(make_reward(judges.oracle(noise=2), context), batch("Abc", "abc"))
    other = score(make_reward(judges.oracle(noise=2), context, seed=1), batch("Abc", "abc"))
    assert noisy == score(make_reward(judges.oracle(noise=2), context), batch("Abc", "abc"))
    assert noisy != other != [right, wrong]


def test_a_reward_model_reads_the_last_token(context: Context) -> None:
    """Against transformers itself, one row at a time."""
    rm = Stage("rm", "reward_model")
    reward = make_reward(judges.scalar(rm), context)
    texts = ("abc", "a longer one", "")
    model = load_scalar(context.inputs["judges.rm"])
    chat = chat_of(model)
    expected = []
    for text in texts:
        ids = [*chat.prompt("short abc"), *chat.response("short abc", text)]
        with torch.no_grad():
            hidden_1TD = model.model.model(torch.tensor([ids])).last_hidden_state
            expected.append(float(model.model.score(hidden_1TD[0, -1])))
    assert score(reward, batch(*texts)) == pytest.approx(expected, abs=1e-4)
    squashed = score(make_reward(judges.scalar(rm, squash=True), context), batch(*texts))
    assert squashed == pytest.approx(torch.tensor(expected).sigmoid().tolist(), abs=1e-5)


def by_hand(model: LanguageModel, text: str) -> float:
    """P(1) / (P(1) + P(2)) of the first token of the response, by a plain forward pass."""
    chat = chat_of(model)
    first, second = verdict_ids(chat)
    with torch.no_grad():
        logp_V = model.model(torch.tensor([chat.prompt(text)])).logits[0, -1].log_softmax(-1)
    return float(torch.sigmoid(logp_V[first] - logp_V[second]))


@pytest.mark.parametrize("swap", [True, False])
def test_a_model_compares_by_its_verdict_tokens(
    context: Context, models: Mapping[str, str], swap: bool
) -> None:
    reward = make_reward(judges.compare(MODEL, swap=swap), context)
    model = load(models["one"])
    forth, back = (by_hand(model, f"c short abc|{ab}") for ab in ("xy|z", "z|xy"))
    share = (forth + 1 - back) / 2 if swap else forth
    found = score(reward, batch("xy", "z"))
    assert found == pytest.approx([share, 1 - share], abs=1e-5)
    assert score(reward, batch("alone")) == [0.5]


def test_circular_compares_each_with_the_next(context: Context, models: Mapping[str, str]) -> None:
    judge = judges.compare(MODEL, pairing="circular", swap=False, template="{a}:{b}")
    model = load(models["one"])
    uv, vw, wu = (by_hand(model, text) for text in ("u:v", "v:w", "w:u"))
    expected = [(uv + 1 - wu) / 2, (vw + 1 - uv) / 2, (wu + 1 - vw) / 2]
    assert score(make_reward(judge, context), batch("u", "v", "w")) == pytest.approx(
        expected, abs=1e-5
    )


def test_the_policy_judges_with_its_newest_weights(
    context: Context, models: Mapping[str, str]
) -> None:
    policy = load(models["start"])
    judge = judges.itself(template="{a}:{b}", swap=False)
    reward = make_reward(judge, context, policy=learner(policy))
    before = score(reward, batch("u", "v"))
    assert before[0] == pytest.approx(by_hand(policy, "u:v"), abs=1e-5)
    with torch.no_grad():
        next(policy.model.parameters()).mul_(1.5)
    after = score(reward, batch("u", "v"))
    assert after != before
    assert after[0] == pytest.approx(by_hand(policy, "u:v"), abs=1e-5)
    with pytest.raises(ConfigError, match="judge itself: only a stage that trains"):
        make_reward(judges.itself(), context)


def test_long_responses_lose_their_beginnings(
    context: Context, make_model: Callable[..., LanguageModel]
) -> None:
    """32 positions: the question's frame takes 3, <|user|> and <|assistant|> 2, a verdict 1."""
    policy = make_model(positions=32)
    judge = judges.itself(template="c {a}|{b}", swap=False)
    reward = make_reward(judge, context, policy=learner(policy))
    tail = "x" * 20 + "0123456789012345678901"
    found = score(reward, batch(tail, "abc"))
    assert found[0] == pytest.approx(by_hand(policy, f"c {tail[-23:]}|abc"), abs=1e-5)


def test_rl_logs_the_parts_of_its_reward(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> None:
    """The reward is their weighted sum in every step; the verifier's part is the accuracy."""
    reward = judges.verifier() - 0.5 * judges.length(budget=3) + 0.25 * judges.finished()
    settings = {"steps": 2, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 6}
    edges = {"start": models["start"], **domains}
    ran = run_stage("rl", settings | {"lr": 0.01, "reward": reward.to_json()}, edges)
    for line in ran.lines:
        verifier, length, finished = (
            line[f"judge/{name}"] for name in ("verifier", "length", "finished")
        )
        assert line["reward"] == pytest.approx(verifier - 0.5 * length + 0.25 * finished, abs=1e-6)
        assert (verifier, finished) == pytest.approx((line["accuracy"], line["finished_share"]))
    plain = run_stage("rl", settings | {"lr": 0.01}, edges)
    assert not [key for line in plain.lines for key in line if key.startswith("judge/")]


def test_a_judge_of_ones_own_sees_the_step_that_sampled(
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text("def mark(response, problem, *, step):\n    return step / 4\n")
    reward = judges.verifier() + judges.python(str(tmp_path / "own.py:mark"))
    settings = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 3}
    edges = {"start": models["start"], **domains}
    ran = run_stage("rl", settings | {"lr": 0.01, "reward": reward.to_json()}, edges)
    assert [line["judge/python.mark"] for line in ran.lines] == [0, 0.25, 0.5]


def test_people_make_the_stage_wait(context: Context) -> None:
    reward = make_reward(judges.human(), context)
    with pytest.raises(Waiting, match="1 of 1 comparisons"):
        score(reward, batch("u", "v"))
    path = context.work / "comparisons.jsonl"
    path.write_text(path.read_text().replace('"preferred": ""', '"preferred": "tie"'))
    assert score(reward, batch("u", "v")) == [0.5, 0.5]
    assert (context.out / "comparisons.jsonl").exists()
