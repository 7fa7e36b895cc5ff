"""The built-in suite: four procedural domains that a model of 0.2 million parameters can learn.

The problems and their scoring are reasoning-gym's. What is ours is the text: its English questions
run to 400 characters, and a model this small would spend its whole budget reading them, so each
domain has a compact notation for prompt and response, and turns a response back into
reasoning-gym's own notation before reasoning-gym scores it.

The domains ask for different circuits (running sums, reversal, ordering, counting and
mirroring), no constant answer does well in any of them, and each can be learned well within a
minute on one core once a model specialises, but not all four at once: which is the situation that
specialists and their distillation are for.

Each domain can also be thought about: `thought` writes the steps down, `direct` is the answer that
they lead to.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from posttrain.rewards.verifiers import VerifierSpec
from posttrain.suites.domain import Domain, Format, Procedural, Suite


class AddFormat:
    """`a 4-1-7` is answered step by step, `4-1=3-7=-4`; the answer follows the last `=`."""

    version = 3

    def prompt(self, item: Mapping[str, Any]) -> str:
        """The expression without spaces."""
        return "a " + item["metadata"]["expression"].replace(" ", "")

    def key(self, item: Mapping[str, Any]) -> str:
        """The prompt."""
        return self.prompt(item)

    def demo(self, item: Mapping[str, Any]) -> str:
        """Each partial sum written out."""
        first, *rest = item["metadata"]["expression"].split()
        total, text = int(first), first
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            total += int(term) if sign == "+" else -int(term)
            text += f"{sign}{term}={total}"
        return text

    def thought(self, item: Mapping[str, Any]) -> str:
        """The partial sums."""
        return self.demo(item)

    def direct(self, item: Mapping[str, Any]) -> str:
        """The last sum."""
        return self.answer(self.demo(item))

    def answer(self, response: str) -> str:
        """What follows the last equals sign."""
        return response.rpartition("=")[2]


class ReverseFormat:
    """`r monkey` is answered `yeknom`."""

    version = 3

    def prompt(self, item: Mapping[str, Any]) -> str:
        """The word, case kept: reasoning-gym compares it exactly."""
        return "r " + item["metadata"]["word"]

    def key(self, item: Mapping[str, Any]) -> str:
        """The word whatever its case."""
        return str(item["metadata"]["word"]).lower()

    def demo(self, item: Mapping[str, Any]) -> str:
        """The word backwards."""
        return str(item["metadata"]["word"])[::-1]

    def thought(self, item: Mapping[str, Any]) -> str:
        """The letters numbered from 0, `0m1o2n3k4e5y`."""
        return "".join(f"{i}{letter}" for i, letter in enumerate(item["metadata"]["word"]))

    def direct(self, item: Mapping[str, Any]) -> str:
        """The word backwards."""
        return self.demo(item)

    def answer(self, response: str) -> str:
        """The response itself."""
        return response


class SortFormat:
    """`s< 50391` is answered `01359`; `s>` asks for descending order."""

    version = 3

    def prompt(self, item: Mapping[str, Any]) -> str:
        """The direction as a sign, then the digits."""
        sign = "<" if item["metadata"]["direction"] == "ascending" else ">"
        return f"s{sign} " + self._digits(item["metadata"]["original_numbers"])

    def key(self, item: Mapping[str, Any]) -> str:
        """Direction and digits: the same digits in another order have the same answer."""
        return item["metadata"]["direction"] + "".join(
            sorted(self._digits(item["metadata"]["original_numbers"]))
        )

    def demo(self, item: Mapping[str, Any]) -> str:
        """The digits in order."""
        return self._digits(item["metadata"]["sorted_numbers"])

    def thought(self, item: Mapping[str, Any]) -> str:
        """Each digit and how often it occurs, in order: `0111315191` for `50391`."""
        runs = itertools.groupby(self.demo(item))
        return "".join(f"{digit}{len(list(run))}" for digit, run in runs)

    def direct(self, item: Mapping[str, Any]) -> str:
        """The digits in order."""
        return self.demo(item)

    def answer(self, response: str) -> str:
        """A list of numbers as strings."""
        return str(list(response))

    def _digits(self, numbers: list[str]) -> str:
        return "".join(str(int(float(number))) for number in numbers)


class PalindromeFormat:
    """`p ccbaa` is answered by any palindrome of these letters, such as `acbca`."""

    version = 3

    def prompt(self, item: Mapping[str, Any]) -> str:
        """The letters as given."""
        return "p " + "".join(item["metadata"]["letters"])

    def key(self, item: Mapping[str, Any]) -> str:
        """The letters in alphabetical order: in another order they have the same answers."""
        return "".join(sorted(item["metadata"]["letters"]))

    def demo(self, item: Mapping[str, Any]) -> str:
        """The palindrome whose first half is in alphabetical order."""
        counts = sorted(Counter(item["metadata"]["letters"]).items())
        half = "".join(letter * (count // 2) for letter, count in counts)
        middle = "".join(letter for letter, count in counts if count % 2)
        return half + middle + half[::-1]

    def thought(self, item: Mapping[str, Any]) -> str:
        """Each letter and how often it occurs, `a2b1c2`."""
        counts = Counter(item["metadata"]["letters"])
        return "".join(f"{letter}{count}" for letter, count in sorted(counts.items()))

    def direct(self, item: Mapping[str, Any]) -> str:
        """The palindrome of the demonstration."""
        return self.demo(item)

    def answer(self, response: str) -> str:
        """The response itself."""
        return response


FORMATS: dict[str, Format] = {
    "add": AddFormat(),
    "reverse": ReverseFormat(),
    "sort": SortFormat(),
    "palindrome": PalindromeFormat(),
}


def suite() -> Suite:
    """The suite `core`."""
    return Suite(
        name="core",
        domains={
            "add": _domain(
                "add", "chain_sum", 3000, min_terms=2, max_terms=3, min_digits=1, max_digits=1
            ),
            "reverse": _domain("reverse", "spell_backward", 12000, min_word_len=5, max_word_len=10),
            "sort": _domain(
                "sort",
                "number_sorting",
                12000,
                min_numbers=8,
                max_numbers=12,
                min_decimals=0,
                max_decimals=0,
                min_value=0,
                max_value=9,
            ),
            "palindrome": _domain(
                "palindrome", "palindrome_generation", 8000, min_length=4, max_length=8
            ),
        },
    )


def _domain(name: str, dataset: str, num_train: int, **params: int) -> Domain:
    return Domain(
        name=name,
        source=Procedural(
            dataset=dataset,
            params=params,
            format=name,
            format_version=FORMATS[name].version,
            num_train=num_train,
            num_validation=400,
            num_heldout=500,
            seed=0,
        ),
        verifier=VerifierSpec(name=f"reasoning_gym:{dataset}", options={}),
    )
