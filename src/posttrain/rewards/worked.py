"""Text formats with worked answers: some lines of steps, then `#### ` and the answer.

They are for models that read English (the suite `words`). The steps are written from what
reasoning-gym says of an item, without chance; only what follows the last `####` is judged, by
reasoning-gym's own `score_answer`. The mark is the one that GSM8K's solutions end with (Cobbe et
al., arXiv 2110.14168), and the prompt asks for it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from posttrain.rewards.text_format import Item, TextFormat

MARK = "####"
ASKED = f'Work it out step by step and end with "{MARK} " and the answer.'
CHARACTERS = range(70, 401)
"""Characters of a worked story: about 30 to 150 tokens of a vocabulary of 50,000."""


class WorkedFormat(TextFormat):
    """A question in English, answered in steps; formats override the question and the steps."""

    def question(self, item: Item) -> str:
        """What is asked, without how to answer."""
        return str(item["question"]).strip()

    def steps(self, item: Item) -> str:
        """The lines before the answer."""
        raise NotImplementedError

    def prompt(self, item: Item) -> str:
        """The question, and how to answer."""
        return f"{self.question(item)}\n{ASKED}"

    def key(self, item: Item) -> str:
        """The question alone: how it is to be answered is the same for all."""
        return self.question(item)

    def demo(self, item: Item) -> str:
        """The steps, the mark and the answer."""
        return f"{self.steps(item)}\n{MARK} {item['answer']}"

    def answer(self, response: str) -> str:
        """What follows the last mark."""
        _, mark, answer = response.rpartition(MARK)
        if not mark:
            raise ValueError(f"there is no {MARK}")
        return answer.strip()


class StoryFormat(WorkedFormat):
    """Grade-school stories of `gsm_symbolic`, with the solutions that come with them."""

    ENDING = "Give the result as your final answer. Do not include units."

    def question(self, item: Item) -> str:
        """Without reasoning-gym's own words on how to answer."""
        return str(item["question"]).replace(self.ENDING, "").strip()

    def steps(self, item: Item) -> str:
        """Those of the dataset, without what it ends with."""
        return self._solution(item)[0].strip()

    def fits(self, item: Item) -> bool:
        """Whether its solution ends with its answer, and is neither a line nor a page: some of the
        templates state another number than the one that counts. Negative answers are left out,
        since `score_answer` reads no sign."""
        steps, said = self._solution(item)
        number = re.fullmatch(r"\d+(\.\d+)?", item["answer"])
        return number is not None and said.strip() == number[0] and len(steps) in CHARACTERS

    def _solution(self, item: Item) -> tuple[str, str]:
        steps, _, said = str(item["metadata"]["answer_cot"]).rpartition(MARK)
        return steps, said


class LegsFormat(WorkedFormat):
    """`leg_counting`: so many legs each, and a running total."""

    def question(self, item: Item) -> str:
        """Without reasoning-gym's preamble."""
        animals = [self._several(count, name) for name, count in self._animals(item).items()]
        return f"How many legs do {', '.join(animals[:-1])} and {animals[-1]} have together?"

    def key(self, item: Item) -> str:
        """The animals in any order."""
        return ", ".join(sorted(f"{count} {name}" for name, count in self._animals(item).items()))

    def steps(self, item: Item) -> str:
        """A line per kind of animal, then the sums."""
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        lines, legs = [], []
        for name, count in self._animals(item).items():
            legs.append(count * ANIMALS[name])
            product = f"{count} * {ANIMALS[name]} = {legs[-1]}"
            lines.append(f"{self._several(count, name)}: {product} legs")
        return "\n".join(lines + _sums(legs))

    def _animals(self, item: Item) -> dict[str, int]:
        return dict(item["metadata"]["animals"])

    def _several(self, count: int, name: str) -> str:
        return f"{count} {name}{'s' if count > 1 else ''}"


class OrderFormat(WorkedFormat):
    """`word_sorting`: every word under its first letters, in order."""

    LETTERS = 2
    """Of a word that are written before it; where they are alike, the words say more."""

    def question(self, item: Item) -> str:
        """In two lines instead of eight."""
        words = ", ".join(item["metadata"]["transformed_words"])
        return f"Sort these words in {item['metadata']['direction']} alphabetical order: {words}"

    def fits(self, item: Item) -> bool:
        """Whether all words are in small letters: capitals come first in the dataset's order."""
        return all(word.islower() for word in item["metadata"]["sorted_words"])

    def key(self, item: Item) -> str:
        """The direction, and the words in any order."""
        return f"{item['metadata']['direction']}: {', '.join(sorted(item['metadata']['sorted_words']))}"

    def steps(self, item: Item) -> str:
        """A line per word."""
        words = item["metadata"]["sorted_words"]
        return "\n".join(f"{word[: self.LETTERS]}: {word}" for word in words)


class SpellFormat(WorkedFormat):
    """`spell_backward`: the letters forwards, then backwards."""

    def question(self, item: Item) -> str:
        """Without an example."""
        return f"Spell the word {item['metadata']['word']} backwards."

    def key(self, item: Item) -> str:
        """The word whatever its case."""
        return str(item["metadata"]["word"]).lower()

    def steps(self, item: Item) -> str:
        """Both rows of letters, and how many there are."""
        word = str(item["metadata"]["word"])
        rows = f"Forwards: {' '.join(word)}\nBackwards: {' '.join(reversed(word))}"
        return f"The word has {len(word)} letters.\n{rows}"


class EquationFormat(WorkedFormat):
    """`simple_equations`: linear in one letter, solved in two steps."""

    def steps(self, item: Item) -> str:
        """What stands alone moves to the right, then both sides are divided."""
        name = item["metadata"]["variable"]
        left, right = item["metadata"]["equation"].split(" = ")
        slope, rest = _linear(left, name)
        moved = int(right) - rest
        lines = []
        if rest:
            sign = "-" if rest > 0 else "+"
            lines.append(f"{slope}*{name} = {right} {sign} {abs(rest)} = {moved}")
        lines.append(f"{name} = {moved} / {slope} = {item['answer']}")
        lines.append(f"Check: {slope} * {item['answer']} = {moved}")
        return "\n".join(lines)

    def fits(self, item: Item) -> bool:
        """Whether it is a sum of terms: products of brackets have other steps."""
        left = item["metadata"]["equation"].split(" = ")[0]
        return "(" not in left


def _linear(text: str, name: str) -> tuple[int, int]:
    """Slope and rest of a sum of products of numbers and at most one `name` each."""
    slope = rest = Fraction(0)
    for sign, term in re.findall(r"([+-]?)\s*([^\s+-]+)", text.replace(" ", "")):
        factors = term.split("*")
        value = Fraction(-1 if sign == "-" else 1)
        for factor in factors:
            value *= 1 if factor == name else int(factor)
        if name in factors:
            slope += value
        else:
            rest += value
    return int(slope), int(rest)


def _sums(numbers: list[int]) -> list[str]:
    """A line for each addition of a running total."""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} + {number} = {total + number}")
        total += number
    return lines
