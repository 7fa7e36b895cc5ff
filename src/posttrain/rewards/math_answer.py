"""The verifier `math`: math-verify's `parse` and `verify`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from posttrain.engine.errors import StageError

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
        self.check(problem)
        reference = self._reference(problem["answer"])
        return float(self._verify(list(reference), self._parse(response)))

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError unless the reference answer can be read as mathematics."""
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
