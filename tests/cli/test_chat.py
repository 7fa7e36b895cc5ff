"""`posttrain chat`: a conversation, with a system message, within the positions of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from posttrain.commands.chat import Conversation, find_model
from posttrain.engine.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from posttrain.backends.checkpoint import LanguageModel


class Answering:
    """A sampler that remembers what it was asked, and says "ok"."""

    def __init__(self, model: LanguageModel) -> None:
        from posttrain.backends.checkpoint import chat_of

        self.chat = chat_of(model)
        self.asked: list[str] = []
        self.room: list[int] = []

    def sample(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **_: Any) -> Any:
        self.asked += [self.chat.text(ids) for ids in prompts]
        self.room.append(max_new_tokens)
        return SimpleNamespace(responses=lambda: [self.chat.response("", "ok")])


def talk(sampler: Any, **changes: Any) -> Conversation:
    given: dict[str, Any] = {"system": None, "temperature": 0.0, "limit": None}
    return Conversation(sampler, **(given | changes))


def test_a_message_is_answered_in_the_light_of_what_was_said(
    make_model: Callable[..., LanguageModel],
) -> None:
    sampler = Answering(make_model())
    conversation = talk(sampler, system="hi")
    assert conversation.answer("ab", 0) == conversation.answer("c", 1) == "ok"
    conversation.reset()
    conversation.answer("d", 2)
    assert sampler.asked == [
        "<|system|>hi<|user|>ab<|assistant|>",
        "<|system|>hi<|user|>ab<|assistant|>ok<|end|><|user|>c<|assistant|>",
        "<|system|>hi<|user|>d<|assistant|>",
    ]
    assert not conversation.dropped


def test_the_oldest_turns_are_forgotten_where_positions_run_out(
    make_model: Callable[..., LanguageModel],
) -> None:
    """32 positions; a turn of two characters and its answer have 7 tokens, the last message 4."""
    sampler = Answering(make_model(positions=32))
    conversation = talk(sampler)
    for number in range(3):
        conversation.answer(f"a{number}", number)
        assert not conversation.dropped
    # 21 tokens of three turns and 4 more leave 7 positions, and a quarter of all is to be left.
    conversation.answer("a3", 3)
    assert sampler.asked[-1].startswith("<|user|>a1<|assistant|>ok<|end|><|user|>a2")
    assert sampler.room == [28, 21, 14, 14]
    assert "the model has 32 positions: the oldest 2 messages are forgotten" in conversation.dropped
    # As much room as is asked for.
    tight = talk(sampler, limit=27)
    for text in ("b0", "b1"):
        tight.answer(text, 0)
    assert sampler.asked[-1] == "<|user|>b1<|assistant|>" and sampler.room[-1] == 27


def test_without_a_template_each_message_is_answered_by_itself(
    make_model: Callable[..., LanguageModel],
) -> None:
    model = make_model()
    model.tokenizer.chat_template = None
    sampler = Answering(model)
    conversation = talk(sampler)
    assert not conversation.remembers
    conversation.answer("ab", 0)
    conversation.answer("c", 0)
    assert sampler.asked == ["ab", "c"]
    with pytest.raises(ConfigError, match="--system: the model's tokenizer has no chat template"):
        talk(sampler, system="hi")


def test_the_command_keeps_the_conversation(
    make_model: Callable[..., LanguageModel],
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from posttrain.backends.checkpoint import save

    model = make_model(stop=[4, *range(20, 40)])
    save(model, tmp_path / "model")
    where = str(tmp_path / "model")

    def said(lines: list[str], *options: str) -> list[str]:
        left = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(left))
        ran = cli("chat", where, "--temperature", "0", *options)
        assert ran.code == 0 and next(left, None) is None
        return list(ran.out.splitlines())

    first = said(["ab"])
    assert "/reset starts anew; an empty line ends" in " ".join(first)
    assert first[-1] == cli("chat", where, "--temperature", "0", "--prompt", "ab").out.rstrip("\n")
    assert said(["ab", "/reset", "ab"])[-1] == first[-1]
    again = said(["ab", "ab"])
    assert first[-1] in again and again[-1] != first[-1]
    assert said(["ab"], "--system", "be brief")[-1] != first[-1]
    model.tokenizer.chat_template = None
    save(model, tmp_path / "plain")
    where = str(tmp_path / "plain")
    assert "each message is answered by itself" in " ".join(said(["ab"]))
    assert cli("chat", where, "--system", "x", "--prompt", "ab").code == 2


def test_a_directory_that_is_no_checkpoint_is_told_in_the_words_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: peft_type = None.*merge_and"):
        find_model(tmp_path / "store", str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ConfigError, match=r"model\.safetensors: it is not a safetensors file"):
        find_model(tmp_path / "store", str(tmp_path))
    with pytest.raises(ConfigError, match="a file; give the directory"):
        find_model(tmp_path / "store", str(tmp_path / "config.json"))
