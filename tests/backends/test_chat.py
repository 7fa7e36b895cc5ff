"""Prompts and responses as tokens, for tokenizers with and without a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, chat_of
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do: what was thought is not shown once the turn is over.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>think{% endif %}"
)


@pytest.fixture
def language_model() -> LanguageModel:
    """A byte-level BPE tokenizer with BOS, ChatML tokens and an end-of-text token; no weights."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what is two plus two? four", "name a colour: blue"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
    )
    # As much of a model as says what ends a turn; it has a row for each token.
    layer = SimpleNamespace(weight=torch.empty(1000, 1))
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=None),
        config=SimpleNamespace(get_text_config=SimpleNamespace, name_or_path="it"),
        get_output_embeddings=lambda: layer,
    )
    return LanguageModel(model=model, tokenizer=tokenizer)


def new_chat(language_model: LanguageModel) -> Chat:
    return Chat(
        language_model.tokenizer,
        stop_ids=language_model.stop_ids,
        pad_id=language_model.pad_id,
    )


def with_template(
    language_model: LanguageModel, template: str | None, stop: Any = None
) -> tuple[Chat, Any]:
    language_model.tokenizer.chat_template = template
    language_model.model.generation_config.eos_token_id = stop
    return new_chat(language_model), language_model.tokenizer


def test_the_tiny_tokenizer_is_one_token_per_character(make_model: Callable[..., Any]) -> None:
    model = make_model()
    chat, tokenizer = chat_of(model), model.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(chat.prompt("a 4-1"))
    assert tokens == ["<|user|>", *"a 4-1", "<|assistant|>"]
    response = chat.response("a 4-1", "4-1=3")
    assert tokenizer.convert_ids_to_tokens(response) == [*"4-1=3", "<|end|>"]
    assert chat.decode(response) == "4-1=3"
    assert chat.decode(response[:-1]) == "4-1=3"
    assert chat.response("a 4-1", "") == [tokenizer.eos_token_id]


def test_characters_that_the_tiny_tokenizer_lacks_become_one_unknown_token(
    make_model: Callable[..., Any],
) -> None:
    model = make_model()
    chat, tokenizer = chat_of(model), model.tokenizer
    unknown = tokenizer.convert_tokens_to_ids("<|unknown|>")
    assert chat.prompt("4µ2")[1:-1] == [
        tokenizer.convert_tokens_to_ids("4"),
        unknown,
        tokenizer.convert_tokens_to_ids("2"),
    ]
    assert chat.response("4", "µµ") == [unknown, unknown, tokenizer.eos_token_id]


@pytest.mark.parametrize("as_list", [False, True])
def test_text_after_the_end_token_is_not_part_of_a_response(
    language_model: LanguageModel, as_list: bool
) -> None:
    end = language_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat, tokenizer = with_template(language_model, CHATML, [1, end] if as_list else end)
    prompt = chat.prompt("two plus two?")
    assert tokenizer.decode(prompt) == (
        "<bos><|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.count(tokenizer.bos_token_id) == 1
    response = chat.response("two plus two?", "four")
    assert tokenizer.decode(response) == "four<|im_end|>"
    assert chat.decode(response) == "four"


def test_prompt_and_response_together_are_the_whole_template(
    language_model: LanguageModel,
) -> None:
    end = language_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat, tokenizer = with_template(language_model, CHATML, end)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "blue"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(chat.prompt("q") + chat.response("q", "blue")) + "\n" == whole


def test_a_stop_token_that_the_template_does_not_write_is_added(
    language_model: LanguageModel,
) -> None:
    """A base model's end-of-text token, say, under a template that ends turns by a new line."""
    plain = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat, tokenizer = with_template(language_model, plain)
    assert tokenizer.decode(chat.response("q", "blue")) == "blue\n<eos>"


def test_a_base_model_learns_the_end_that_its_template_writes(
    language_model: LanguageModel,
) -> None:
    """And stops at the end of texts that it knows as well."""
    chat, tokenizer = with_template(language_model, CHATML, 1)
    assert chat.stop_ids == (end_of(language_model), 1)
    assert tokenizer.decode(chat.response("q", "blue")) == "blue<|im_end|>"


def test_a_template_that_shows_finished_turns_otherwise_gives_the_bare_message(
    language_model: LanguageModel,
) -> None:
    end = language_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat, tokenizer = with_template(language_model, THINKING, end)
    assert tokenizer.decode(chat.prompt("q")) == "<|im_start|>q<|im_end|><|im_start|>think"
    assert tokenizer.decode(chat.response("q", "blue")) == "blue<|im_end|>"


def test_without_a_template_the_tokenizers_own_bos_opens_the_prompt(
    language_model: LanguageModel,
) -> None:
    chat, tokenizer = with_template(language_model, None)
    prompt, response = chat.prompt("name a colour:"), chat.response("name a colour:", " blue")
    assert prompt == tokenizer("name a colour:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(response) == " blue<eos>"
    assert chat.decode(response) == " blue"


def test_without_a_template_and_without_bos_the_prompt_is_the_text(
    language_model: LanguageModel,
) -> None:
    language_model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    chat, tokenizer = with_template(language_model, None)
    assert tokenizer.decode(chat.prompt("name a colour:")) == "name a colour:"


def test_a_prompt_without_tokens_is_refused(language_model: LanguageModel) -> None:
    """As that of an empty chat_template.jinja; nothing would predict the first token."""
    language_model.tokenizer.chat_template = ""
    with pytest.raises(ConfigError, match="no tokens: the chat template writes none"):
        chat_of(language_model).prompt("q")


def test_a_stop_token_that_is_an_ordinary_token_is_left_out_of_the_text(
    language_model: LanguageModel,
) -> None:
    newline = language_model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(newline) == 1
    chat, _ = with_template(language_model, None, newline[0])
    response = chat.response("name a colour:", " blue\nred")
    assert response[-1] == newline[0]
    assert chat.decode(response) == " blue"


def test_encodings_are_remembered(language_model: LanguageModel) -> None:
    chat, tokenizer = with_template(language_model, CHATML)
    first = (chat.prompt("q"), chat.response("q", "blue"))
    chat = replace_tokenizer_by_none(chat)
    assert (chat.prompt("q"), chat.response("q", "blue")) == first
    assert replace(language_model, tokenizer=tokenizer).tokenizer is tokenizer


def replace_tokenizer_by_none(chat: Chat) -> Chat:
    chat.tokenizer = None
    return chat


# As Qwen3's template lays it out: the last turn shows its thoughts, and where thinking is off the
# prompt ends with an empty block.
QWEN3 = (
    "{%- for m in messages %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# The prompt opens the block, and a finished turn drops it.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m['content'].split('</think>')[-1] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "{{ '<think>\n' if enable_thinking else '</think>' }}{% endif %}"
)


def end_of(language_model: LanguageModel) -> int:
    return int(language_model.tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_the_tiny_template_thinks_as_qwen3_does(language_model: LanguageModel) -> None:
    tokenizer = character_tokenizer([], thinking=True)
    chat = new_chat(replace(language_model, tokenizer=tokenizer))
    chat.stop_ids = (tokenizer.eos_token_id,)

    def tokens(ids: list[int]) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(ids))

    opened = ["<|user|>", *"a 4-1", "<|assistant|>"]
    assert tokens(chat.prompt("a 4-1")) == tokens(chat.prompt("a 4-1", "think")) == opened
    assert tokens(chat.prompt("a 4-1", "no_think")) == [*opened, "<think>", "</think>"]
    response = chat.response("a 4-1", "<think>4-1=3</think>3", "think")
    assert tokens(response) == ["<think>", *"4-1=3", "</think>", "3", "<|end|>"]
    assert chat.decode(response) == "<think>4-1=3</think>3"
    assert tokens(chat.response("a 4-1", "3", "no_think")) == ["3", "<|end|>"]


def test_a_template_in_the_style_of_qwen3(language_model: LanguageModel) -> None:
    chat, tokenizer = with_template(language_model, QWEN3, end_of(language_model))
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat.prompt("q", "think")) == head
    assert tokenizer.decode(chat.prompt("q", "no_think")) == head + "<think>\n\n</think>\n\n"
    thinking = chat.response("q", "<think>hm</think>blue", "think")
    assert tokenizer.decode(thinking) == "<think>\nhm\n</think>\n\nblue<|im_end|>"
    assert tokenizer.decode(chat.response("q", "blue", "no_think")) == "blue<|im_end|>"
    # One text in two modes is two responses, also when it is remembered.
    assert chat.response("q", "blue", "think") != chat.response("q", "blue", "no_think")


def test_a_template_that_opens_the_block_itself_and_drops_it_later(
    language_model: LanguageModel,
) -> None:
    chat, tokenizer = with_template(language_model, OPENED, end_of(language_model))
    assert tokenizer.decode(chat.prompt("q", "think")).endswith("<|im_start|><think>\n")
    thinking = chat.response("q", "<think>hm</think>blue", "think")
    assert tokenizer.decode(thinking) == "hm</think>blue<|im_end|>"
    assert chat.decode(thinking) == "hm</think>blue"
    assert tokenizer.decode(chat.response("q", "blue", "no_think")) == "blue<|im_end|>"


def test_tags_that_are_special_tokens_stay_in_the_text(language_model: LanguageModel) -> None:
    language_model.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<|im_start|>", "<|im_end|>"]}
    )
    chat, _ = with_template(language_model, OPENED, end_of(language_model))
    ids = chat.response("q", "<think>hm</think>blue", "think")
    assert chat.decode([*ids[:-1], language_model.tokenizer.bos_token_id, ids[-1]]) == (
        "hm</think>blue"
    )


@pytest.mark.parametrize(
    ("template", "mode", "message"),
    [
        (CHATML, "think", "template does not read enable_thinking; take a model that thinks"),
        (None, "no_think", "tokenizer has no chat template"),
        (QWEN3, "fast", "mode = 'fast' is not a mode; choices: think, no_think"),
    ],
)
def test_a_mode_that_the_template_does_not_know_is_an_error(
    language_model: LanguageModel, template: str | None, mode: str, message: str
) -> None:
    chat, _ = with_template(language_model, template, end_of(language_model))
    with pytest.raises(ConfigError, match=message):
        chat.prompt("q", mode)
    with pytest.raises(ConfigError, match=message):
        chat.response("q", "blue", mode)
