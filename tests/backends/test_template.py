"""What is told of a chat template from its text, in the forms that published models have."""

from __future__ import annotations

import subprocess
import sys

import pytest

from posttrain.backends.template import CHANNELS, PLAIN, ChatTemplate, template_text
from posttrain.engine.errors import ConfigError

USER = [{"role": "user", "content": "q"}]
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
LLAMA3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = "
    'strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "01 Jan 2000" %}{%- endif %}'
    '{%- endif %}{{- "Today Date: " + date_string + "\\n" }}' + TURNS
)
QWEN3 = TURNS + (
    "{%- if add_generation_prompt %}<|assistant|>{%- if enable_thinking is defined and "
    "enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
DEEPSEEK31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + "<|assistant|>"
    "{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}"
)
R1 = TURNS + "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
GPT_OSS = (
    "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n"
    "Reasoning: {{ reasoning_effort }}<|end|>"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if '<|channel|>analysis<|message|>' in m.content %}{{ raise_exception('no tags') }}"
    "{%- endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{%- if loop.last %}<|return|>{%- else %}<|end|>{%- endif %}"
    "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)


@pytest.mark.parametrize(
    ("text", "mode", "variables"),
    [
        (QWEN3, None, {}),
        (QWEN3, "think", {"enable_thinking": True}),
        (QWEN3, "no_think", {"enable_thinking": False}),
        (DEEPSEEK31, "think", {"thinking": True}),
        (DEEPSEEK31, "no_think", {"thinking": False}),
        # It thinks anyway.
        (R1, "think", {}),
        (GPT_OSS, "think", {}),
        (GPT_OSS, "low", {"reasoning_effort": "low"}),
        (GPT_OSS, "high", {"reasoning_effort": "high"}),
        (
            QWEN3 + "{{ reasoning_effort }}",
            "high",
            {"enable_thinking": True, "reasoning_effort": "high"},
        ),
    ],
)
def test_a_mode_is_a_variable_of_the_template(
    text: str, mode: str | None, variables: dict[str, object]
) -> None:
    assert ChatTemplate(text).variables(mode) == variables


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (TURNS, "think", "does not read enable_thinking; take a model that thinks"),
        (
            R1,
            "no_think",
            "the model always thinks: .*enable_thinking, thinking; use mode = 'think'",
        ),
        (GPT_OSS, "no_think", "the model always thinks"),
        (R1, "low", "does not read reasoning_effort; use mode = 'think'"),
        # A word of the text, or a variable of its own, is no switch.
        ("{% set thinking = messages[0].thinking %}{{ thinking }}", "think", "does not read"),
        (TURNS + "thinking {{ 'enable_thinking' }}", "think", "does not read"),
        (QWEN3, "fast", "choices: think, no_think, low, medium, high"),
    ],
)
def test_a_mode_that_the_template_does_not_know_is_refused(
    text: str, mode: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(text).variables(mode)


def test_a_template_that_reads_the_clock_is_told_one_date() -> None:
    assert ChatTemplate(LLAMA3).reads_clock
    assert ChatTemplate(LLAMA3).render(USER).startswith("Today Date: 26 Jul 2024\n")
    # Who wants another date writes it into the template, which is the model's identity.
    own = '{% set date_string = "1 May 2030" %}' + LLAMA3
    assert ChatTemplate(own).render(USER).startswith("Today Date: 1 May 2030\n")
    assert not ChatTemplate(QWEN3).reads_clock


@pytest.mark.parametrize("text", ["{{ [1, 2] | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="draws at random"):
        ChatTemplate(text)


def test_a_text_that_is_no_template_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(line 2"):
        ChatTemplate("{{ x }}\n{% if %}")


def test_what_marks_a_thought() -> None:
    assert ChatTemplate(QWEN3).marks == ChatTemplate(TURNS).marks == PLAIN
    mistral = ChatTemplate(TURNS + "{{ '[THINK]' }}").marks
    assert mistral.told("[THINK]hm[/THINK]9") == "<think>hm</think>9"
    assert mistral.said("<think>hm</think>9") == "[THINK]hm[/THINK]9"
    assert ChatTemplate(GPT_OSS).marks == CHANNELS
    told = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>9"
    assert CHANNELS.told(told) == "<think>hm</think>9"
    assert CHANNELS.told("<|channel|>final<|message|>9") == "9"


def test_the_forms_that_published_templates_use_are_rendered() -> None:
    text = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{%- else %}{%- if loop.index > 2 %}{%- break %}{%- endif %}"
        "{{ m.tool_calls | default({'a': '<é>'}) | tojson }}{%- endif %}{%- endfor %}"
        "{{ messages[0].reasoning_content }}"
    )
    said = [{"role": "user", "content": "q", "thinking": "hm", "name": None}]
    said.append({"role": "assistant", "content": "b"})
    assert ChatTemplate(text).render(said) == '{"a": "<é>"}bhm'


def test_of_several_templates_the_default_is_meant() -> None:
    assert template_text({"default": "a", "tool_use": "b"}) == template_text("a") == "a"
    assert template_text({"tool_use": "b"}) is template_text(None) is None


def test_a_template_is_read_without_torch_and_transformers() -> None:
    code = (
        "import sys, posttrain.backends.template\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
