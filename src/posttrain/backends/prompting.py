"""How a problem is asked and what its response looks like: by messages, in a mode, with a hint.

A problem row is asked by its "prompt", one user message, unless it has "messages": a conversation
up to the response, which the model is shown instead (`asked`). Its "prompt" is then what people,
judges and verifiers read.

A problem row may have a "mode": "think" asks for `<think>steps</think>answer`, "no_think" for the
answer alone; "low", "medium" and "high" think, with so much effort. Without one, the response is
whatever the demonstrations say (see `demo`).

A text that thinks has `<think>steps</think>` in it, whatever marks its model has for that, and also
where the prompt has opened the block (`Chat.opened`): so every text tells by itself which part is
the answer (`visible`).

A hint is a template such as "{prompt} Hint: the answer is {answer}." with the fields of a problem
row. In `distill` a teacher reads the student's response after the hinted prompt, while the student
saw the plain one: a model with a hint can teach the same model without it (Composer 2.5;
on-policy context distillation).
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from posttrain.engine.errors import ConfigError

Mode = Literal["think", "no_think", "low", "medium", "high"]
EFFORTS: tuple[Mode, ...] = ("low", "medium", "high")
"""Modes that think, with so much effort."""
MODES: tuple[Mode, ...] = ("think", "no_think", *EFFORTS)
THINKING: tuple[Mode, ...] = ("think", *EFFORTS)
OPEN, CLOSE = "<think>", "</think>"

HINT = 'a hint is a template of the prompt, such as "{prompt} Hint: {answer}"'

Problem = dict[str, Any]
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, and what else a chat template reads of it."""
FIRST = ("system", "developer")
"""Roles of a message that tells the model how to behave, which stands first."""
Asked = str | Sequence[Message]
"""What a model is shown: the text of one user message, or a conversation up to its response."""


def asked(row: Mapping[str, Any]) -> Asked:
    """What a model is shown of a row: its messages where it has them, else its prompt."""
    messages: Sequence[Message] | None = row.get("messages")
    return row["prompt"] if messages is None else messages


def asked_key(shown: Asked) -> Any:
    """What is asked as a key of a dict: the text, or the messages in a form that can be hashed."""
    # A tuple, so that no text is taken for a conversation.
    return shown if isinstance(shown, str) else (json.dumps(shown, sort_keys=True, default=str),)


def last_user_text(row: Mapping[str, Any]) -> str:
    """What the user said last; of a conversation without a user, the prompt."""
    texts = [m["content"] for m in row.get("messages") or () if m["role"] == "user"]
    return str(texts[-1]) if texts and texts[-1] is not None else str(row["prompt"])


def with_user_text(row: Mapping[str, Any], text: str) -> Problem:
    """The row with another last user message; without any, one comes after all others."""
    messages = row.get("messages")
    if messages is None:
        return dict(row) | {"prompt": text}
    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    changed = list(messages)
    if places:
        changed[places[-1]] = dict(changed[places[-1]]) | {"content": text}
    else:
        changed.append({"role": "user", "content": text})
    return dict(row) | {"messages": changed, "prompt": readable(changed)}


def readable(messages: Sequence[Message]) -> str:
    """The conversation as a text for people: of a single message its text, of several paragraphs
    `role: content`. The system message is left out."""
    told = [message for message in messages if message["role"] not in FIRST]
    if len(told) == 1:
        return said(told[0])
    return "\n\n".join(f"{message['role']}: {said(message)}" for message in told)


def said(message: Message) -> str:
    """The text of a message; of one that calls tools the calls as well."""
    calls = message.get("tool_calls")
    parts = [message.get("content") or "", json.dumps(calls, ensure_ascii=False) if calls else ""]
    return " ".join(part for part in parts if part)


def shown_text(row: Mapping[str, Any]) -> str:
    """All that a model is shown of a row as one text, to be compared with that of other rows."""
    shown = asked(row)
    if isinstance(shown, str):
        return shown
    parts = []
    for message in shown:
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        more = f" {json.dumps(rest, sort_keys=True, ensure_ascii=False)}" if rest else ""
        parts.append(f"{message['role']}: {message.get('content') or ''}{more}")
    return "\n\n".join(parts)


def learned_part(row: Mapping[str, Any]) -> tuple[Asked, str] | None:
    """What a model is shown, and the response that it learns after it: the demonstration. Of a
    conversation that ends with somebody else, what the assistant said last. None without either.
    """
    if row.get("demo") is not None:
        return asked(row), row["demo"]
    # In a mode the demonstration is one of that mode, which an earlier turn need not be.
    messages = (row.get("messages") or ()) if row.get("mode") is None else ()
    for place in range(len(messages) - 1, 0, -1):
        content = messages[place].get("content")
        if messages[place]["role"] == "assistant" and isinstance(content, str) and content:
            return messages[:place], content
    return None


def learned_rows(rows: Iterable[Problem]) -> list[Problem]:
    """Every demonstration as a row of its own: `demo`, and each of the further ones in `demos`.

    The rows of one problem follow each other and keep its id.
    """
    found: list[Problem] = []
    for row in rows:
        demos = row.get("demos")
        if demos is None:
            found.append(row)
            continue
        one = {name: value for name, value in row.items() if name != "demos"}
        found += [one, *(one | {"demo": demo} for demo in demos)]
    return found


def check_mode(mode: object, *, where: str) -> Mode:
    """Returns the mode. Raises ConfigError for anything but one of `MODES`."""
    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f"{where}: mode = {mode!r} is not a mode; choices: {', '.join(MODES)}")


def visible(response: str, mode: str | None) -> str | None:
    """What a verifier judges of a response: the answer. None where there is none, in its mode.

    Modes that think: what follows the last `</think>`; without one there is no answer yet.
    no_think: the response, unless it thinks all the same. Without a mode a response that thinks is
    judged as one of think, and any other as it is.
    """
    closed = CLOSE in response
    if mode == "no_think" and (closed or OPEN in response):
        return None
    if mode in THINKING or closed or (mode is None and response.lstrip().startswith(OPEN)):
        return response.rpartition(CLOSE)[2].lstrip() if closed else None
    return response


def format_answer(answer: str, mode: str | None) -> str:
    """A response that gives the answer without any thought, in the form of its mode."""
    return f"{OPEN}{CLOSE}{answer}" if mode in THINKING else answer


def demonstration(problem: Mapping[str, Any], mode: str | None = None) -> str | None:
    """The demonstration of a problem in a mode; None where the row has none.

    Modes that think: `<think>thought</think>direct`; no_think: `direct`; no mode: `demo`. `direct`
    (the answer without its steps) is `demo` where the row has none of its own.
    """
    if mode is None:
        demo: str | None = problem.get("demo")
        return demo
    answer: str | None = problem.get("direct", problem.get("demo"))
    if mode == "no_think" or answer is None:
        return answer
    thought = problem.get("thought")
    return None if thought is None else f"{OPEN}{thought}{CLOSE}{answer}"


def in_modes(problems: Sequence[Problem], modes: Iterable[str]) -> list[Problem]:
    """Every problem once in each mode, with its demonstration in that mode; no mode: as they are.

    The rows of one problem follow each other and keep its id. Further demonstrations (`demos`) are
    such of a mode only where `demo` itself is: not with a column for the thought or for the answer
    alone.
    """
    modes = tuple(modes)
    if not modes:
        return list(problems)
    return [_in_mode(problem, mode) for problem in problems for mode in modes]


def _in_mode(problem: Problem, mode: str) -> Problem:
    demo = demonstration(problem, mode)
    found = problem | {"mode": mode, "demo": demo}
    if demo is None or demo != problem.get("demo"):
        found.pop("demos", None)
    return found


def check_hint(template: str) -> str:
    """Returns the template. Raises ValueError unless it is text with plain {fields} of a row."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; {HINT}; write {{{{ for a brace") from None
    fields = [
        (field, form, conversion) for _, field, form, conversion in parts if field is not None
    ]
    for field, form, conversion in fields:
        if not field.isidentifier() or form or conversion:
            raise ValueError(f"{template!r}: {{{field}}} is no plain name of a field; {HINT}")
    if not fields:
        raise ValueError(f"{template!r} names no field, so all prompts would be alike; {HINT}")
    return template


def hinted(problem: Mapping[str, Any], template: str, *, where: str) -> Problem:
    """The row with the hinted text in place of its prompt, or of the last user message of its
    messages, which is what {prompt} means. Raises ConfigError for a field that the row does not
    have."""
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and problem.get(field) is None:
            choices = ", ".join(name for name, value in problem.items() if value is not None)
            raise ConfigError(
                f"{where}: the hint {template!r} names {{{field}}}, which problem "
                f"{problem.get('id')!r} of domain {problem.get('domain')!r} does not have; its "
                f"fields: {choices}"
            )
    text = template.format_map(dict(problem) | {"prompt": last_user_text(problem)})
    return with_user_text(problem, text)


def also_hinted(
    problems: Mapping[str, Sequence[Problem]], template: str | None, *, where: str
) -> dict[str, list[Problem]]:
    """By domain every row twice, with its own prompt and with the hinted one; no hint: once."""

    def both(rows: Iterable[Problem]) -> list[Problem]:
        if template is None:
            return list(rows)
        return [shown for row in rows for shown in (row, hinted(row, template, where=where))]

    return {name: both(rows) for name, rows in problems.items()}
