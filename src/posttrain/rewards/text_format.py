"""What a text format is: how reasoning-gym items become prompts and demonstrations, and responses
become answers.

An item is a mapping with the keys question, answer and metadata, as a reasoning-gym dataset gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Item = Mapping[str, Any]


class TextFormat:
    """The format `plain`: reasoning-gym's own texts. Other formats override what differs."""

    version = 1
    """Raised by hand when the text changes; part of a domain's identity."""

    def prompt(self, item: Item) -> str:
        """The user message."""
        return str(item["question"])

    def key(self, item: Item) -> str:
        """What makes two items the same problem: they get one row, in one split.

        Usually the prompt; less where prompts that differ ask the same (letters in another order).
        """
        return self.prompt(item)

    def fits(self, item: Item) -> bool:
        """Whether the item becomes a problem; one that is not written well is left out."""
        return True

    def demo(self, item: Item) -> str:
        """A full demonstration response; it must score 1 under the item's own verifier."""
        return str(item["answer"])

    def thought(self, item: Item) -> str | None:
        """The steps that lead to the answer, short enough to be thought; None: there are none."""
        return None

    def direct(self, item: Item) -> str | None:
        """The demonstration without its steps, which must score 1 too; None: it has none.

        In a format with steps the demonstration itself, unless it shows them.
        """
        return None if self.thought(item) is None else self.demo(item)

    def answer(self, response: str) -> str:
        """The response in reasoning-gym's answer notation.

        Raises ValueError for a response that has no such reading; it then scores 0.
        """
        return response
