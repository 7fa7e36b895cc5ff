"""What ends a turn, for the families of templates that people have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from posttrain.backends.template import finished_renderer
from posttrain.backends.turn_end import TurnEnd, turn_end

ADDED = {"<|endoftext|>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<|user|>": 4, "</s>": 5}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The end of a text after the assistant alone.
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Nothing ends a turn but the next one's beginning.
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# One token ends the last message, another one those in the history.
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
GPT_OSS_ADDED = {"<|return|>": 12, "<|end|>": 13, "<|start|>": 14, "<|message|>": 15}


def decide(
    template: str | None,
    *,
    generation: Any = None,
    config: Any = None,
    eos: str | None = None,
    added: dict[str, int] = ADDED,
) -> TurnEnd:
    special = {} if eos is None else {"eos_token": eos}
    return turn_end(
        eos=None if eos is None else added[eos],
        generation=generation,
        config=config,
        added=added,
        usable=lambda token: 0 <= token < 20,
        render=None if template is None else finished_renderer(template, special),
    )


@pytest.mark.parametrize(
    ("template", "facts", "ids"),
    [
        # An instruct model: all agree, and the template's end is the first.
        (CHATML, {"generation": [3, 1], "config": 3, "eos": "<|im_end|>"}, (3, 1)),
        (CHATML, {"generation": [1, 3], "config": 3, "eos": "<|im_end|>"}, (3, 1)),
        # A base model with the template of its family: it learns to end a turn.
        (CHATML, {"generation": 1, "config": 1, "eos": "<|endoftext|>"}, (3, 1)),
        # A generation config that is older than the template.
        (CHATML, {"generation": 0, "eos": "<|im_end|>"}, (3, 0)),
        (LLAMA_2, {"generation": 5, "config": 5, "eos": "</s>"}, (5,)),
        (GLM, {"generation": [1, 4], "config": [1, 4], "eos": "<|endoftext|>"}, (4, 1)),
        # The beginning of a message that nobody declared to be an end is none.
        (GLM, {"generation": 1, "eos": "<|endoftext|>"}, (1,)),
        (PLAIN, {"generation": 1, "eos": "<|endoftext|>"}, (1,)),
        (PLAIN, {"config": 1}, (1,)),
        (None, {"generation": 1, "eos": "</s>"}, (1, 5)),
        # Defaults of a config beside a generation config: id 9 is an ordinary token.
        (None, {"generation": 1, "config": 9}, (1,)),
        (None, {"config": 9}, (9,)),
        # Ids that the model lacks.
        (None, {"generation": [1, 77]}, (1,)),
        # No template at all, and one that takes no such conversation.
        ("{{ bad syntax", {"generation": 1}, (1,)),
        ("{{ raise_exception('no') }}", {"generation": 1}, (1,)),
        ("{% generation %}{{ messages[1].content }}</s>{% endgeneration %}", {}, (5,)),
        (PLAIN, {}, ()),
        (None, {"generation": 77}, ()),
    ],
)
def test_what_ends_a_turn(
    template: str | None, facts: dict[str, Any], ids: tuple[int, ...]
) -> None:
    assert decide(template, **facts).ids == ids


def test_of_gpt_oss_the_end_of_the_last_message_is_learned() -> None:
    added = {"<|endoftext|>": 11, "<|call|>": 16, **GPT_OSS_ADDED}
    facts: dict[str, Any] = {"generation": [12, 11, 16], "eos": "<|return|>", "added": added}
    assert decide(GPT_OSS, **facts).ids == (12, 11, 16)


def test_it_says_where_each_is_from_and_what_was_decided() -> None:
    end = decide(CHATML, generation=1, config=1, eos="<|endoftext|>")
    assert end.sources == {
        3: ("the chat template",),
        1: ("generation_config.json", "config.json", "the tokenizer"),
    }
    assert end.warnings == (
        "a turn's end: generation_config.json does not name <|im_end|> (3), which ends it by the "
        "chat template; responses learn to end with <|im_end|> (3), and stop at <|endoftext|> (1), "
        "too",
    )
    assert decide(CHATML, generation=[1, 3], eos="<|im_end|>").warnings == ()
    assert decide(CHATML, eos="<|im_end|>").warnings == ()


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, posttrain.backends.turn_end, posttrain.backends.vocabulary\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
