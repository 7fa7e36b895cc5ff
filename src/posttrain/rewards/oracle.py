"""A noisy annotator with a hidden taste: preferences and demonstrations that are wrong at a rate.

What it likes is the quality of a response, in [0, 1]: mostly the verifier's part marks, a little
style. What it says is that plus noise, so that a reward model has something to learn and something
to get wrong. Every draw is a hash of (seed, problem, texts): the same question gets the same answer
in every process, whichever response is named first.

    pool = VerifierPool(domains, num_workers=2, by="oracle")
    oracle = Oracle(qualities=pool.scores, noise=1.0, seed=0)

Comparisons follow Bradley and Terry (1952). Rates are the same with Gumbel noise on each response:
they rank responses as Plackett and Luce, whose pairs are Bradley-Terry at the same temperature.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.backends.prompting import CLOSE, demonstration
from posttrain.engine.errors import StageError
from posttrain.rewards.gym import FULL_SCORE
from posttrain.rewards.python_file import python_verifier
from posttrain.rewards.verifiers import (
    AnswerVerifier,
    Verifier,
    domain_config,
    load_verifier,
    make_verifier,
    own_copy,
    own_file,
    verifier_name,
)

Problem = Mapping[str, Any]

SCALE = 5.0
"""Logits per unit of quality: at noise 1 and in equal style, right is preferred to what has no part
marks at sigmoid(4) = 98 % of the time, and to a near miss at sigmoid(2.5) = 92 % at least."""
WEIGHT_RIGHT, WEIGHT_MARKS, WEIGHT_BREVITY, WEIGHT_ENDING = 0.5, 0.3, 0.1, 0.1
STRENGTHS = (0.5, 1.5, 3.0)
"""Margins in logits from which a preference is better than marginal, clear, strong (Llama 3's four
levels, arXiv 2407.21783, section 4.2.1)."""
_GUMBEL_MEAN = 0.5772156649015329
NUM_TRIES = 40
"""Slips that are tried until the verifier finds one of them wrong."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The hidden quality of a response, in the form of a verifier, so that a pool can run it."""

    verifier: Verifier
    """With part marks where it has them."""

    def score(self, response: str, problem: Problem) -> float:
        """In [0, 1]: 0.5 if right, 0.3 of the part marks, 0.1 for brevity, 0.1 for the ending."""
        reference = demonstration(problem, problem.get("mode")) or problem["answer"]
        marks = self.verifier.score(response, problem)
        return (
            WEIGHT_RIGHT * float(marks >= FULL_SCORE)
            + WEIGHT_MARKS * marks
            + WEIGHT_BREVITY * brevity(response, reference)
            + WEIGHT_ENDING * float(ends_alike(response, reference))
        )

    def check(self, problem: Problem) -> None:
        """As the verifier's own."""
        self.verifier.check(problem)


def brevity(response: str, reference: str) -> float:
    """1 for an empty response, 0.5 at the length of the reference, 0 from twice that length on."""
    return 1.0 - min(1.0, len(response) / (2 * max(1, len(reference))))


def ends_alike(response: str, reference: str) -> bool:
    """Whether the last character is of the kind that the reference ends with, and no blank."""
    return bool(response) and bool(reference) and _kind(response[-1]) == _kind(reference[-1])


def _kind(character: str) -> str:
    if character.isalpha():
        return "letter"
    if character.isdigit():
        return "digit"
    return "blank" if character.isspace() else "sign"


def load_quality(domain_dir: Path) -> Verifier:
    """The quality of responses to a domain's problems: of the user's oracle.py, or `Quality`."""
    config = domain_config(domain_dir)
    if "oracle" in config:
        function = config["oracle"].partition(":")[2]
        shown = own_file(domain_dir, "oracle")
        file = own_copy(domain_dir, "oracle")
        return AnswerVerifier(verifier=python_verifier(file, function, shown=shown))
    verifier = config["verifier"]
    if verifier["name"].startswith("reasoning_gym:"):
        verifier = verifier | {"options": verifier["options"] | {"partial": True}}
        return Quality(verifier=AnswerVerifier(verifier=make_verifier(verifier)))
    return Quality(verifier=load_verifier(domain_dir))


def quality_name(domain_dir: Path) -> str:
    """The name of the user's oracle, such as `python:quality`, or else of the verifier."""
    return str(domain_config(domain_dir).get("oracle", verifier_name(domain_dir)))


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A noisy annotator. With noise 0 it always says what it likes."""

    qualities: Callable[[Sequence[Problem], Sequence[str]], list[float]]
    """Quality in [0, 1] of each response to its problem: `scores` of a pool with `by="oracle"`."""
    noise: float = 1.0
    """Temperature of the choice, in logits."""
    seed: int = 0

    def prefer(self, problem: Problem, a: str, b: str) -> tuple[int, int]:
        """Which is better, 0 for `a` and 1 for `b`, and how clearly, from 1 (marginal) to 4.

        P(a) = sigmoid(5 (quality(a) - quality(b)) / noise). Pairs are judged one by one: with
        noise, three of them may go round in a circle. Equal texts give (0, 1).
        """
        if a == b:
            return 0, 1
        # One order of the two, whichever was named first.
        low, high = sorted((a, b))
        of_low, of_high = self.qualities([problem, problem], [low, high])
        draw = uniform(self.seed, problem, "prefer", low, high)
        # With logistic noise it is above 0 as often as Bradley and Terry have it.
        margin = SCALE * (of_low - of_high) + self.noise * math.log(draw / (1 - draw))
        prefers_low = margin > 0
        if margin == 0:
            # Equals without noise: one order of all texts.
            of_low, of_high = (uniform(self.seed, problem, "tie", text) for text in (low, high))
            prefers_low = of_low > of_high
        strength = 1 + sum(abs(margin) >= bound for bound in STRENGTHS)
        return (0 if prefers_low == (a == low) else 1), strength

    def rates(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """5 quality + noise Gumbel of each response, with a Gumbel variable of mean 0."""
        found = self.qualities(problems, responses)
        return [
            SCALE * quality + self.noise * self._gumbel(problem, response)
            for problem, response, quality in zip(problems, responses, found, strict=True)
        ]

    def _gumbel(self, problem: Problem, response: str) -> float:
        draw = uniform(self.seed, problem, "rate", response)
        return -math.log(-math.log(draw)) - _GUMBEL_MEAN


def uniform(seed: int, problem: Problem, *parts: str) -> float:
    """A number in (0, 1) that follows from a seed, a problem (domain, id, mode) and texts."""
    key = [seed, problem["domain"], problem["id"], problem.get("mode"), *parts]
    digest = hashlib.sha256(json.dumps(key).encode("ascii")).digest()
    # Half a step from both ends, where the logarithms of the callers are infinite.
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def demonstrate(
    problem: Problem,
    others: Sequence[Problem],
    score: Callable[[str, Problem], float],
    *,
    noise: float,
    seed: int,
) -> str:
    """The row's demonstration, or with probability `noise` one that its verifier finds wrong.

    A wrong one gives the answer of one of the `others` (rows of the same domain, in the same mode),
    or slips in a character of its own: it keeps the domain's form. What is wrong at one noise is
    wrong at every higher one.

    Raises:
        StageError: no slip is wrong, because the verifier accepts all of them.
    """
    if uniform(seed, problem, "demonstrate") >= noise:
        return str(problem["demo"])
    draw = random.Random(f"{seed} {problem['domain']} {problem['id']} {problem.get('mode')}")
    for _, text in zip(range(NUM_TRIES), _slips(problem, others, draw), strict=False):
        if text != problem["demo"] and score(text, problem) < FULL_SCORE:
            return text
    raise StageError(
        f"problem {problem['id']} of domain {problem['domain']!r}: none of {NUM_TRIES} corrupted "
        "demonstrations is wrong for the domain's verifier; leave noise out of its demonstrations"
    )


def _slips(problem: Problem, others: Sequence[Problem], draw: random.Random) -> Iterator[str]:
    """Plausible wrong demonstrations without end; some may turn out right."""
    # What is thought stays; the slip is in the answer after it.
    thought, closed, answer = str(problem["demo"]).rpartition(CLOSE)
    while True:
        other = str(draw.choice(others)["demo"]).rpartition(CLOSE)[2]
        at = draw.randrange(max(1, len(answer)))
        slip = draw.choice(("other", "drop", "change", "swap"))
        if slip == "other":
            text = other
        elif slip == "drop":
            text = answer[:at] + answer[at + 1 :]
        elif slip == "change":
            text = answer[:at] + draw.choice(other or " ") + answer[at + 1 :]
        else:
            text = answer[:at] + answer[at : at + 2][::-1] + answer[at + 2 :]
        if text.strip():
            yield thought + closed + text
        else:
            yield thought + closed + other
