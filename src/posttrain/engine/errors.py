"""Errors a user can meet. Each one says what is wrong, with which value, and how to go on; none
needs a traceback."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class PosttrainError(Exception):
    """Base of every error with a message meant for the user.

    `exit_code` is the status a command line ends with: 2 for a mistake in what was asked, 1 for
    work that failed.
    """

    exit_code: int = 2


class ConfigError(PosttrainError, ValueError):
    """A value is wrong: the message names the field, the value, the valid choices."""


class GraphError(PosttrainError, ValueError):
    """The graph of stages is not one: a cycle, an unknown input, a bad name."""


class StoreError(PosttrainError, RuntimeError):
    """The store cannot do what was asked: unreadable, full, ambiguous, made by a newer version."""


class StageError(PosttrainError, RuntimeError):
    """One or more stages failed while running.

    `exit_code` is 1, or the exit code of the PosttrainError that the stage itself raised.
    """

    exit_code = 1

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Waiting(PosttrainError):
    """A stage needs a file that somebody has yet to fill in; work goes on when that is done.

    A stage raises it with the file, the run with the messages of all such stages. Nothing failed.
    """

    exit_code = 3

    def __init__(self, message: str, *, file: Path | None = None) -> None:
        super().__init__(message)
        self.file = file


class Interrupted(PosttrainError):
    """The run was stopped. What was finished is kept.

    `exit_code` is 130 where the user did (Ctrl-C), 143 where SIGTERM came (`Terminated`).
    """

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a program raises it in its handler to stop a run as Ctrl-C does."""

    exit_code = 143


def said_by(error: BaseException) -> str:
    """Type and text of what a user's code raised, whatever making the text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def shortened(text: str, limit: int = 80) -> str:
    """A text as a message quotes it, at most `limit` characters of it."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def choices_text(value: str, choices: Iterable[str], *, label: str = "choices") -> str:
    """Returns e.g. `did you mean 'math'? choices: choice, exact, math`.

    The first part is left out where nothing is close. A long list is cut to the 12 closest
    names, so that one typing error does not fill the screen.
    """
    names = sorted(set(choices))
    if not names:
        return f"{label}: none"
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    shown = names
    rest = ""
    if len(names) > 24:
        shown = difflib.get_close_matches(value, names, n=12, cutoff=0.0)
        rest = f" and {len(names) - len(shown)} more"
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"{question}{label}: {', '.join(shown)}{rest}"
