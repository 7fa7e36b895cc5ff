"""Text formats: reasoning-gym items become prompts and demonstrations, responses become answers.

`plain` keeps reasoning-gym's own wording. Those here are the compact notations of the suite `core`:
reasoning-gym's English questions run to 400 characters, and a model of 0.2 million parameters would
spend its whole budget reading them. Those of the suite `words`, for models that read English, are
in `worked.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.text_format import Item, TextFormat
from posttrain.rewards.worked import EQUATION, LEGS, ORDER, STORY


class AddFormat(TextFormat):
    """`a 4-1-7` is answered step by step, `4-1=3-7=-4`; the answer follows the last `=`."""

    version = 3

    def prompt(self, item: Item) -> str:
        """The expression without spaces."""
        return "a " + item["metadata"]["expression"].replace(" ", "")

    def demo(self, item: Item) -> str:
        """Each partial sum written out."""
        first, *rest = item["metadata"]["expression"].split()
        total, text = int(first), first
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            total += int(term) if sign == "+" else -int(term)
            text += f"{sign}{term}={total}"
        return text

    def thought(self, item: Item) -> str:
        """The partial sums."""
        return self.demo(item)

    def direct(self, item: Item) -> str:
        """The last sum."""
        return self.answer(self.demo(item))

    def answer(self, response: str) -> str:
        """What follows the last equals sign."""
        return response.rpartition("=")[2]


class ReverseFormat(TextFormat):
    """`r monkey` is answered `yeknom`."""

    version = 3

    def prompt(self, item: Item) -> str:
        """The word, case kept: reasoning-gym compares it exactly."""
        return "r " + item["metadata"]["word"]

    def key(self, item: Item) -> str:
        """The word whatever its case."""
        return str(item["metadata"]["word"]).lower()

    def demo(self, item: Item) -> str:
        """The word backwards."""
        return str(item["metadata"]["word"])[::-1]

    def thought(self, item: Item) -> str:
        """The letters numbered from 0, `0m1o2n3k4e5y`."""
        return "".join(f"{i}{letter}" for i, letter in enumerate(item["metadata"]["word"]))


class SortFormat(TextFormat):
    """`s< 50391` is answered `01359`; `s>` asks for descending order."""

    version = 3

    def prompt(self, item: Item) -> str:
        """The direction as a sign, then the digits."""
        sign = "<" if item["metadata"]["direction"] == "ascending" else ">"
        return f"s{sign} " + self._digits(item["metadata"]["original_numbers"])

    def key(self, item: Item) -> str:
        """Direction and digits: the same digits in another order have the same answer."""
        return item["metadata"]["direction"] + "".join(
            sorted(self._digits(item["metadata"]["original_numbers"]))
        )

    def demo(self, item: Item) -> str:
        """The digits in order."""
        return self._digits(item["metadata"]["sorted_numbers"])

    def thought(self, item: Item) -> str:
        """Each digit and how often it occurs, in order: `0111315191` for `50391`."""
        runs = itertools.groupby(self.demo(item))
        return "".join(f"{digit}{len(list(run))}" for digit, run in runs)

    def answer(self, response: str) -> str:
        """A list of numbers as strings."""
        return str(list(response))

    def _digits(self, numbers: list[str]) -> str:
        return "".join(str(int(float(number))) for number in numbers)


class PalindromeFormat(TextFormat):
    """`p ccbaa` is answered by any palindrome of these letters, such as `acbca`."""

    version = 3

    def prompt(self, item: Item) -> str:
        """The letters as given."""
        return "p " + "".join(item["metadata"]["letters"])

    def key(self, item: Item) -> str:
        """The letters in alphabetical order: in another order they have the same answers."""
        return "".join(sorted(item["metadata"]["letters"]))

    def demo(self, item: Item) -> str:
        """The palindrome whose first half is in alphabetical order."""
        counts = sorted(Counter(item["metadata"]["letters"]).items())
        half = "".join(letter * (count // 2) for letter, count in counts)
        middle = "".join(letter for letter, count in counts if count % 2)
        return half + middle + half[::-1]

    def thought(self, item: Item) -> str:
        """Each letter and how often it occurs, `a2b1c2`."""
        counts = Counter(item["metadata"]["letters"])
        return "".join(f"{letter}{count}" for letter, count in sorted(counts.items()))


FORMATS: dict[str, TextFormat] = {
    "plain": TextFormat(),
    "add": AddFormat(),
    "reverse": ReverseFormat(),
    "sort": SortFormat(),
    "palindrome": PalindromeFormat(),
    "story": STORY,
    "legs": LEGS,
    "equation": EQUATION,
    "order": ORDER,
}
"""Name -> format. A new format is an entry here."""


def find_format(name: str, *, where: str) -> TextFormat:
    """The format called `name`. Raises ConfigError, with the choices, for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(f"{where}: unknown format {name!r}; {choices_text(name, FORMATS)}")
    return FORMATS[name]
