"""Text formats with worked answers: some lines of steps, then `#### ` and the answer.

They are for models that read English (the suite `words`). The steps are written from what
reasoning-gym says of an item, without chance; only what follows the last `####` is judged, by
reasoning-gym's own `score_answer`. The mark is the one that GSM8K's solutions end with (Cobbe et
al., arXiv 2110.14168), and the prompt asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.rewards.text_format import Item, TextFormat

MARK = "####"
ASKED = f'Work it out step by step and end with "{MARK} " and the answer.'


def _every(item: Item) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class WorkedFormat(TextFormat):
    """A question in English, answered in steps. The fields say what differs between formats."""

    question: Callable[[Item], str]
    """What is asked, without how to answer."""
    steps: Callable[[Item], str]
    """The lines before the answer."""
    same: Callable[[Item], str] | None = None
    """What is equal for items that ask the same, where it is not the question."""
    suits: Callable[[Item], bool] = _every
    """Whether an item becomes a problem."""

    def prompt(self, item: Item) -> str:
        """The question, and how to answer."""
        return f"{self.question(item)}\n{ASKED}"

    def key(self, item: Item) -> str:
        """The question alone, or less: how it is to be answered is the same for all."""
        return (self.same or self.question)(item)

    def fits(self, item: Item) -> bool:
        """Whether the item becomes a problem."""
        return self.suits(item)

    def demo(self, item: Item) -> str:
        """The steps, the mark and the answer."""
        return f"{self.steps(item)}\n{MARK} {item['answer']}"

    def answer(self, response: str) -> str:
        """What follows the last mark."""
        _, mark, answer = response.rpartition(MARK)
        if not mark:
            raise ValueError(f"there is no {MARK}")
        return answer.strip()


# Stories of `gsm_symbolic`, with the solutions that come with them.

ENDING = "Give the result as your final answer. Do not include units."
CHARACTERS = range(70, 356)
"""Of a story's solution: about 30 to 150 tokens of a vocabulary of 50,000."""


def _story(item: Item) -> str:
    """Without reasoning-gym's own words on how to answer."""
    return str(item["question"]).replace(ENDING, "").strip()


def _solution(item: Item) -> tuple[str, str]:
    """The dataset's own steps, and the answer that they end with."""
    steps, _, said = str(item["metadata"]["answer_cot"]).rpartition(MARK)
    return steps.strip(), said.strip()


def _is_told_well(item: Item) -> bool:
    """Whether the solution ends with the answer, and is neither a line nor a page: some of the
    templates state another number than the one that counts. Negative answers are left out, since
    `score_answer` reads no sign."""
    steps, said = _solution(item)
    number = re.fullmatch(r"\d+(\.\d+)?", item["answer"])
    return number is not None and said == number[0] and len(steps) in CHARACTERS


STORY = WorkedFormat(question=_story, steps=lambda item: _solution(item)[0], suits=_is_told_well)


# `leg_counting`: so many legs of each kind of animal, and a running total.


def _animals(item: Item) -> dict[str, int]:
    return dict(item["metadata"]["animals"])


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' if count > 1 else ''}"


def _how_many_legs(item: Item) -> str:
    animals = [_several(count, name) for name, count in _animals(item).items()]
    return f"How many legs do {', '.join(animals[:-1])} and {animals[-1]} have together?"


def _same_animals(item: Item) -> str:
    return ", ".join(sorted(f"{count} {name}" for name, count in _animals(item).items()))


def _legs(item: Item) -> str:
    """A line per kind of animal, then the sums."""
    # The library takes a second to import, and a plan reads this file.
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, legs = [], []
    for name, count in _animals(item).items():
        legs.append(count * ANIMALS[name])
        lines.append(f"{_several(count, name)}: {count} * {ANIMALS[name]} = {legs[-1]} legs")
    total = legs[0]
    for more in legs[1:]:
        lines.append(f"{total} + {more} = {total + more}")
        total += more
    return "\n".join(lines)


LEGS = WorkedFormat(question=_how_many_legs, steps=_legs, same=_same_animals)


# `word_sorting`: every word under its first two letters, in order.


def _unsorted(item: Item) -> str:
    words = ", ".join(item["metadata"]["transformed_words"])
    return f"Sort these words in {item['metadata']['direction']} alphabetical order: {words}"


def _same_words(item: Item) -> str:
    words = sorted(item["metadata"]["sorted_words"])
    return f"{item['metadata']['direction']}: {', '.join(words)}"


def _in_order(item: Item) -> str:
    return "\n".join(f"{word[:2]}: {word}" for word in item["metadata"]["sorted_words"])


def _has_no_capitals(item: Item) -> bool:
    """Capitals come first in the dataset's order, which is not that of a dictionary."""
    return all(word.islower() for word in item["metadata"]["sorted_words"])


ORDER = WorkedFormat(question=_unsorted, steps=_in_order, same=_same_words, suits=_has_no_capitals)


# `simple_equations`: linear in one letter.


def _left(item: Item) -> str:
    return str(item["metadata"]["equation"].split(" = ")[0])


def _solved(item: Item) -> str:
    """What stands alone moves to the right, then both sides are divided, then a check."""
    name, answer = item["metadata"]["variable"], item["answer"]
    right = int(item["metadata"]["equation"].split(" = ")[1])
    slope, rest = _linear(_left(item), name)
    moved = right - rest
    return (
        f"{slope}*{name} = {right} {'-' if rest > 0 else '+'} {abs(rest)} = {moved}\n"
        f"{name} = {moved} / {slope} = {answer}\n"
        f"Check: {slope} * {answer} = {moved}"
    )


def _has_two_steps(item: Item) -> bool:
    """Whether it is a sum with a number that stands alone; products of brackets have other
    steps."""
    left = _left(item)
    return "(" not in left and _linear(left, item["metadata"]["variable"])[1] != 0


def _linear(text: str, name: str) -> tuple[int, int]:
    """Slope and rest of a sum of products of whole numbers and at most one `name` each."""
    slope = rest = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", text.replace(" ", "")):
        value = -1 if sign == "-" else 1
        factors = term.split("*")
        for factor in factors:
            value *= 1 if factor == name else int(factor)
        if name in factors:
            slope += value
        else:
            rest += value
    return slope, rest


EQUATION = WorkedFormat(
    question=lambda item: str(item["question"]).strip(), steps=_solved, suits=_has_two_steps
)
