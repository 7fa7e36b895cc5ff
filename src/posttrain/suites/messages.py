"""Conversations of a user's table, as lists of messages in the form of OpenAI's chat API.

    [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]           ShareGPT

Other keys of a message (tool_calls, name, tool_call_id) are passed through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from posttrain.backends.prompting import FIRST
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.suites.cells import is_missing, loaded_json, plain_value, shown, text_of

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
} | {role: role for role in ROLES}
"""What `from` may say, and the role that it means."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation, parted into what the model is shown and what it is to say."""

    asked: list[Message]
    """The messages up to, not including, the response."""
    demo: str | None
    """The text of the last message where it is the assistant's; None where it says nothing."""
    ends_with_user: bool
    """Whether the last message is not the assistant's: there is nothing to learn at the end."""


def looks_like_messages(value: Any) -> bool:
    """Whether a value is a list of messages, of whatever form."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value)
    )


def conversations_in(record: Mapping[str, Any]) -> str | None:
    """The first column of a row that holds messages, or the JSON text of some."""
    found = (key for key, value in record.items() if looks_like_messages(from_cell(value)))
    return next(found, None)


def from_cell(value: Any) -> Any:
    """The messages of which a cell of CSV holds the JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = loaded_json(value, hint="")
    except ConfigError:
        return value
    return found if looks_like_messages(found) else value


def read_messages(value: Any) -> list[Message]:
    """The messages of a cell: a list, or its JSON text.

    Raises ConfigError that names the number of the message, and where the user says nothing.
    """
    messages = message_list(value)
    asked = (m["content"] for m in messages if m["role"] == "user")
    if not any((content or "").strip() for content in asked):
        raise ConfigError("the user says nothing; a conversation needs a message of the user's")
    return messages


def message_list(value: Any) -> list[Message]:
    """As `read_messages`, for a part of a conversation, such as a response."""
    if isinstance(value, str):
        value = loaded_json(value, hint='a list of {"role": ..., "content": ...}')
    if is_missing(value):
        raise ConfigError("holds no messages")
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"holds {shown(value)}; it has to be a list of messages, "
            '{"role": ..., "content": ...} or {"from": ..., "value": ...}'
        )
    messages = []
    for number, item in enumerate(value, start=1):
        try:
            messages.append(_message(item, number))
        except ConfigError as error:
            raise ConfigError(f"message {number}: {error}") from None
    return messages


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise ConfigError(
            f'a {type(item).__name__}; a message is an object {{"role": ..., "content": ...}}'
        )
    form = ("role", "content", ROLES) if "role" in item else ("from", "value", tuple(SHAREGPT))
    role_key, content_key, choices = form
    given = item.get(role_key)
    if given not in choices:
        raise ConfigError(f"{role_key} = {given!r} is no role; {choices_text(str(given), choices)}")
    role = SHAREGPT[given]
    if role in FIRST and number > 1:
        raise ConfigError(f"a {role} message stands first or not at all")
    rest = {
        key: value
        for key, value in item.items()
        # Columns of Parquet give every message every key that one of them has.
        if key not in (role_key, content_key) and not is_missing(value)
    }
    _check_calls(rest.get("tool_calls"))
    content = _content(item.get(content_key), content_key, bool(rest.get("tool_calls")))
    plain, unreadable = plain_value(rest)
    if unreadable:
        raise ConfigError(f"{', '.join(rest)}: a value has no JSON form")
    return {"role": role, "content": content, **plain}


def _check_calls(calls: Any) -> None:
    """Raises ConfigError for tool calls of another form than chat templates read."""
    form = '[{"function": {"name": "...", "arguments": {...}}}]'
    if calls is None:
        return
    if not isinstance(calls, list):
        raise ConfigError(f"tool_calls = {shown(calls)}; it has to be a list such as {form}")
    for number, call in enumerate(calls, start=1):
        called = call.get("function", call) if isinstance(call, Mapping) else None
        name = called.get("name") if isinstance(called, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"tool_calls, number {number}, names no function: {shown(call)}; it has to be a "
                f"list such as {form}"
            )


def _content(value: Any, key: str, calls: bool) -> str | None:
    if is_missing(value):
        if calls:
            return None
        raise ConfigError(f"it has no {key}, which only a message with tool_calls may lack")
    if isinstance(value, list):
        return "".join(_part(part, key) for part in value)
    try:
        return text_of(value)
    except ConfigError as error:
        raise ConfigError(f"its {key} {error}") from None


def _part(part: Any, key: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return text_of(part["text"])
    raise ConfigError(
        f"its {key} has a part of type {kind!r}; models here read text alone, so leave the row "
        "out or write the part as text"
    )


def conversation(messages: Sequence[Message]) -> Conversation:
    """The messages parted before the response."""
    last = messages[-1]
    if last["role"] != "assistant":
        return Conversation(asked=list(messages), demo=None, ends_with_user=True)
    demo = last["content"]
    said = demo if demo is not None and demo.strip() and not last.get("tool_calls") else None
    return Conversation(asked=list(messages[:-1]), demo=said, ends_with_user=False)


ASKED = "asked: "
"""What the names of facts begin with that say how often a shape of conversation occurs."""
MOST_SHAPES = 50
"""So many of them are remembered of a table."""
CALLS = "+tool_calls"


def shape_of(messages: Sequence[Message]) -> str:
    """Who speaks in a conversation, in order, such as "system user assistant+tool_calls tool". Of
    turns that repeat themselves one: a chat template takes all of them or none."""
    roles = (m["role"] + (CALLS if m.get("tool_calls") else "") for m in messages)
    return re.sub(r"\b(user assistant )(?:user assistant )+", r"\1", " ".join(roles))


def shape_facts(counts: Mapping[str, int]) -> dict[str, int]:
    """How many conversations have which shape, as facts of a table."""
    return {ASKED + shape: count for shape, count in Counter(counts).most_common(MOST_SHAPES)}


def fact_parts(known: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What is known of a table: "facts", which people read, and in "asked" shapes of conversations
    to their numbers, where there are any."""
    shapes = {n.removeprefix(ASKED): known[n] for n in known if n.startswith(ASKED)}
    facts = {name: known[name] for name in known if not name.startswith(ASKED)}
    return {"facts": facts} | ({"asked": shapes} if shapes else {})


def check_system(source: Any, where: str) -> None:
    """Raise ConfigError for a table with one system message for all rows and a column of them."""
    if source.system is not None and source.system_column is not None:
        raise ConfigError(
            f"{where}: system and system_column are both given; give one text for all rows, or the "
            "column of each row's own"
        )


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages behind the system's, unless they have their own."""
    if system is None or messages[0]["role"] in FIRST:
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether a conversation is one text of the user's and no more."""
    return len(messages) == 1 and set(messages[0]) == {"role", "content"}
