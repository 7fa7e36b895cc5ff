"""What a plan says of a checkpoint's chat template: the clock, modes and conversations that it does
not take, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CLOCK = "{{ strftime_now('%d %b %Y') }}" + TURNS
R1 = TURNS + "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
EFFORT = "{{ reasoning_effort }}" + TURNS
# As those of Gemma 2 and 3, and of Mistral.
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ m['content'] | trim }}{% endfor %}"
)
RECIPE = """
from posttrain import Recipe

def recipe(r: Recipe, mode: str = ""):
    base = r.model("outside")
    kind = {"mode": mode} if mode else {}
    s = r.sft(start=base, data=r.DATA, steps=1)
    return r.sample(s, prompts=r.prompts("chats", **kind), num_prompts=2, k=1)
"""
SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "noon"}


@pytest.fixture
def planned(cli: Callable[..., Any], place: Path) -> Callable[..., Any]:
    """`planned(template, talk)`: the plan of a recipe on 40 rows like this and one that is plain,
    with a checkpoint that has this template."""

    def plan(
        template: str | None, talk: list[dict[str, Any]] | None = None, *sets: str, data: str = ""
    ) -> Any:
        outside = place / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "config.json").write_text('{"model_type": "llama", "eos_token_id": 1}')
        weights = weights_file({"model.norm.weight": ("F32", (2,))})
        (outside / "model.safetensors").write_bytes(weights)
        (outside / "tokenizer.json").write_text("{}")
        if template is not None:
            (outside / "chat_template.jinja").write_text(template)
        rows = []
        for number in range(40):
            asked = [dict(message) for message in talk or [USER]]
            place_of = next(i for i, message in enumerate(asked) if message["role"] == "user")
            asked[place_of]["content"] = f"q {number}"
            rows.append({"talk": [*asked, REPLY], "answer": "a"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "chats.jsonl").write_text(text)
        suite = '[domains.chats]\ntrain = "chats.jsonl"\nmessages = "talk"\nverifier = "exact"\n'
        (place / "suite.toml").write_text(suite)
        (place / "talk.py").write_text(RECIPE.replace("DATA", data or 'demos("chats")'))
        return cli("plan", "talk.py", "--suite", "suite.toml", "--json", *sets)

    return plan


def test_a_template_that_reads_the_clock_is_told_once_with_its_date(
    planned: Callable[..., Any],
) -> None:
    told = [warning["text"] for warning in planned(CLOCK).json["warnings"]]
    (one,) = [text for text in told if "the date" in text]
    assert "26 Jul 2024" in one and "strftime_now" in one
    assert not any("the date" in w["text"] for w in planned(TURNS).json["warnings"])


@pytest.mark.parametrize(
    ("template", "mode", "message"),
    [
        (TURNS, "think", "field 'modes': mode = 'think': the model's chat template does not read"),
        (R1, "no_think", "the model always thinks"),
        (R1, "high", "does not read reasoning_effort"),
        (None, "think", "has no chat template; leave mode= out"),
        (TURNS, "fast", "choices: think, no_think, low, medium, high"),
    ],
)
def test_a_mode_that_the_checkpoint_does_not_have_is_refused(
    planned: Callable[..., Any], template: str | None, mode: str, message: str
) -> None:
    found = planned(template, None, "--set", f"mode={mode}")
    assert found.code == 2
    assert message in found.err and "Traceback" not in found.err


@pytest.mark.parametrize(("template", "mode"), [(R1, "think"), (EFFORT, "low"), (EFFORT, "think")])
def test_a_mode_that_it_has_is_planned(
    planned: Callable[..., Any], template: str, mode: str
) -> None:
    assert planned(template, None, "--set", f"mode={mode}").code == 0


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (GEMMA, [SYSTEM, USER], "40 of the rows of 'chats' are conversations of system, user"),
        (GEMMA, [SYSTEM, USER], "does not take: System role not supported; give it the messages"),
        (GEMMA, [USER, CALLS, TOOL], "user, assistant with tool_calls, tool, which the chat"),
        (GEMMA, [USER, REPLY, USER, USER], "roles must alternate"),
        (None, [SYSTEM, USER], "has no chat template, which says how one is laid out"),
    ],
)
def test_conversations_that_the_template_does_not_take_are_refused(
    planned: Callable[..., Any], template: str | None, talk: Any, message: str
) -> None:
    found = planned(template, talk)
    assert found.code == 2
    assert message in found.err and "Traceback" not in found.err
    # Those behind a mix are read, too.
    mixed = planned(template, talk, data='mix({r.demos("chats"): 1.0})')
    assert mixed.code == 2 and message in mixed.err


@pytest.mark.parametrize(
    ("template", "talk"),
    [
        (GEMMA, [USER, REPLY, USER, REPLY, USER]),
        (TURNS, [SYSTEM, USER, CALLS, TOOL]),
        # It reads of the messages what a plan cannot make up.
        ("{{ messages[0].name.upper() }}" + TURNS, [SYSTEM, USER]),
        (None, None),
    ],
)
def test_conversations_that_it_takes_are_planned(
    planned: Callable[..., Any], template: str | None, talk: Any
) -> None:
    found = planned(template, talk)
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("clock()", "tool_calls = 'clock()'"),
        (["clock()"], "tool_calls, number 1, names no function"),
        ([CALL, {"type": "function", "function": {"arguments": {}}}], "tool_calls, number 2"),
        ([{"function": None}], "names no function"),
    ],
)
def test_tool_calls_of_another_form_are_refused_with_their_row(
    planned: Callable[..., Any], calls: Any, message: str
) -> None:
    found = planned(TURNS, [USER, {**CALLS, "tool_calls": calls}, TOOL])
    assert found.code == 2
    assert message in found.err and "line 1" in found.err, found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat_template.jinja: the model's chat template cannot be read (line 1"),
        ("{{ ['a'] | random }}", "draws at random"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_its_file(
    planned: Callable[..., Any], template: str, message: str
) -> None:
    found = planned(template)
    assert found.code == 2
    assert message in found.err and "Traceback" not in found.err
