"""Thinking as text: its tags, what of a response is the answer, demonstrations by mode.

A problem row may have a "mode": "think" asks for `<think>steps</think>answer`, "no_think" for the
answer alone. Without one, the response is whatever the demonstrations say (see `demo`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from posttrain.engine.errors import ConfigError

Mode = Literal["think", "no_think"]
MODES: tuple[Mode, ...] = ("think", "no_think")
OPEN, CLOSE = "<think>", "</think>"

Problem = dict[str, Any]


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


def format_answer(answer: str, mode: str | None) -> str:
    """A response that gives the answer without any thought, in the form of its mode."""
    return f"{OPEN}{CLOSE}{answer}" if mode == "think" else answer


def demonstration(problem: Mapping[str, Any], mode: str | None = None) -> str | None:
    """The demonstration of a problem in a mode; None where the row has none.

    think: `<think>thought</think>direct`; no_think: `direct`; no mode: `demo`. `direct` (the answer
    without its steps) is `demo` where the row has none of its own.
    """
    if mode is None:
        demo: str | None = problem.get("demo")
        return demo
    answer: str | None = problem.get("direct", problem.get("demo"))
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
