"""Text formats: reasoning-gym items become prompts and demonstrations, responses become answers.

`plain` keeps reasoning-gym's own wording. The compact formats of the built-in domains stand in
`posttrain.suites.core`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from posttrain.engine.errors import ConfigError, choices_text


class Format(Protocol):
    """The translations between reasoning-gym's notation and the text that the model sees."""

    @property
    def version(self) -> int:
        """Bumped by hand when the text changes; part of a domain's identity."""
        ...

    def prompt(self, item: dict[str, Any]) -> str:
        """The user message for a reasoning-gym item (keys question, answer, metadata)."""
        ...

    def key(self, item: dict[str, Any]) -> str:
        """What makes two items the same problem: they get one row, in one split.

        Usually the prompt; less where prompts that differ ask the same (letters in another order).
        """
        ...

    def demo(self, item: dict[str, Any]) -> str:
        """A full demonstration response; it must score 1 under the item's own verifier."""
        ...

    def thought(self, item: dict[str, Any]) -> str | None:
        """The steps that lead to the answer, short enough to be thought; None: there are none."""
        ...

    def direct(self, item: dict[str, Any]) -> str | None:
        """The demonstration without its steps, which must score 1 too; None: it has none."""
        ...

    def answer(self, response: str) -> str:
        """The response in reasoning-gym's answer notation.

        Raises ValueError for a response that has no such reading; it then scores 0.
        """
        ...


class PlainFormat:
    """reasoning-gym's question and answer, unchanged."""

    version = 1

    def prompt(self, item: dict[str, Any]) -> str:
        """The item's question."""
        return str(item["question"])

    def key(self, item: dict[str, Any]) -> str:
        """The item's question."""
        return str(item["question"])

    def demo(self, item: dict[str, Any]) -> str:
        """The item's answer."""
        return str(item["answer"])

    def thought(self, item: dict[str, Any]) -> None:
        """reasoning-gym tells no steps."""

    def direct(self, item: dict[str, Any]) -> None:
        """The demonstration is the answer alone."""

    def answer(self, response: str) -> str:
        """The response as it is."""
        return response


PLAIN = PlainFormat()


def find_format(name: str, *, where: str) -> Format:
    """The format called `name`: `plain`, or one of the built-in domains' formats.

    Raises:
        ConfigError: unknown name; the message lists the choices.
    """
    if name == "plain":
        return PLAIN
    formats: dict[str, Format] = importlib.import_module("posttrain.suites.core").FORMATS
    if name not in formats:
        raise ConfigError(
            f"{where}: unknown format {name!r}; {choices_text(name, ['plain', *formats])}"
        )
    return formats[name]
