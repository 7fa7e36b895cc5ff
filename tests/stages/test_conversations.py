"""Conversations through the stages: learned turn by turn in one row, and answered as prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import LanguageModel, load, save
from posttrain.backends.local import LocalLearner
from posttrain.engine.errors import ConfigError
from posttrain.rl.batch import Batch
from posttrain.stages.aux_losses import demo_batch, token_cross_entropy

SYSTEM = {"role": "system", "content": "hi"}
FIRST = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1e9)
RunStage = Callable[..., Any]


def talk(prompt: str) -> list[dict[str, str]]:
    return [SYSTEM, *FIRST, {"role": "user", "content": prompt}]


@pytest.fixture
def conversations(domains: Mapping[str, str], tmp_path: Path) -> dict[str, str]:
    """The two domains with every prompt at the end of a conversation."""
    found = {}
    for edge, path in domains.items():
        copy = tmp_path / edge
        shutil.copytree(path, copy)
        for split in ("train", "validation", "heldout"):
            file = copy / f"{split}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            lines = [json.dumps(row | {"messages": talk(row["prompt"])}) for row in rows]
            file.write_text("\n".join(lines) + "\n")
        found[edge] = str(copy)
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_turns_are_learned_in_one_row(make_model: Callable[..., LanguageModel]) -> None:
    learner = LocalLearner(make_model(), SETTINGS)
    chat = learner.chat
    row = {"prompt": "?", "messages": talk("e"), "demo": "fg", "id": "1", "domain": "d"}
    batch = demo_batch([row, {"prompt": "h", "demo": "ij"}], chat)
    assert len(batch) == 2
    assert [chat.text(ids) for ids in batch.responses()] == ["bcd<|end|>fg<|end|>", "ij<|end|>"]
    assert chat.text(batch.tokens_BT[0].tolist()) == (
        "<|system|>hi<|user|>a<|assistant|>bcd<|end|><|user|>e<|assistant|>fg<|end|>"
    )
    last = demo_batch([row], chat, loss_on="last")
    assert [chat.text(ids) for ids in last.responses()] == ["fg<|end|>"]
    assert torch.equal(last.tokens_BT, batch.tokens_BT[:1])


def test_the_loss_of_packed_conversations_is_that_of_each_turn_by_itself(
    make_model: Callable[..., LanguageModel],
) -> None:
    learner = LocalLearner(make_model(), SETTINGS)
    chat = learner.chat
    rows: list[dict[str, Any]] = [
        {"prompt": "", "messages": talk(text), "demo": text[::-1]} for text in ("ef", "g", "hij")
    ]
    rows.append({"prompt": "k", "demo": "lm"})
    # By hand: every turn as a prompt and a response of its own.
    asked = [FIRST_ASKED, FIRST_ASKED, FIRST_ASKED, *(talk(t) for t in ("ef", "g", "hij")), "k"]
    texts = ["bcd", "bcd", "bcd", "fe", "g", "jih", "lm"]
    by_hand = Batch.from_tokens(
        [chat.prompt(one) for one in asked],
        [chat.response(one, text) for one, text in zip(asked, texts, strict=True)],
        pad_id=chat.pad_id,
    )
    expected = learner.logprobs(by_hand)
    loss = TokenLoss(token_cross_entropy, 1.0)
    batch = demo_batch(rows, chat)
    assert batch.num_tokens == by_hand.num_tokens
    sums = learner.update(batch, loss, count=1.0, lr=0.0)
    assert sums["loss"] == pytest.approx(-float(expected.sum()), rel=1e-5)


FIRST_ASKED = [SYSTEM, FIRST[0]]


def test_sft_learns_conversations_and_every_demonstration(
    run_stage: RunStage, models: Mapping[str, str], conversations: Mapping[str, str]
) -> None:
    settings = {"steps": 2, "batch_size": 8}
    inputs = {"start": models["start"], **conversations}
    every = run_stage("sft", settings, inputs)
    last = run_stage("sft", settings | {"loss_on": "last"}, inputs)
    # Four tokens more per row: bcd and its end.
    tokens = [ran.lines[-1]["tokens"] for ran in (every, last)]
    assert tokens[0] - tokens[1] == 2 * 8 * 4
    with pytest.raises(ConfigError, match="loss_on"):
        run_stage("sft", settings | {"loss_on": "first"}, inputs)

    path = Path(conversations["domains.short"]) / "train.jsonl"
    rows = rows_of(path)
    more = [row | {"demos": ["x", "yz"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in more))
    for kind, given in (("sft", {"start": models["start"]}), ("pretrain", {})):
        ran = run_stage(
            kind,
            {"steps": 1, "batch_size": 3 * len(rows)},
            {**given, "domains.short": conversations["domains.short"]},
        )
        # Each demonstration once in a pass: one has 3 characters, the others 1 and 2.
        if kind == "sft":
            assert ran.lines[0]["tokens"] == len(rows) * (4 + 2 + 3 + 3 * 4)


def test_a_template_that_hides_turns_is_told(
    run_stage: RunStage,
    make_model: Callable[..., LanguageModel],
    save_model: Callable[..., str],
    conversations: Mapping[str, str],
) -> None:
    model = make_model()
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
        "{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    ran = run_stage("sft", {"steps": 1}, {"start": save_model(model), **conversations})
    (told,) = warnings_of(ran)
    count = sum(len(rows_of(Path(path) / "train.jsonl")) for path in conversations.values())
    assert f"{count} of {count} conversations are learned in their last turn only" in told


def test_further_demonstrations_that_are_none_of_a_mode_are_told(
    run_stage: RunStage, domains: Mapping[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "short"
    shutil.copytree(domains["domains.short"], copy)
    rows = rows_of(copy / "train.jsonl")
    more = [row | {"thought": "t", "demos": ["x"]} for row in rows[:3]]
    (copy / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    settings = {"steps": 1, "batch_size": 9, "modes": ["think", "no_think"], "hidden_size": 16}
    ran = run_stage("pretrain", settings, {"domains.short": str(copy)})
    (told,) = warnings_of(ran)
    assert "3 further demonstrations of domain 'short' are not learned" in told


def warnings_of(ran: Any) -> list[str]:
    from posttrain.engine.work import read_warnings

    return list(read_warnings(ran.out.parent))


@pytest.mark.parametrize("kind", ["rl", "distill", "sample", "profile", "evaluate", "best"])
def test_stages_answer_conversations(
    kind: str, run_stage: RunStage, models: Mapping[str, str], conversations: Mapping[str, str]
) -> None:
    domains = {"domains.short": conversations["domains.short"]}
    shared: dict[str, Any] = {"max_new_tokens": 4}
    steps = {"steps": 2, "prompts_per_step": 4}
    settings, inputs = {
        "rl": (steps | {"group_size": 2}, {"start": models["start"]}),
        "distill": (
            steps | {"routes": {"short": "one"}, "hints": {"short": "{prompt}={answer}"}},
            {"start": models["start"], "teachers.one": models["one"]},
        ),
        "sample": (
            {"num_prompts": 4, "routes": {"short": ["one"]}},
            {"models.one": models["one"]},
        ),
        "profile": ({"num_prompts": 4, "n": 2}, {"model": models["one"]}),
        "evaluate": (
            {"num_problems": 4, "bootstrap": 100},
            {"student": models["start"], "init": models["one"]},
        ),
        "best": (
            {"num_problems": 4, "bootstrap": 100},
            {"candidates.a": models["one"], "candidates.b": models["two"]},
        ),
    }[kind]
    shown = run_stage(kind, shared | settings, {**inputs, **domains})
    if kind in ("rl", "sample"):
        for row in rows_of(shown.out / "rollouts.jsonl"):
            assert row["messages"] == talk(row["prompt"])
    if kind == "sample":
        # The same prompts without what came before them are answered otherwise.
        path = Path(domains["domains.short"]) / "train.jsonl"
        lines = [
            json.dumps({k: v for k, v in row.items() if k != "messages"}) for row in rows_of(path)
        ]
        path.write_text("\n".join(lines) + "\n")
        plain = run_stage(kind, shared | settings, {**inputs, **domains})
        answers = [
            [row["response"] for row in rows_of(ran.out / "rollouts.jsonl")]
            for ran in (shown, plain)
        ]
        assert answers[0] != answers[1]


def test_what_comes_of_conversations_keeps_them(
    run_stage: RunStage, models: Mapping[str, str], conversations: Mapping[str, str]
) -> None:
    """sample, select, sft; sample, pairs, dpo and a reward model: on what the model was shown."""
    domains = {"domains.words": conversations["domains.words"]}
    settings = {"num_prompts": 8, "k": 4, "max_new_tokens": 6, "routes": {"words": ["one"]}}
    sampled = run_stage("sample", settings, {"models.one": models["one"], **domains})
    rollouts = {"rollouts": str(sampled.out)}
    selected = run_stage("select", {"how": "all"}, rollouts)
    pairs = run_stage("pairs", {"how": "best_against_worst"}, rollouts)
    for ran in (selected, pairs):
        record = {"format": 1, "name": "made", "kind": "select", "fingerprint": "3" * 64}
        (ran.out / "record.json").write_text(json.dumps(record))
    for file in (selected.out / "data.jsonl", pairs.out / "pairs.jsonl"):
        assert all(row["messages"] == talk(row["prompt"]) for row in rows_of(file))
    learned = run_stage("sft", {"steps": 1}, {"start": models["one"], "data": str(selected.out)})
    assert learned.metrics["tokens"] > 0
    for kind in ("dpo", "reward_model"):
        inputs = {"start": models["one"], "data": str(pairs.out)}
        ran = run_stage(kind, {"steps": 1, "batch_size": 4, "on_long": "error"}, inputs)
        assert ran.metrics["loss"] > 0


def test_dedup_and_mix_see_what_is_shown(run_stage: RunStage, tmp_path: Path) -> None:
    same = {"domain": "d", "prompt": "e", "demo": "f"}
    other = [SYSTEM | {"content": "ho"}, {"role": "user", "content": "e"}]
    rows = [
        same | {"id": "1", "messages": talk("e")},
        same | {"id": "2", "messages": talk("e")},
        same | {"id": "3", "messages": other},
        same | {"id": "4"},
        same | {"id": "5", "demos": ["g"]},
    ]
    data = tmp_path / "rows"
    data.mkdir()
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"format": 1, "name": "rows", "kind": "select", "fingerprint": "3" * 64}
    (data / "record.json").write_text(json.dumps(record))
    ran = run_stage("dedup", {"of": "row"}, {"data": str(data)})
    kept = [(row["id"], row["demo"]) for row in rows_of(ran.out / "data.jsonl")]
    assert kept == [("1", "f"), ("3", "f"), ("4", "f"), ("5", "g")]
    mixed = run_stage("mix", {"parts": [{"edge": "parts.0", "weight": 1}]}, {"parts.0": str(data)})
    assert len(rows_of(mixed.out / "data.jsonl")) == 6


def test_the_model_of_a_stage_without_a_template_refuses_conversations(
    run_stage: RunStage,
    models: Mapping[str, str],
    conversations: Mapping[str, str],
    tmp_path: Path,
) -> None:
    plain = load(models["start"])
    plain.tokenizer.chat_template = None
    save(plain, tmp_path / "plain")
    inputs = {"start": str(tmp_path / "plain"), **conversations}
    for kind, settings in (("sft", {"steps": 1}), ("rl", {"steps": 1, "max_new_tokens": 4})):
        with pytest.raises(ConfigError, match="no chat template"):
            run_stage(kind, settings, inputs)
