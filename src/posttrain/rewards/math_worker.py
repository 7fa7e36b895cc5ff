"""The process that runs math-verify: JSON requests on stdin, JSON replies on stdout, one per line.

Reply to {"answer", "response"}: {"score": 0.0 or 1.0}, or {"unreadable": true} where the reference
answer itself holds no mathematics. `math_answer` starts this module and says why it is a process.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
from typing import Any

from math_verify import parse, verify

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")


@functools.lru_cache(maxsize=4096)
def _reference(answer: str) -> tuple[Any, ...]:
    """The reference answer as sympy objects. Bare LaTeX is only seen as LaTeX inside `$`."""
    first, second = (answer, f"${answer}$") if _MARKED.search(answer) else (f"${answer}$", answer)
    return tuple(parse(first) or parse(second))


def reply(answer: str, response: str | None) -> dict[str, Any]:
    """Compares a response with the reference answer; `response` None only reads the reference."""
    reference = list(_reference(answer))
    # math-verify falls back to the text itself, which no equal expression would ever match.
    if all(isinstance(item, str) for item in reference):
        return {"unreadable": True}
    if response is None:
        return {"score": 1.0}
    return {"score": float(verify(reference, parse(response)))}


def main() -> None:
    """Serves requests until stdin closes."""
    # Ctrl-C goes to the run, which ends this process by closing its stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(reply(request["answer"], request["response"])), flush=True)


if __name__ == "__main__":
    main()
