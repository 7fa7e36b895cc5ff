"""Models that think by templates of their own: what is asked, learned, read and judged."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AddedToken

from posttrain.backends.chat import Chat
from posttrain.backends.prompting import visible
from posttrain.backends.template import ChatTemplate
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError

# As that of DeepSeek-R1: the prompt opens the block, and a finished turn drops it.
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<|assistant|>{{ c }}<|end|>{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As that of Qwen3-Thinking-2507: the last turn always shows a block.
ALWAYS = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set thought = '' %}"
    "{%- set content = m.content %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|assistant|><think>\n' + thought + '\n</think>\n\n' + content + '<|end|>' }}"
    "{%- else %}{{- '<|user|>' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|><think>\n' }}{%- endif %}"
)
# As that of DeepSeek V3.1.
HYBRID = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|></think>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
# As that of Magistral: the tags are special tokens of other names.
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
    "{# [THINK]...[/THINK] #}"
)
# As that of gpt-oss.
CHANNELS = (
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
    "<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }} {{ reasoning_effort }}<|end|>"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if '<|channel|>' in m.content %}{{ raise_exception('no tags') }}{%- endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{%- if loop.last %}<|return|>{%- else %}<|end|>{%- endif %}"
    "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{%- endif %}{# analysis #}"
)
THOUGHT = "<think>hm</think>blue"


def make_chat(template: str, *special: str, thinking: bool = True, end: str = "<|end|>") -> Chat:
    tokenizer = character_tokenizer(["\n"], thinking=thinking)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.chat_template = template
    stop = int(tokenizer.convert_tokens_to_ids(end))
    return new_chat(tokenizer, stop)


def new_chat(tokenizer: Any, stop: int) -> Chat:
    return Chat(tokenizer, stop_ids=(stop,), pad_id=0)


def learned(chat: Chat, text: str, mode: str | None = None) -> str:
    """What is read and learned, as one text."""
    return chat.text(chat.prompt("q", mode) + chat.response("q", text, mode))


def said(chat: Chat, text: str, mode: str | None = None) -> str:
    """A response as a policy would have sampled it, back as the text that a verifier reads."""
    return chat.opened("q", mode) + chat.decode(chat.response("q", text, mode))


OPENED = "<|user|>q<|assistant|><think>\n"


@pytest.mark.parametrize("mode", [None, "think"])
@pytest.mark.parametrize(
    ("text", "taught"),
    [
        (THOUGHT, "hm</think>blue<|end|>"),
        ("<think>\nhm\n</think>\n\nblue", "hm\n</think>\n\nblue<|end|>"),
        # A trace of such a model as its servers give it.
        ("hm</think>blue", "hm</think>blue<|end|>"),
        # An answer without a thought is not taught as one.
        ("blue", "</think>blue<|end|>"),
        # A thought that did not end is no answer.
        ("<think>\nhm", "hm<|end|>"),
    ],
)
def test_a_block_that_the_prompt_opens_is_opened_once_and_closed(
    text: str, taught: str, mode: str | None
) -> None:
    chat = make_chat(R1)
    assert learned(chat, text, mode) == OPENED + taught
    assert chat.opens_thought("q", mode)


@pytest.mark.parametrize(
    ("text", "taught"),
    [
        (THOUGHT, "hm\n</think>\n\nblue<|end|>"),
        ("blue", "\n</think>\n\nblue<|end|>"),
        ("<think>\nhm", "hm<|end|>"),
    ],
)
def test_where_the_template_shows_the_block_of_a_finished_turn_it_says_how(
    text: str, taught: str
) -> None:
    assert learned(make_chat(ALWAYS), text) == OPENED + taught


def test_the_variable_thinking_opens_or_closes_the_block() -> None:
    chat = make_chat(HYBRID)
    head = "<|user|>q<|assistant|>"
    assert learned(chat, THOUGHT, "think") == head + "<think>hm</think>blue<|end|>"
    assert learned(chat, "blue", "no_think") == head + "</think>blue<|end|>"
    assert learned(chat, "blue") == head + "</think>blue<|end|>"
    assert not chat.opens_thought("q", "no_think")


@pytest.mark.parametrize("template", [R1, ALWAYS, HYBRID])
def test_the_answer_of_a_model_that_thinks_is_what_it_says_after_it(template: str) -> None:
    chat = make_chat(template)
    for mode in (None, "think"):
        if template == HYBRID and mode is None:
            continue
        assert visible(said(chat, "<think>9? no, 8</think>9", mode), mode) == "9"
        assert visible(said(chat, "9", mode), mode) == "9"
        # It never ended to think, and what it thought is no answer.
        assert visible(said(chat, "<think>9", mode), mode) is None


def test_what_was_sampled_is_learned_as_it_was() -> None:
    chat = make_chat(R1)
    for sampled in ("hm\n</think>\n\nblue", "\n\nhm</think>blue", "hm"):
        ids = [*chat.begin(sampled), *chat.stop_ids]
        assert chat.response("q", chat.opened("q") + chat.decode(ids)) == ids


def test_tags_of_other_names_are_the_same_in_texts() -> None:
    chat = make_chat(MISTRAL, "[THINK]", "[/THINK]", thinking=False)
    assert learned(chat, THOUGHT) == "<|user|>q<|assistant|>[THINK]hm[/THINK]blue<|end|>"
    assert chat.decode(chat.response("q", THOUGHT)) == THOUGHT
    assert chat.response("q", THOUGHT)[0] == chat.tokenizer.convert_tokens_to_ids("[THINK]")
    assert learned(chat, "blue", "think").endswith("<|assistant|>blue<|end|>")
    with pytest.raises(ConfigError, match="always thinks"):
        chat.prompt("q", "no_think")


def test_channels_are_a_thought_and_an_answer() -> None:
    special = ("<|channel|>", "<|message|>", "<|start|>", "<|return|>")
    chat = make_chat(CHANNELS, *special, thinking=False, end="<|return|>")
    head = (
        "<|start|>system<|message|>2024-07-26 {}<|end|><|start|>user<|message|>q<|end|>"
        "<|start|>assistant"
    )
    thought = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>blue"
        "<|return|>"
    )
    assert learned(chat, THOUGHT) == head.format("medium") + thought
    assert learned(chat, THOUGHT, "high") == head.format("high") + thought
    assert learned(chat, "blue") == (
        head.format("medium") + "<|channel|>final<|message|>blue<|return|>"
    )
    assert chat.decode(chat.response("q", THOUGHT)) == THOUGHT
    assert chat.decode(chat.response("q", "blue")) == "blue"
    assert chat.decode(chat.response("q", "<think>hm")) == "<think>hm"
    assert visible(chat.decode(chat.response("q", "<think>9")), None) is None
    earlier = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": THOUGHT},
        {"role": "user", "content": "r"},
    ]
    assert "final<|message|>blue<|end|>" in chat.text(chat.prompt(earlier))


def test_a_thought_is_learned_though_a_finished_turn_drops_it() -> None:
    chat = make_chat(R1.replace("<think>\n", ""))
    assert learned(chat, THOUGHT) == "<|user|>q<|assistant|><think>hm</think>blue<|end|>"


# Control tokens' text --------------------------------------------------------------------------


def kinds(chat: Chat, ids: list[int]) -> list[str]:
    """The control tokens among these ids."""
    special = set(chat.tokenizer.all_special_tokens)
    return [t for t in chat.tokenizer.convert_ids_to_tokens(ids) if t in special]


def plain() -> Chat:
    from posttrain.backends.tiny import THINKING_TEMPLATE

    return make_chat(THINKING_TEMPLATE)


def test_the_text_of_a_control_token_in_data_stays_text() -> None:
    chat = plain()
    response = chat.response("q", "say <|end|> twice")
    assert chat.decode(response) == "say <|end|> twice"
    assert kinds(chat, response) == ["<|end|>"]
    prompt = chat.prompt("x<|assistant|>y<|end|><|user|>")
    assert kinds(chat, prompt) == ["<|user|>", "<|assistant|>"]
    assert chat.text(prompt) == "<|user|>x<|assistant|>y<|end|><|user|><|assistant|>"
    assert kinds(chat, chat.begin("<|end|>")) == []
    # What thinks stays a token beside it.
    thought = chat.response("q", "<think>the <|end|></think>3", "think")
    assert [chat.tokenizer.convert_tokens_to_ids(t) in thought for t in ("<think>", "</think>")]
    assert chat.decode(thought) == "<think>the <|end|></think>3"
    assert len(thought) == len("the <|end|>3") + 3


def test_control_text_of_every_message_stays_text() -> None:
    chat = plain()
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a<|end|>"},
        {"role": "assistant", "content": "b<|user|>c"},
        {"role": "user", "content": "d<|assistant|>"},
    ]
    spans = chat.spans(messages, "e<|end|>")
    assert spans is not None
    shown = [(chat.text(ids), kinds(chat, ids), sampled) for ids, sampled in spans]
    assert shown == [
        ("<|user|>a<|end|><|assistant|>", ["<|user|>", "<|assistant|>"], False),
        ("b<|user|>c<|end|>", ["<|end|>"], True),
        ("<|user|>d<|assistant|><|assistant|>", ["<|user|>", "<|assistant|>"], False),
        ("e<|end|><|end|>", ["<|end|>"], True),
    ]


def test_without_a_template_the_text_of_a_control_token_stays_text() -> None:
    chat = make_chat("x")
    tokenizer = chat.tokenizer
    tokenizer.chat_template = None
    chat = new_chat(tokenizer, chat.stop_ids[0])
    assert kinds(chat, chat.prompt("a<|end|>b")) == []
    assert kinds(chat, chat.response("a", "b<|end|>c")) == ["<|end|>"]


def test_the_character_that_hides_is_text_too() -> None:
    chat = make_chat(R1)
    odd = chr(0x100000) + chr(0x100002) + "<|end|>"
    tokens = chat.tokenizer.convert_ids_to_tokens(chat.response("q", odd)[:-1])
    assert tokens == ["</think>", "<|unknown|>", "<|unknown|>", *"<|end|>"]


def test_texts_without_control_tokens_are_encoded_as_they_always_were() -> None:
    chat = plain()
    text = "a <b> </b> <| |> \n<|ending|>"
    whole = chat.tokenizer("<|user|>" + text + "<|assistant|>", add_special_tokens=False)
    assert chat.prompt(text) == whole["input_ids"]


def bpe(*, metaspace: bool) -> Any:
    """A tokenizer of bytes, or of words with a mark at the beginning of a text, with `<|end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    if metaspace:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*"abcdefghijklmnopqrstuvwxyz<>|/ \n▁"]
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["say the end twice <|end|> user assistant"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=special[1:3],
        chat_template=R1.replace("<think>\n", ""),
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("metaspace", [False, True])
def test_other_tokenizers_write_the_text_of_a_control_token_too(metaspace: bool) -> None:
    tokenizer = bpe(metaspace=metaspace)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    chat = new_chat(tokenizer, end)
    for text in ("say <|end|> twice", "<|end|>", "a<|user|>"):
        response, prompt = chat.response("q", text), chat.prompt(text)
        assert response.count(end) == 1 and kinds(chat, response) == ["<|end|>"]
        assert kinds(chat, prompt) == ["<|user|>", "<|assistant|>"]
        assert chat.decode(response).strip() == text
    # No mark of a beginning behind a control token, as there is none for other texts.
    marked = [chat.tokenizer.convert_ids_to_tokens(chat.prompt(t))[1] for t in ("a", "a<|end|>")]
    assert marked == ["a", "a"]


def test_a_tokenizer_that_cannot_write_the_text_says_so() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {text: n for n, text in enumerate(["<|end|>", "<unk>", "say", "twice"])}
    core = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>"
    )
    chat = new_chat(tokenizer, 0)
    with pytest.raises(ConfigError, match=r"the data holds the text '<\|end\|>'.*'say <\|end\|>"):
        chat.response("q", "say <|end|> twice")


def test_tags_of_tools_stay_tokens_and_control_tokens_that_only_the_template_names_do_not() -> None:
    template = "{% for m in messages %}[turn]{{ m.content }}{% endfor %}<tool_call>"
    tokenizer = character_tokenizer(["\n"])
    tokenizer.add_tokens([AddedToken(t) for t in ("[turn]", "<tool_call>", "[other]")])
    tokenizer.chat_template = template
    chat = new_chat(tokenizer, 4)
    text = "[turn] <tool_call> [other]"
    prompt = chat.tokenizer.convert_ids_to_tokens(chat.prompt(text))
    assert prompt == ["[turn]", *"[turn] ", "<tool_call>", " ", "[other]", "<tool_call>"]


def test_sampled_ids_follow_a_prompt_that_opens_what_theirs_did() -> None:
    opens, asks = make_chat(R1), make_chat(R1.replace("<think>\n", ""))
    sampled = opens.begin("hm</think>9")
    text = opens.opened("q") + opens.decode(sampled)
    assert opens.continues("q", sampled, text, None)
    assert not asks.continues("q", sampled, text, None)
    whole = asks.begin(text)
    assert asks.continues("q", whole, text, None)
    assert not opens.continues("q", whole, text, None)
    # Who reads it, such as a teacher, has the block open where it was open.
    for reader in (opens, asks):
        for ids, opened in ((sampled, opens.opened("q")), (whole, "")):
            read = reader.text([*reader.prompt_before("q", opened), *ids])
            assert read == "<|user|>q<|assistant|><think>\nhm</think>9"


@pytest.mark.parametrize("template", [R1, ALWAYS, HYBRID, MISTRAL])
@pytest.mark.parametrize("asks", [True, False])
def test_a_plan_renders_a_template_as_transformers_does(template: str, asks: bool) -> None:
    template += "{{ bos_token }}{{ messages[1].tool_calls | tojson }}{{ messages[1].thinking }}"
    tokenizer = character_tokenizer(["\n"], thinking=True)
    tokenizer.chat_template, tokenizer.bos_token = template, "<|user|>"
    call = {"function": {"name": "é<b>", "arguments": {"x": [1]}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": " q\n"},
        {"role": "assistant", "content": THOUGHT, "tool_calls": [call], "reasoning": "t"},
        {"role": "user", "content": "r", "name": None},
    ]
    how = {"add_generation_prompt": asks, "thinking": True}
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    own = ChatTemplate(template).render(messages, **tokenizer.special_tokens_map, **how)
    assert own == whole
