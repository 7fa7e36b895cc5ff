"""The verifier `math`: math-verify's `parse` and `verify`, in a process of its own.

math-verify stops runaway expressions (a response of `9^9^9` keeps sympy busy for ever) by SIGALRM.
That works only on the main thread (elsewhere it raises), takes the signal from everybody else, and
cannot stop a computation inside C code. A process can be asked from any thread and be killed; it is
started by the first response that is not literally the answer, and ends with the verifier. It costs
one round trip through a pipe, small beside the parsing.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import posttrain
from posttrain.engine.errors import StageError

START_SECONDS = 120.0
"""How long the worker may take to import sympy, on a machine that is busy."""


class MathVerifier:
    """1.0 where the last expression of the response equals the reference answer, else 0.0."""

    name = "math"

    def __init__(self, *, seconds: float = 20.0) -> None:
        """`seconds`: a response that takes longer than this counts as wrong.

        math-verify gives up by itself after 5 s for each of a handful of steps; this limit is for
        what it cannot interrupt.
        """
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """1.0 or 0.0. Raises StageError where the problem's reference answer is not mathematics."""
        answer = problem["answer"]
        if response.strip() == answer.strip():
            return 1.0
        return self._ask(response, problem)

    def check(self, problem: Mapping[str, Any]) -> None:
        """Raises StageError unless the reference answer can be read as mathematics."""
        self._ask(None, problem)

    def close(self) -> None:
        """Ends the worker; the next score starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, response: str | None, problem: Mapping[str, Any]) -> float:
        request = json.dumps({"answer": problem["answer"], "response": response})
        with self._lock:
            # A second try: the system may have killed an innocent worker for memory.
            reply = self._exchange(request) or self._exchange(request)
        if reply is None or "timeout" in reply:
            return 0.0
        if "unreadable" in reply:
            raise StageError(
                f"problem {problem['id']}: the math verifier cannot read the reference answer "
                f"{problem['answer']!r}; give a number or LaTeX, or use the exact or regex verifier"
            )
        return float(reply["score"])

    def _worker(self) -> subprocess.Popen[bytes]:
        """The running worker; starts one where there is none."""
        if self._process is not None:
            return self._process
        root = str(Path(posttrain.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._finalizer = weakref.finalize(self, _stop, self._process)
        if self._read(self._process, START_SECONDS) != {"ready": True}:
            raise StageError(
                "the math verifier's process did not start; its message stands above. "
                "Check that math-verify is installed: pip install 'math-verify>=0.9,<0.10'"
            )
        return self._process

    def _exchange(self, request: str) -> dict[str, Any] | None:
        """One request and its reply: {"timeout": true} where none came in time, None where the
        worker died over it."""
        process = self._worker()
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            return self._read(process, self._seconds)
        except BrokenPipeError:
            self.close()
            return None
        except BaseException:
            # After Ctrl-C a reply stays in the pipe; the next request would take it for its own.
            self.close()
            raise

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else b""
        if not line:
            self.close()
            return None if ready else {"timeout": True}
        reply: dict[str, Any] = json.loads(line)
        return reply


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker and takes its exit status, so that it leaves neither a process nor a pipe."""
    process.kill()
    with process:
        pass
