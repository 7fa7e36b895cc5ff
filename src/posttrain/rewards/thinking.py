"""Thinking and answering as text: the tags, what of a response is the answer, demonstrations by mode.

A problem row may have a "mode": "think" asks for `<think>steps</think>answer`, "no_think" for the
answer alone. Without one, the response is whatever the demonstrations say (see `demo`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.engine.errors import ConfigError

Mode = Literal["think", "no_think"]
MODES: tuple[Mode, ...] = ("think", "no_think")
OPEN, CLOSE = "<think>", "</think>"

Problem = dict[str, Any]


class Scorer(Protocol):
    """A verifier, see `posttrain.rewards.verifiers.Verifier`."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """A value in [0, 1]."""
        ...

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError for a problem that cannot be judged."""
        ...


def check_mode(mode: object, *, where: str) -> Mode:
    """Returns the mode. Raises ConfigError for anything but think and no_think."""
    for known in MODES:
        if mode == known:
            return known
    raise ConfigError(f"{where}: mode = {mode!r} is not a mode; choices: {', '.join(MODES)}")


def visible(response: str, mode: str | None) -> str | None:
    """What a verifier judges of a response; None where it has given no answer in its mode.

    think: what follows the last `</think>`; without one there is no answer yet. no_think: the
    response, unless it thinks all the same. Without a mode: the response as it is.
    """
    if mode == "think":
        _, closed, answer = response.rpartition(CLOSE)
        return answer.lstrip() if closed else None
    if mode == "no_think" and (OPEN in response or CLOSE in response):
        return None
    return response


@dataclass(frozen=True, kw_only=True)
class AnswerVerifier:
    """A verifier that sees the answer alone, by the mode of the problem row."""

    verifier: Scorer

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """The score of what is `visible` of the response; 0 where it has no answer in its mode."""
        answer = visible(response, problem.get("mode"))
        return 0.0 if answer is None else self.verifier.score(answer, problem)

    def check(self, problem: Mapping[str, Any]) -> None:
        """As the verifier's own."""
        self.verifier.check(problem)


def demonstration(problem: Mapping[str, Any], mode: str | None = None) -> str | None:
    """The demonstration of a problem in a mode; None where the row has none.

    think: `<think>thought</think>direct`; no_think: `direct`; no mode: `demo`. `direct` (the answer
    without its steps) is `demo` where the row has none of its own.
    """
    if mode is None:
        return problem.get("demo")
    answer = problem.get("direct", problem.get("demo"))
    if mode == "no_think" or answer is None:
        return answer
    thought = problem.get("thought")
    return None if thought is None else f"{OPEN}{thought}{CLOSE}{answer}"


def in_modes(problems: Sequence[Problem], modes: Iterable[str]) -> list[Problem]:
    """Every problem once in each mode, with its demonstration in that mode; no mode: as they are.

    The rows of one problem follow each other and keep its id.
    """
    modes = tuple(modes)
    if not modes:
        return list(problems)
    return [
        problem | {"mode": mode, "demo": demonstration(problem, mode)}
        for problem in problems
        for mode in modes
    ]
