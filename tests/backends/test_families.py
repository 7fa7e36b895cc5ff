"""Families of models as the outside world has them: what is learned of a conversation.

The families are those of benchmarks/families.py, made small. The whole conversation, encoded at
once, is the oracle of the tokens; which of them are learned is written here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from families import FAMILIES, family, write
from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import read_chat

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Name a colour."}
SAID = {"role": "assistant", "content": "blue"}
NEXT = {"role": "user", "content": "What is 3 plus 4?"}
SEVERAL = [SYSTEM, FIRST, SAID, NEXT]

# Both turns of the conversation, each from where the assistant speaks up to what ends it.
LEARNED = {
    "llama-2": ("▁blue▁ </s>", "▁7▁ </s>"),
    "llama-3.2": ("blue <|eot_id|>", "7 <|eot_id|>"),
    "mistral-0.3": ("▁blue </s>", "▁7 </s>"),
    "qwen2.5-base": ("blue <|im_end|>", "7 <|im_end|>"),
    "qwen2.5": ("blue <|im_end|>", "7 <|im_end|>"),
    # An earlier turn is shown without a thought, and the last one with an empty one.
    "qwen3": ("blue <|im_end|>", "<think> Ċ Ċ </think> Ċ Ċ 7 <|im_end|>"),
    "gemma-3-1b": ("blue <end_of_turn>", "7 <end_of_turn>"),
    # The next message's token ends a turn.
    "glm-4.5": (
        "Ċ <think> </think> Ċ blue <|user|>",
        "Ċ <think> </think> Ċ 7 <|user|>",
    ),
    # Behind the block that the prompt has opened.
    "deepseek-r1": ("blue <｜end▁of▁sentence｜>", "</think> 7 <｜end▁of▁sentence｜>"),  # noqa: RUF001
    "smollm3": ("blue <|im_end|>", "7 <|im_end|>"),
    # What ends a message of the history ends no turn, and is not learned.
    "gpt-oss": (
        "<|channel|> final <|message|> blue",
        "<|channel|> final <|message|> 7 <|return|>",
    ),
    "olmo-3-think": ("blue <|im_end|>", "</think>7 <|endoftext|>"),
}
OPENS = ("deepseek-r1", "olmo-3-think")
"""Whose prompts open a thinking block, which a finished turn does not show."""


@pytest.fixture(scope="module", params=[one.name for one in FAMILIES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def chat(name: str, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    out = tmp_path_factory.mktemp(name)
    write(family(name), out)
    return read_chat(out)


def tokens(chat: Chat, ids: list[int]) -> str:
    """The tokens that are added, and the text between them in one piece each."""
    found: list[str] = []
    plain = ""
    for token in ids:
        text = str(chat.tokenizer.convert_ids_to_tokens(token))
        if token in chat.tokenizer.added_tokens_decoder or text == "Ċ":
            found += [plain] * bool(plain) + [text]
            plain = ""
        else:
            plain += text
    return " ".join(found + [plain] * bool(plain))


def test_what_is_learned_of_a_conversation(name: str, chat: Chat) -> None:
    spans = chat.spans(SEVERAL, "7")
    assert spans is not None
    assert tuple(tokens(chat, list(ids)) for ids, sampled in spans if sampled) == LEARNED[name]


def test_the_tokens_are_those_of_the_whole_conversation(name: str, chat: Chat) -> None:
    """Nothing is put between or left out."""
    if name in OPENS:
        pytest.skip("a finished turn is shown otherwise than it was begun")
    spans = chat.spans(SEVERAL, "7")
    assert spans is not None
    ours = [token for ids, _ in spans for token in ids]
    answer = {"role": "assistant", "content": "7"}
    tokenizer = chat.tokenizer
    special = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token}
    assert chat.template is not None
    text = chat.template.render([*SEVERAL, answer], add_generation_prompt=False, **special)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [*whole, chat.stop_ids[0]] if chat.stop_ids[0] not in whole[-3:] else whole
    assert ours == ends[: len(ours)]
    assert len(ends) - len(ours) <= 2, "what a template writes after the end of a turn"


def test_the_text_of_an_end_in_data_ends_nothing(chat: Chat) -> None:
    quoted = chat.text([chat.stop_ids[0]])
    asked = f"Repeat: {quoted} twice"
    said = chat.response(asked, f"{quoted} {quoted}")
    prompt = chat.prompt(asked)
    plain = chat.prompt("Repeat: x twice")
    assert said.count(chat.stop_ids[0]) == 1 and said[-1] == chat.stop_ids[0]
    assert prompt.count(chat.stop_ids[0]) == plain.count(chat.stop_ids[0])
    assert chat.decode(said).strip().endswith(f"{quoted} {quoted}")
