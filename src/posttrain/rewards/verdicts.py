"""How a verdict is read out of the reply of a model that judges: from its own form, or not at all.

    Grade: 7        the last such line decides; 7/10, 7 out of 10 and 70 % bring their own scale
    Better: 1       the last such line decides
    1: yes          a verdict on each criterion; the last block of lines that has all decides

Numbers anywhere else mean nothing. A reply without its form is no verdict: StageError, after which
it is asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.backends.prompting import CLOSE, OPEN
from posttrain.engine.errors import StageError

SHOWN = 200
"""Characters of a reply in a message."""

GRADE_FORM, BETTER_FORM, RUBRIC_FORM = "Grade:", "Better:", "1: yes"
"""What a question has to ask for, a template of the user's own as well."""

_DECORATION = r"[\s*_`$\[({<\"']"
_MARKER = r"\b{}[*_`]*[ \t]*:(?:\\boxed\{{|{})*"
_NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
_GRADE_MARKER = re.compile(_MARKER.format("grade", _DECORATION), re.IGNORECASE | re.ASCII)
_BETTER_MARKER = re.compile(_MARKER.format("better", _DECORATION), re.IGNORECASE | re.ASCII)
_GRADE = re.compile(
    # No part of a word or of a longer number, no range, no choice of two.
    rf"(?P<grade>{_NUMBER})(?![\w,.]*\d|\w)(?!\s*(?:-|\u2013|\u2014|to\b|or\b)\s*\d)"
    r"[\s*_`$\])}>\"']*"
    rf"(?:(?P<scale>/|out\s+of\b|of\b)\s*[*_`$]*(?P<best>{_NUMBER})?|(?P<percent>\\?%))?",
    re.IGNORECASE,
)
_BETTER = re.compile(
    r"(?:answer|response)?[\s*_`#]*(?P<better>[12])(?![\w,.]*\d|\w)"
    r"(?!\W*(?:or|and|/|&|=)\W*(?:answer|response)?\W*[12]\b)",
    re.IGNORECASE,
)
_LINE = re.compile(
    r"[^\w\n]*(?:criterion\s+)?(?P<number>\d{1,6})[^\w\n]+(?P<word>yes|no)\b(?P<rest>.*)",
    re.IGNORECASE,
)
_REASON = re.compile(r"[^\w\s]*\s*(?:[,;:.(\u2013\u2014-]|$)")


def grade(reply: str, best: float) -> float:
    """The grade as a share of the best one, or of the scale that the reply brings along.

    Raises StageError where no grade follows the last `Grade:`, or it is outside of its scale.
    """
    said = _after(_GRADE_MARKER, without_thought(reply))
    found = None if said is None else _GRADE.match(said)
    if found is not None:
        whole = best
        if found["percent"]:
            whole = 100.0
        elif found["scale"]:
            whole = float(found["best"] or 0)
        if whole > 0 and float(found["grade"]) <= whole:
            return float(found["grade"]) / whole
    raise StageError(
        f"judge llm: no grade from 0 to {best:g} after '{GRADE_FORM}' in {_tail(reply)}"
    )


def better(reply: str) -> float:
    """1.0 where answer 1 is the better one, 0.0 where 2 is.

    Raises StageError where neither follows the last `Better:`.
    """
    text = without_thought(reply)
    said = _after(_BETTER_MARKER, text)
    found = None if said is None else _BETTER.match(said)
    # "Better: 1 or Better: 2" is what was asked, said again.
    if found is None or len(_BETTER_MARKER.findall(_last_line_with(_BETTER_MARKER, text))) > 1:
        raise StageError(f"judge compare: neither 1 nor 2 after '{BETTER_FORM}' in {_tail(reply)}")
    return float(found["better"] == "1")


def met(reply: str, rubric: Sequence[Mapping[str, Any]]) -> float:
    """Weight of the criteria that the reply says yes to, over the weight of all.

    The last block of verdict lines with exactly one verdict on each criterion decides; a line in
    the notes around it does not. Raises StageError without such a block.
    """
    wanted, text = range(1, len(rubric) + 1), without_thought(reply)
    plain, explained = (_whole_blocks(text, wanted, reasons=why) for why in (False, True))
    # Of lines with reasons notes cannot be told: they count where they all say the same.
    agreed = plain or (explained if all(block == explained[0] for block in explained) else [])
    if not agreed:
        raise StageError(
            f"judge llm: no lines such as '{RUBRIC_FORM}' with one verdict on each of the criteria "
            f"1 to {len(rubric)} in {_tail(reply)}"
        )
    weights = [float(entry.get("weight", 1.0)) for entry in rubric]
    return sum(w for i, w in zip(wanted, weights, strict=True) if agreed[-1][i]) / sum(weights)


def without_thought(reply: str) -> str:
    """What a judge that thinks says after its thought; nothing while the thought is open."""
    return reply.rpartition(CLOSE)[2].partition(OPEN)[0]


def _after(marker: re.Pattern[str], text: str) -> str | None:
    ends = [found.end() for found in marker.finditer(text)]
    return text[ends[-1] :] if ends else None


def _last_line_with(marker: re.Pattern[str], text: str) -> str:
    return [line for line in text.splitlines() if marker.search(line)][-1]


def _whole_blocks(text: str, wanted: Sequence[int], *, reasons: bool) -> list[dict[int, bool]]:
    """Runs of verdict lines, empty lines between them or not, that say yes or no to each criterion
    once: criterion -> whether it is met. `reasons`: lines that go on after the verdict are some."""
    blocks: list[list[tuple[int, bool]]] = [[]]
    for line in filter(str.strip, text.splitlines()):
        verdict = _LINE.fullmatch(line)
        if verdict is None or not _ends_there(verdict["rest"], reasons=reasons):
            blocks.append([])
        elif int(verdict["number"]) in wanted:
            blocks[-1].append((int(verdict["number"]), verdict["word"].lower() == "yes"))
    return [dict(b) for b in blocks if b and sorted(number for number, _ in b) == list(wanted)]


def _ends_there(rest: str, *, reasons: bool) -> bool:
    """Whether a line ends with its yes or no, or `reasons` begin there as such do."""
    return re.fullmatch(r"\W*", rest) is not None or (reasons and _REASON.match(rest) is not None)


def _tail(reply: str) -> str:
    return f"the reply {reply[-SHOWN:]!r}"
