"""Verifiers: response and problem in, a score in [0, 1] out, with no model.

    math                          equal as mathematics (math-verify)
    exact                         equal text after stripping; `extract` takes a part first
    regex                         a pattern with {answer}, or the answer itself as the pattern
    choice                        the letter A to J that the response settles on
    reasoning_gym:<name>          reasoning-gym's own score_answer
    python:<file.py>:<function>   a user's function (response, problem) -> float
    none                          there is no verifier: `VerifierPool` says NaN

A problem is one row of a domain: {"id", "domain", "prompt", "answer", "demo", "meta"}. Where it has
a "mode", the verifier of a domain's artifact sees the answer alone
(`posttrain/backends/prompting.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.backends.prompting import visible
from posttrain.engine.errors import ConfigError, StageError, choices_text
from posttrain.rewards.formats import find_format
from posttrain.rewards.gym import gym_verifier
from posttrain.rewards.python_file import python_verifier
from posttrain.rewards.spec import OPTIONS, VerifierSpec


class Verifier(Protocol):
    """What every verifier offers."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """A value in [0, 1]. Raises StageError where the problem or the user's code is broken."""
        ...

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError where no response can be judged against this problem's answer."""
        ...


_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_WORD = r"[^\W\d_]{2,}"
_WORDS = re.compile(rf"{_WORD}(?:[ '-]+{_WORD})*")
_SURE = re.compile(r"[A-Z][a-z]{2,}|No|yes|no|true|false|none|nan|NaN|(?=[a-z]*[aeiou])[a-z]{5,}")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def words_of(answer: str) -> str | None:
    """The words of an answer such as Yes, See figure or \\text{even}; None where it may be
    mathematics, as xyz may. As mathematics words are products of letters, and their anagrams right.
    """
    shown = answer.strip().strip("$").strip()
    plain = _plain(answer)
    if not _WORDS.fullmatch(plain):
        return None
    certain = _TEXT.fullmatch(shown) or " " in plain or _SURE.fullmatch(shown.rstrip("."))
    return plain if certain else None


def _plain(text: str) -> str:
    text = _TEXT.sub(r"\1", text.strip().strip("$").strip())
    return " ".join(text.strip(" .").casefold().split())


def _says(response: str, words: str) -> bool:
    """Whether the last box of a response, or without one its end, is these words."""
    boxes = _BOXED.findall(response)
    if boxes:
        return _plain(boxes[-1]) == words
    end = rf"(?:^|\bis |[:=] ?){re.escape(words)}$"
    return (
        re.search(end, _plain(response).replace("*", "").replace("$", "").rstrip(" .!")) is not None
    )


_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")


class MathVerifier:
    """1.0 where the last expression of the response equals the reference answer, else 0.0.

    Only for the main thread of a process: math-verify stops a runaway expression (`9^9^9^9` keeps
    sympy busy for ever) by SIGALRM, after 5 s for each of a handful of steps. What it cannot
    interrupt, a computation inside C code, is for whoever runs the process: `VerifierPool`.
    """

    def __init__(self) -> None:
        # Not at the top of the file: sympy takes half a second, and a plan imports this module.
        import math_verify

        self._parse, self._verify = math_verify.parse, math_verify.verify
        self._reference = functools.lru_cache(maxsize=4096)(self._read_reference)

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 or 0.0. Raises StageError where the problem's reference answer is not mathematics."""
        if response.strip() == problem["answer"].strip():
            return 1.0
        words = words_of(problem["answer"])
        if words is not None:
            return float(_says(response, words))
        self.check(problem)
        reference = self._reference(problem["answer"])
        return float(self._verify(list(reference), self._parse(response)))

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError unless the reference answer can be read as mathematics."""
        if words_of(problem["answer"]) is not None:
            return
        # math-verify falls back to the text itself, which no equal expression would ever match.
        if all(isinstance(item, str) for item in self._reference(problem["answer"])):
            raise StageError(
                f"problem {problem['id']}: the math verifier cannot read the reference answer "
                f"{problem['answer']!r}; give a number or LaTeX, or use the exact or regex verifier"
            )

    def _read_reference(self, answer: str) -> tuple[Any, ...]:
        """The answer as sympy objects. Bare LaTeX is only seen as LaTeX inside `$`."""
        marked = f"${answer}$"
        first, second = (answer, marked) if _MARKED.search(answer) else (marked, answer)
        return tuple(self._parse(first) or self._parse(second))


@dataclass(frozen=True, kw_only=True)
class ExactVerifier:
    """1.0 where the stripped response (or the extracted part of it) is the stripped answer."""

    case_sensitive: bool = True
    extract: re.Pattern[str] | None = None
    """The last match counts: its group if it has one, else the whole. No match scores 0."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 or 0.0."""
        if self.extract is not None:
            matches = list(self.extract.finditer(response))
            if not matches:
                return 0.0
            response = matches[-1].group(self.extract.groups) or ""
        given, wanted = response.strip(), problem["answer"].strip()
        if not self.case_sensitive:
            given, wanted = given.casefold(), wanted.casefold()
        return float(given == wanted)

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError for an empty answer, which an empty response would match."""
        if not problem["answer"].strip():
            raise StageError(f"problem {problem['id']}: the answer is empty")


@dataclass(frozen=True, kw_only=True)
class RegexVerifier:
    """1.0 where the pattern is found anywhere in the response; ^ and $ anchor it."""

    pattern: str | None
    """{answer} in it stands for the escaped answer; None: the answer itself is the pattern."""
    case_sensitive: bool = True

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 or 0.0."""
        return float(self._compiled(problem).search(response) is not None)

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError for an answer that is no pattern, or one that accepts everything."""
        if self._compiled(problem).search("") is not None:
            raise StageError(
                f"problem {problem['id']}: the pattern {self._compiled(problem).pattern!r} "
                "accepts an empty response, so every response would be right"
            )

    def _compiled(self, problem: Mapping[str, Any]) -> re.Pattern[str]:
        answer = problem["answer"]
        pattern = (
            answer if self.pattern is None else self.pattern.replace("{answer}", re.escape(answer))
        )
        flags = 0 if self.case_sensitive else re.IGNORECASE
        try:
            return re.compile(pattern, flags)
        except re.error as error:
            raise StageError(
                f"problem {problem['id']}: {pattern!r} is not a regular expression: {error}"
            ) from error


_ANNOUNCED = re.compile(
    r"(?i:\banswer\b|\bchoice\b|\boption\b)(?i:\s+is|\s*:|\s*=|\s)\s*"
    r"(?:\\boxed\{|\*\*)?\(?(?:([A-J])|([a-j])(?!\s+[a-z]))(?![A-Za-z0-9'])"
)
_BRACKETED = re.compile(r"(?:\(|\\boxed\{)\s*([A-Ja-j])\s*[)}]")
# "A cat" and "I think" are words, not choices.
_STANDING = re.compile(r"(?<![A-Za-z0-9'])(?:([B-HJ])|([AI])(?!\s+[a-z]))(?![A-Za-z0-9'])")
_ONLY = re.compile(r"\W*([A-Ja-j])\W*")


def choice_letter(response: str) -> str | None:
    """The letter that a response settles on, upper case; None where there is none.

    In this order: the response is nothing but a letter; the last "answer is X" (or "answer: X",
    "option X"); the last "(X)" or boxed X; the last capital letter that stands alone.
    """
    only = _ONLY.fullmatch(response)
    if only:
        return only.group(1).upper()
    for pattern in (_ANNOUNCED, _BRACKETED, _STANDING):
        matches = list(pattern.finditer(response))
        if matches:
            letter: str = matches[-1].group(matches[-1].lastindex or 0)
            return letter.upper()
    return None


@dataclass(frozen=True, kw_only=True)
class ChoiceVerifier:
    """1.0 where the response settles on the answer's letter."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 or 0.0."""
        return float(choice_letter(response) == self._answer(problem))

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError unless the answer is one letter from A to J."""
        self._answer(problem)

    def _answer(self, problem: Mapping[str, Any]) -> str:
        match = _ONLY.fullmatch(problem["answer"])
        if match is None:
            raise StageError(
                f"problem {problem['id']}: the choice verifier needs one letter from A to J as the "
                f"answer, not {problem['answer']!r}"
            )
        return match.group(1).upper()


@dataclass(frozen=True, kw_only=True)
class AnswerVerifier:
    """A verifier that sees the answer alone, by the mode of the problem row."""

    verifier: Verifier

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """The score of what is `visible` of the response; 0 where it has no answer in its mode."""
        answer = visible(response, problem.get("mode"))
        return 0.0 if answer is None else self.verifier.score(answer, problem)

    def check(self, problem: Mapping[str, Any]) -> None:
        """As the verifier's own."""
        self.verifier.check(problem)


def make_verifier(config: Mapping[str, Any], runtime: Mapping[str, Any] | None = None) -> Verifier:
    """The verifier of a resolved config {"name", "options"}.

    A python verifier takes its file from `runtime["verifier_file"]`.

    Raises:
        ConfigError: a name that `resolve_verifier` did not make, or a file that does not load.
    """
    spec = VerifierSpec(name=config["name"], options=config["options"])
    options = spec.options
    match spec.kind:
        case "math":
            return MathVerifier()
        case "exact":
            extract = options.get("extract")
            return ExactVerifier(
                case_sensitive=options.get("case_sensitive", True),
                extract=None if extract is None else re.compile(extract),
            )
        case "regex":
            return RegexVerifier(
                pattern=options.get("pattern"), case_sensitive=options.get("case_sensitive", True)
            )
        case "choice":
            return ChoiceVerifier()
        case "reasoning_gym":
            return gym_verifier(
                spec.argument,
                format=find_format(options.get("format", "plain"), where=f"verifier {spec.name}"),
                params=options.get("params", {}),
                partial=options.get("partial", False),
            )
        case "python":
            given = runtime or {}
            file, shown = Path(given["verifier_file"]), given.get("verifier_shown")
            return python_verifier(file, spec.argument, shown=shown)
    raise ConfigError(f"unknown verifier {spec.name!r}; {choices_text(spec.kind, OPTIONS)}")


def domain_config(domain_dir: Path) -> dict[str, Any]:
    """The identity of a domain's artifact, from its domain.json: source, verifier, maybe oracle."""
    record = json.loads((domain_dir / "domain.json").read_text(encoding="utf-8"))
    config: dict[str, Any] = record["config"]
    return config


def own_file(domain_dir: Path, part: str) -> str | None:
    """What the user calls the file behind "verifier" or "oracle", of which an artifact has a copy;
    None where an older artifact does not say."""
    record = json.loads((domain_dir / "domain.json").read_text(encoding="utf-8"))
    found: str | None = record.get("files", {}).get(part)
    return found


def own_copy(directory: Path, part: str) -> Path:
    """Where an artifact has its copy of the user's file behind "verifier" or "oracle": in a
    directory of its own where files lie beside it that it reads."""
    beside = directory / part / f"{part}.py"
    return beside if beside.is_file() else directory / f"{part}.py"


def verifier_name(domain_dir: Path) -> str:
    """The name of the verifier of a domain's artifact, such as `math` or `python:score`."""
    return str(domain_config(domain_dir)["verifier"]["name"])


def load_verifier(domain_dir: Path) -> Verifier:
    """The verifier of a domain's artifact, from its domain.json (for python, its verifier.py).

    It sees what `posttrain.backends.prompting.visible` leaves of a response.
    """
    config = domain_config(domain_dir)["verifier"]
    runtime = {
        "verifier_file": str(own_copy(domain_dir, "verifier")),
        "verifier_shown": own_file(domain_dir, "verifier"),
    }
    return AnswerVerifier(verifier=make_verifier(config, runtime))
