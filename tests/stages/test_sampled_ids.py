"""Sampled ids: kept in rows, handed on by operators, and trained on as they are.

The tokenizer merges letters, so that what a random model samples is encoded again as other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import read_chat, save
from posttrain.backends.prompting import in_modes, learned_rows
from posttrain.backends.tiny import TEMPLATE, new_model
from posttrain.engine.work import read_warnings
from posttrain.rewards.judge_kinds import Scalar
from posttrain.rewards.judging import Responses
from posttrain.stages.aux_losses import demo_batch
from posttrain.stages.context import Context
from posttrain.stages.dpo import pair_batch
from posttrain.stages.judging import ScalarJudge, StageTools
from posttrain.stages.reward_model import draw_batch
from posttrain.stages.rows import without_thought
from posttrain.stages.sampled_ids import own_ids, tell_encoded_anew

SPECIAL = ["<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"]
ENDS = [f"<|e{i}|>" for i in range(30)]
"""Many, so that a random model ends its responses."""
RunStage = Callable[..., Any]


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer merges letters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what is two plus two? it is four", "the sky is blue"] * 4, trainer)
    core.add_special_tokens(ENDS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[4],
        additional_special_tokens=SPECIAL[2:4] + ENDS,
        chat_template=TEMPLATE,
    )
    model = new_model(
        tokenizer,
        hidden_size=16,
        num_layers=1,
        num_heads=1,
        head_dim=16,
        intermediate_size=16,
        max_positions=128,
        seed=0,
    )
    path = tmp_path_factory.mktemp("merging") / "model"
    save(model, path)
    config = path / "generation_config.json"
    stops = [core.token_to_id(token) for token in [SPECIAL[4], *ENDS]]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": stops}))
    write_record(path)
    return path


def write_record(path: Path) -> None:
    record = {"format": 1, "name": "m", "kind": "model", "fingerprint": "1" * 64}
    (path / "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def chat(merging: Path) -> Chat:
    return read_chat(merging)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def apart(chat: Chat) -> list[int]:
    """Ids whose text is encoded as others: "it" letter by letter, with a special token between."""
    core = chat.tokenizer.backend_tokenizer
    ids = [core.token_to_id(token) for token in ("i", "t", SPECIAL[2], "s", ENDS[3])]
    assert chat.response("q", chat.decode(ids)) != ids
    return ids


def sampled_row(chat: Chat, field: str = "demo", **more: Any) -> dict[str, Any]:
    ids = apart(chat)
    start = "" if field in ("demo", "response") else f"{field}_"
    row = {"id": "1", "domain": "d", "prompt": "q", field: chat.decode(ids)}
    return row | {f"{start}ids": ids, f"{start}ids_of": chat.tokens_digest} | more


def test_what_was_sampled_is_what_sft_trains(
    run_stage: RunStage, merging: Path, domains: Mapping[str, str], chat: Chat
) -> None:
    settings = {"k": 2, "num_prompts": 8, "max_new_tokens": 48, "prefix": "it is "}
    settings["routes"] = {"short": ["m"], "words": ["m"]}
    ran = run_stage("sample", settings, {"models.m": str(merging), **domains})
    rows = read(ran.out / "rollouts.jsonl")
    begun = chat.begin("it is ")
    for row in rows:
        assert row["ids_of"] == chat.tokens_digest
        assert row["ids"][: len(begun)] == begun
        assert len(row["ids"]) == len(begun) + row["num_tokens"]
        assert (row["ids"][-1] in chat.stop_ids) == row["finished"]
        assert chat.decode(row["ids"]) == row["response"]
    kept = run_stage("select", {"how": "all"}, {"rollouts": str(ran.out)})
    demos = read(kept.out / "data.jsonl")
    sampled = sum(len(row["ids"]) for row in demos)
    encoded = sum(len(chat.response(row["prompt"], row["demo"])) for row in demos)
    assert len(demos) > 20 and encoded > 1.2 * sampled
    write_record(kept.out)
    learned = run_stage(
        "sft",
        {"steps": 1, "batch_size": len(demos)},
        {"start": str(merging), "data": str(kept.out)},
    )
    assert learned.metrics["tokens"] == sampled
    assert read_warnings(learned.out.parent) == []


def test_an_rl_stage_logs_the_ids(
    run_stage: RunStage, merging: Path, domains: Mapping[str, str], chat: Chat
) -> None:
    settings = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 5}
    ran = run_stage("rl", settings, {"start": str(merging), **domains})
    for row in read(ran.out / "rollouts.jsonl"):
        assert len(row["ids"]) == row["num_tokens"] and row["ids_of"] == chat.tokens_digest
        assert chat.decode(row["ids"]) == row["response"]


def test_every_batch_to_learn_from_has_the_sampled_ids(chat: Chat) -> None:
    ids, pair = apart(chat), {"rejected": "no"} | sampled_row(chat, "chosen")
    no = chat.response("q", "no")
    assert demo_batch([sampled_row(chat)], chat).responses() == [ids]
    assert pair_batch([pair], chat).responses() == [ids, no]
    single = sampled_row(chat, "response", desirable=True)
    assert pair_batch([single], chat).responses() == [ids]
    batch, _ = draw_batch([{"pairs": [pair]}], chat)
    assert batch.responses() == [ids, no]
    # In a conversation they are those of the last turn.
    asked = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "it is"},
        {"role": "user", "content": "two"},
    ]
    (learned,) = demo_batch([sampled_row(chat, messages=asked)], chat).responses()
    assert learned == [*chat.response(asked[:1], "it is"), *ids]


def test_other_tokens_are_encoded_from_the_text_and_told(
    chat: Chat, new_context: Callable[..., Context]
) -> None:
    own = sampled_row(chat)
    other = own | {"ids_of": "0" * 16}
    # Whole, but it does not end here what it ended there.
    unended = own | {"ids": apart(chat)[:-1]}
    plain = {name: value for name, value in own.items() if not name.startswith("ids")}
    encoded = chat.response("q", own["demo"])
    for row in (other, unended, plain):
        assert own_ids(chat, "q", row, "demo") is None
        assert demo_batch([row], chat).responses() == [encoded]
    # One that was cut has no end.
    assert own_ids(chat, "q", unended | {"finished": False}, "demo") == apart(chat)[:-1]
    ctx = new_context()
    tell_encoded_anew(ctx, [own, plain], chat, ["demo"])
    assert read_warnings(ctx.work) == []
    tell_encoded_anew(ctx, [own, own, other, unended, plain], chat, ["demo"])
    (told,) = read_warnings(ctx.work)
    assert told.startswith("2 of 4 sampled responses (50 %) are encoded anew from their text")


def test_operators_hand_ids_on_and_drop_them_with_the_text(
    run_stage: RunStage, chat: Chat, tmp_path: Path
) -> None:
    rows = [
        sampled_row(chat, "response", reward=float(n), finished=True, num_tokens=5, model="m")
        | {"response": f"r{n}"}
        for n in range(2)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paired = run_stage("pairs", {"how": "best_against_worst"}, {"rollouts": str(tmp_path)})
    (pair,) = read(paired.out / "pairs.jsonl")
    for side in ("chosen", "rejected"):
        assert pair[f"{side}_ids"] == apart(chat)
        assert pair[f"{side}_ids_of"] == chat.tokens_digest
    selected = run_stage("select", {"how": "correct"}, {"rollouts": str(tmp_path)})
    for kind, edge in (("dedup", "data"), ("mix", "data.0")):
        parts = {"parts": [{"edge": edge, "weight": 1}]} if kind == "mix" else {}
        (row,) = read(run_stage(kind, parts, {edge: str(selected.out)}).out / "data.jsonl")
        assert row["demo"] == "r1" and row["ids"] == apart(chat)
    thought = rows[0] | {"response": "<think>so</think>r0"}
    assert "ids" not in without_thought(thought) and "ids_of" not in without_thought(thought)
    assert without_thought(rows[0]) == rows[0]
    without = [{k: v for k, v in row.items() if not k.startswith("ids")} for row in rows]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    old = run_stage("select", {"how": "correct"}, {"rollouts": str(tmp_path)})
    (told,) = read_warnings(old.out.parent)
    assert told.startswith("2 of 2 rollouts (100 %) have no token ids")


def test_a_reward_model_reads_the_sampled_ids(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, new_context: Callable[..., Context]
) -> None:
    """Where its tokenizer is the same; one that was cut gets the end that it lacks."""
    seen: list[list[int]] = []

    def scores(scorer: Any, batch: Any) -> torch.Tensor:
        seen.extend(batch.responses())
        return torch.zeros(len(batch))

    monkeypatch.setattr("posttrain.stages.judging.rewards_B", scores)
    monkeypatch.setattr(Context, "scorer", lambda *args, **more: SimpleNamespace(chat=chat))
    judge = ScalarJudge(Scalar(model="judges.m"), StageTools(ctx=new_context()))
    ids = apart(chat)
    kept = [
        {"ids": ids, "ids_of": chat.tokens_digest},
        {"ids": ids[:-1], "ids_of": chat.tokens_digest},
        {"ids": ids, "ids_of": "0" * 16},
        {},
    ]
    text = chat.decode(ids)
    judge.score(
        Responses(
            problems=[{"prompt": "q"}] * 4,
            texts=[text] * 4,
            group=[0] * 4,
            finished=[True, False, True, True],
            num_tokens=[5] * 4,
            sampled=kept,
        )
    )
    encoded = chat.response("q", text)
    assert seen == [ids, [*ids[:-1], chat.stop_ids[0]], encoded, encoded]


def test_ids_of_a_text_that_was_changed_are_not_taken(chat: Chat) -> None:
    """By a person in the file, by another demonstration of the row, by one of a mode."""
    own = sampled_row(chat)
    for changed in (
        own | {"demo": "it is"},
        own | {"demo": own["demo"] + " "},
        own | {"demo": f"<think>so</think>{own['demo']}"},
        *learned_rows([own | {"demos": ["it is"]}])[1:],
        *in_modes([own | {"direct": "it is"}], ["no_think"]),
    ):
        assert own_ids(chat, "q", changed, "demo") is None
        learned = demo_batch([changed | {"mode": None}], chat).responses()
        assert learned == [chat.response("q", changed["demo"])]
    assert own_ids(chat, "q", own, "demo") == apart(chat)


def test_ids_that_the_model_may_not_say_are_not_taken(merging: Path) -> None:
    """It has fewer rows than the one that sampled them, or shares its steps with one that has."""
    chat = read_chat(merging)
    own = sampled_row(chat)
    chat.restrict([apart(chat)[2]])
    assert own_ids(chat, "q", own, "demo") is None
