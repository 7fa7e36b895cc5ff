"""What a chat template does, told from its text alone, without torch, so that a plan can ask.

A thinking block is written `<think>steps</think>answer` in every text that stages, verifiers and
judges read. Families that mark it otherwise have their `Marks` here, and `Chat` turns one into the
other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from posttrain.backends.prompting import CLOSE, EFFORTS, OPEN, Message, check_mode
from posttrain.engine.errors import ConfigError

DATE = datetime(2024, 7, 26)
"""What a template that reads the clock is told, always: another day would be another prompt, which
no record would show. It is the date that the template of Llama 3.1 falls back to."""
CLOCK = "strftime_now"
SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn thinking on or off: Qwen3, GLM 4.5 and SmolLM 3 have the first,
DeepSeek V3.1 and Granite the second."""
EFFORT = "reasoning_effort"
"""The template variable that says how much to think, as in gpt-oss."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """How the turns of a family of models show what was thought."""

    open: str = OPEN
    close: str = CLOSE
    answer: str = ""
    """What begins an answer without a thought."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Those of its marks that a text may hold as a tag: channels are a turn's form."""
        return () if self.answer else (self.open, self.close)

    @property
    def plain(self) -> bool:
        """Whether they are those of all texts."""
        return (self.open, self.close, self.answer) == (OPEN, CLOSE, "")

    def told(self, text: str) -> str:
        """What a model said as a text with `<think>` and `</think>`."""
        if self.plain:
            return text
        text = text.replace(self.close, CLOSE).replace(self.open, OPEN)
        return text.removeprefix(self.answer)

    def said(self, text: str) -> str:
        """The text of a response as the model says it; an `answer` mark is left to the template."""
        if self.plain:
            return text
        return text.replace(CLOSE, self.close).replace(OPEN, self.open)


PLAIN = Marks()
FAMILIES = (
    PLAIN,
    Marks(open="[THINK]", close="[/THINK]"),
    Marks(open="<seed:think>", close="</seed:think>"),
)
CHANNELS = Marks(
    open="<|channel|>analysis<|message|>",
    close="<|end|><|start|>assistant<|channel|>final<|message|>",
    answer="<|channel|>final<|message|>",
)
"""The format of gpt-oss, where each message has a channel."""


class _Generation(Extension):
    """`{% generation %}`, which transformers reads to find what the assistant says: its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Refused(TemplateError):
    """What a template says of a conversation that it does not take."""


def _raise(message: str) -> None:
    raise Refused(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson as chat templates have it, without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """That in which transformers renders templates, but for the clock."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _raise, CLOCK: DATE.strftime}
    return made


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template. Raises ConfigError for a text that is none, or that draws at random."""

    text: str

    def __post_init__(self) -> None:
        drawn = [node.name for node in self._tree.find_all(nodes.Filter) if node.name == "random"]
        if drawn or "lipsum" in self.reads:
            raise ConfigError(
                f"the model's chat template draws at random ({drawn[0] if drawn else 'lipsum'}), "
                "so one prompt would be another one every time; take that out of its "
                "chat_template.jinja"
            )

    @cached_property
    def _tree(self) -> nodes.Template:
        reader = _environment()
        # Names that the environment has count as read, too.
        reader.globals.clear()
        try:
            return reader.parse(self.text)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template cannot be read (line {error.lineno}: {error}); mend "
                "its chat_template.jinja, or chat_template in its tokenizer_config.json"
            ) from None

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names that it does not make itself."""
        return frozenset(find_undeclared_variables(self._tree))

    @cached_property
    def literal(self) -> str:
        """All text that stands in it to be written, or compared with."""
        written = [node.data for node in self._tree.find_all(nodes.TemplateData)]
        told = [node.value for node in self._tree.find_all(nodes.Const)]
        return "\n".join([*written, *(value for value in told if isinstance(value, str))])

    @property
    def reads_clock(self) -> bool:
        """Whether it asks for the time."""
        return CLOCK in self.reads

    @cached_property
    def marks(self) -> Marks:
        """How it marks what is thought."""
        if "<|channel|>" in self.text and "analysis" in self.text:
            return CHANNELS
        found = (marks for marks in FAMILIES if marks.open in self.text or marks.close in self.text)
        return next(found, PLAIN)

    @property
    def thinks(self) -> bool:
        """Whether its models think, always or where they are asked to."""
        shown = any(mark in self.text for mark in (self.marks.open, self.marks.close))
        return self.switch is not None or EFFORT in self.reads or shown

    @property
    def switch(self) -> str | None:
        """The variable that turns thinking on or off; None where there is none."""
        return next((name for name in SWITCHES if name in self.reads), None)

    def variables(self, mode: str | None) -> dict[str, Any]:
        """What a mode is to the template. Raises ConfigError for a mode that it does not know.

        think is what a template without a switch does anyway, if its models think at all.
        """
        if mode is None:
            return {}
        mode = check_mode(mode, where="chat template")
        if not self.thinks:
            raise ConfigError(
                f"mode = {mode!r}: the model's chat template does not read {SWITCHES[0]}; take a "
                "model that thinks (pretrain: thinking=True), or leave the mode out"
            )
        if mode in EFFORTS and EFFORT not in self.reads:
            raise ConfigError(
                f"mode = {mode!r}: the model's chat template does not read {EFFORT}; use mode = "
                "'think', or leave the mode out"
            )
        if mode == "no_think" and self.switch is None:
            raise ConfigError(
                f"mode = 'no_think': the model always thinks: its chat template reads none of "
                f"{', '.join(SWITCHES)}; use mode = 'think', or leave the mode out"
            )
        found: dict[str, Any] = {} if self.switch is None else {self.switch: mode != "no_think"}
        return found | ({EFFORT: mode} if mode in EFFORTS else {})

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises jinja2's TemplateError where the template refuses it,
        and TypeError where a message has another form than it expects."""
        shown = [_plain_message(message) for message in messages]
        template = _environment().from_string(self.text)
        return template.render(messages=shown, tools=None, documents=None, **variables)


def roles_refused(template: ChatTemplate, shape: str) -> str | None:
    """Why the template does not take a conversation of these roles ("system user"), in its words,
    up to where the assistant speaks; None where it takes it, or where that depends on more."""
    messages: list[dict[str, Any]] = []
    for speaker in shape.split():
        role, calls = speaker.partition("+")[::2]
        messages.append({"role": role, "content": "x"})
        if calls:
            called = {"name": "x", "arguments": {}}
            messages[-1] |= {calls: [{"id": "x" * 9, "type": "function", "function": called}]}
        if role == "tool":
            messages[-1] |= {"tool_call_id": "x" * 9, "name": "x"}
    try:
        template.render(messages, add_generation_prompt=True, bos_token="", eos_token="")
    except Refused as refusal:
        return str(refusal)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
        # It reads of the messages what these have not.
        return None
    return None


def finished_renderer(
    text: str, special: Mapping[str, str]
) -> Callable[[Sequence[Message]], str] | None:
    """What a chat template makes of a conversation that nobody goes on with; None of no template.

    `special` are the tokens that templates write by name, such as `eos_token`.
    """
    try:
        template = ChatTemplate(text)
    except ConfigError:
        # It is told by who reads the template.
        return None
    return lambda messages: template.render(messages, add_generation_prompt=False, **special)


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as transformers shows it: without what it does not have, and with what was thought
    under each of the names that templates have for it."""
    found = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    thoughts = [found[name] for name in names if name in found]
    if not thoughts:
        return found
    return {"thinking": thoughts[0], **found, "reasoning_content": thoughts[0]}


def template_text(found: str | Mapping[str, str] | None) -> str | None:
    """The one that is used where a tokenizer has several."""
    return found.get("default") if isinstance(found, Mapping) else found
