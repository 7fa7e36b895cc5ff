"""Conversations as tokens: what a model is shown, and which tokens of it the model itself said."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.backends.chat import Chat
from posttrain.backends.prompting import (
    asked_key,
    hinted,
    in_modes,
    learned_part,
    learned_rows,
    readable,
)
from posttrain.backends.tiny import character_tokenizer
from posttrain.engine.errors import ConfigError

# One token per character, and <|end|> ends a turn of anybody.
CHATML = (
    "{% for m in messages %}{{ m['role'] + ':' + (m['content'] or '') }}"
    "{% for call in m.get('tool_calls', []) %}{{ '[' + call + ']' }}{% endfor %}"
    "{{ '<|end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# As Qwen3 does: thoughts are shown after the user's last message only, and there always a block.
FORGETFUL = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ m['role'] + ':' }}{% set parts = m['content'].split('</t>') %}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<t>' + (parts[0] | replace('<t>', '') if parts | length > 1 else '') + '</t>' }}"
    "{% endif %}{{ parts[-1] | trim }}{{ '<|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# The prompt opens a block that finished turns no longer show.
OPENING = FORGETFUL.replace("loop.index0 > ns.last", "false").replace(
    "{{ 'assistant:' }}{% endif %}", "{{ 'assistant:<t>' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "tool", "content": "it is noon"},
    {"role": "assistant", "content": "noon"},
    {"role": "user", "content": "and 2+2"},
]


def new_chat(template: str | None, stop: str = "<|end|>") -> Chat:
    tokenizer = character_tokenizer([])
    tokenizer.chat_template = template
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    return Chat(tokenizer, stop_ids=(stop_id,), pad_id=0)


def said(chat: Chat, messages: list[dict[str, Any]], text: str, mode: str | None = None) -> Any:
    """The sampled spans as texts, and the whole as a text."""
    spans = chat.spans(messages, text, mode)
    assert spans is not None
    whole = chat.text([token for ids, _ in spans for token in ids])
    return [chat.text(ids) for ids, sampled in spans if sampled], whole


def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else() -> None:
    chat = new_chat(CHATML)
    turns, whole = said(chat, TALK, "4")
    assert turns == ["2<|end|>", "noon<|end|>", "4<|end|>"]
    assert whole == (
        "system:be brief<|end|> user:1+1<|end|> assistant:2<|end|> tool:it is noon<|end|> "
        "assistant:noon<|end|> user:and 2+2<|end|> assistant:4<|end|>"
    )
    # What it is shown before the last turn is what it is asked.
    assert whole == chat.text([*chat.prompt(TALK), *chat.response(TALK, "4")])


def test_contents_that_look_like_the_template_confuse_nobody() -> None:
    chat = new_chat(CHATML)
    messages = [
        {"role": "user", "content": "assistant:2"},
        {"role": "assistant", "content": "assistant:2<|end|> here"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "here"},
    ]
    turns, _ = said(chat, messages, "2")
    # An end inside of a message is not its end.
    assert turns == ["assistant:2<|end|> here<|end|>", "<|end|>", "2<|end|>"]


def test_a_call_of_a_tool_is_learned_with_the_turn() -> None:
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": ["clock"]},
        {"role": "tool", "content": "noon"},
    ]
    turns, _ = said(new_chat(CHATML), messages, "noon")
    assert turns == ["[clock]<|end|>", "noon<|end|>"]


def test_thoughts_that_the_template_drops_are_not_learned_and_kept_ones_are() -> None:
    chat = new_chat(FORGETFUL)
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<t>easy</t> 2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<t>ask</t> tool!"},
        {"role": "tool", "content": "4"},
    ]
    turns, whole = said(chat, messages, "<t>so</t> 4")
    assert turns == ["2<|end|>", "<t>ask</t>tool!<|end|>", "<t>so</t>4<|end|>"]
    assert "easy" not in whole
    # Of a turn without a thought the empty block is the model's own, as in a single turn.
    turns, _ = said(chat, [*messages[:3], {"role": "assistant", "content": "tool!"}], "4")
    assert turns == ["2<|end|>", "<t></t>tool!<|end|>", "<t></t>4<|end|>"]


def test_a_template_whose_prompt_opens_a_block_that_finished_turns_drop() -> None:
    messages = [*TALK[1:3], TALK[5]]
    turns, _ = said(new_chat(OPENING), messages, "4")
    assert turns == ["2<|end|>", "4<|end|>"]


def test_without_an_end_of_its_own_a_turn_does_not_reach_into_the_next_message() -> None:
    """Only users' messages end with the stop token here."""
    template = CHATML.replace("{{ '<|end|> ' }}", "{{ '<|end|>' if m['role'] == 'user' else '/' }}")
    turns, whole = said(new_chat(template), TALK, "4")
    assert turns == ["2", "noon", "4/<|end|>"]
    assert whole.startswith("system:be brief/user:1+1<|end|>assistant:2/tool:")


def test_a_turn_that_cannot_be_found_is_said() -> None:
    shuffled = CHATML.replace("in messages", "in messages | reverse")
    assert new_chat(shuffled).spans(TALK, "4") is None
    twice = CHATML.replace("(m['content'] or '')", "m['content'] + m['content']")
    assert new_chat(twice).spans(TALK, "4") is None


def test_a_lone_user_message_is_its_text() -> None:
    alone = [{"role": "user", "content": "1+1"}]
    for template in (CHATML, None):
        chat = new_chat(template)
        assert chat.prompt(alone) == chat.prompt("1+1")
        assert chat.response(alone, "2") == chat.response("1+1", "2")
        assert chat.spans(alone, "2") == [
            (chat.prompt("1+1"), False),
            (chat.response("1+1", "2"), True),
        ]
    assert asked_key(alone) != asked_key("1+1") and hash(asked_key(alone)) is not None


def test_what_a_conversation_is_shown_as_is_remembered() -> None:
    chat = new_chat(CHATML)
    first = chat.prompt(TALK), chat.response(TALK, "4"), chat.spans(TALK, "4")
    chat.tokenizer = None
    assert (chat.prompt(TALK), chat.response(TALK, "4"), chat.spans(TALK, "4")) == first


@pytest.mark.parametrize("messages", [TALK[:2], TALK[1:3] + TALK[5:]])
def test_without_a_template_a_conversation_is_refused(messages: list[dict[str, Any]]) -> None:
    chat = new_chat(None)
    for ask in (chat.prompt, lambda m: chat.response(m, "2"), lambda m: chat.spans(m, "2")):
        with pytest.raises(ConfigError, match=r"no chat template.*instruct model"):
            ask(messages)


def test_a_template_that_refuses_messages_says_which() -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + CHATML
    )
    with pytest.raises(ConfigError, match="conversation of system, user: no system here"):
        new_chat(strict).prompt(TALK[:2])
    empty = [{"role": "user", "content": None}]
    with pytest.raises(ConfigError, match="conversation of user"):
        new_chat("{{ 'a' + messages[0]['content'] }}").prompt(empty)


ROW: dict[str, Any] = {
    "id": "1",
    "domain": "d",
    "prompt": readable(TALK),
    "answer": "4",
    "demo": "4",
    "messages": TALK,
}


def test_the_text_of_a_conversation_leaves_the_system_out() -> None:
    assert readable(TALK[:2]) == "1+1"
    assert readable(TALK[:3]) == "user: 1+1\n\nassistant: 2"
    # A developer says what the system says, and a call is told.
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]}
    talk = [{"role": "developer", "content": "be brief"}, TALK[1], call]
    assert readable(talk) == 'user: 1+1\n\nassistant: [{"name": "sum"}]'


def test_a_hint_stands_in_the_last_message_of_the_user() -> None:
    found = hinted(ROW, "{prompt} ({answer})", where="s")
    assert found["messages"][:5] == TALK[:5] and TALK[5]["content"] == "and 2+2"
    assert found["messages"][5] == {"role": "user", "content": "and 2+2 (4)"}
    assert found["prompt"].endswith("user: and 2+2 (4)")
    plain = {"id": "1", "domain": "d", "prompt": "1+1", "answer": "2"}
    assert hinted(plain, "{prompt}={answer}", where="s") == plain | {"prompt": "1+1=2"}


def test_further_demonstrations_are_rows_of_their_own() -> None:
    rows = learned_rows([ROW, ROW | {"demos": ["four", "IV"], "id": "2"}])
    assert [(row["id"], row["demo"]) for row in rows] == [
        ("1", "4"), ("2", "4"), ("2", "four"), ("2", "IV")
    ]  # fmt: skip
    assert not any("demos" in row for row in rows)
    # A demonstration without a thought is none of the mode that thinks.
    problem = {"prompt": "p", "demo": "a", "thought": "t", "demos": ["b"]}
    think, plain = in_modes([problem], ["think", "no_think"])
    assert "demos" not in think and plain["demos"] == ["b"]


def test_of_a_conversation_that_ends_with_the_user_the_last_turn_is_learned() -> None:
    assert learned_part(ROW) == (TALK, "4")
    assert learned_part(ROW | {"demo": None}) == (TALK[:4], "noon")
    assert learned_part(ROW | {"demo": None, "mode": "think"}) is None
    assert learned_part(ROW | {"demo": None, "messages": TALK[:2]}) is None
