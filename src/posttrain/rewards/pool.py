"""Verification beside the work of a stage: slow verifiers run in processes of their own.

    stage                                     worker (pool_worker.py), a plain interpreter
    -----                                     ------
    submit -> thread  -- rows of one domain ->  load_verifier(domain)
              Future  <- a score per row ----   score, row by row

exact, regex, choice and most of reasoning-gym judge an answer in less time than it takes to send it
somewhere, so these are called at once, where they are. The others go to the workers: math, python
and the reasoning-gym datasets in `gym.SLOW`. The scores are the same either way.

A response over which math or reasoning-gym takes too long, or dies, is wrong: it is an expression
that cannot be evaluated, such as 9**9**9**9. A python verifier should know its own limits: there
the same is an error, which names the response.

A worker belongs to the process group of the stage and reads from it: it ends with the stage,
whatever ends the stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Self, TypeAlias

import posttrain
from posttrain.engine.errors import StageError
from posttrain.rewards.gym import SLOW
from posttrain.rewards.oracle import load_quality, quality_name
from posttrain.rewards.verifiers import load_verifier, verifier_name

Problem: TypeAlias = Mapping[str, Any]
Row: TypeAlias = tuple[str | None, Problem]
"""A response and its problem; without a response the problem itself is to be checked."""

PYTHON_SECONDS = 300.0
"""How long a python verifier may take over one answer, and a worker to start."""
RUNAWAY_SECONDS = 20.0
"""How long math and reasoning-gym may. math-verify gives up by itself after 5 s for each step."""


class VerifierPool:
    """The verifiers of some domains. Close it, or use it as a context manager."""

    def __init__(
        self,
        domains: Mapping[str, Path],
        *,
        num_workers: int,
        oracle: bool = False,
        python_seconds: float = PYTHON_SECONDS,
        runaway_seconds: float = RUNAWAY_SECONDS,
    ) -> None:
        """`domains`: name -> the domain's artifact. Starts `num_workers` processes if one of the
        verifiers is slow, and does not wait for them. `oracle`: scores are what the hidden taste of
        the domains' oracles likes (`rewards/oracle.py`), not the verifiers'. Raises ConfigError for
        a verifier that does not load."""
        name_of, load = (quality_name, load_quality) if oracle else (verifier_name, load_verifier)
        names = {domain: name_of(path) for domain, path in domains.items()}
        slow = {domain: name for domain, name in names.items() if is_slow(name)}
        self.domains = tuple(domains)
        self._inline = {d: load(path) for d, path in domains.items() if d not in slow}
        limits = {d: python_seconds if _is_python(n) else runaway_seconds for d, n in slow.items()}
        paths = json.dumps({domain: str(domains[domain]) for domain in slow})
        arguments = [paths, "oracle" if oracle else "verifier"]
        self._workers = [
            _Worker(arguments, slow, limits) for _ in range(num_workers if slow else 0)
        ]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="verify")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self, domain: str, texts: Sequence[str], problems: Sequence[Problem]
    ) -> Future[list[float]]:
        """Begin to score `texts`, responses to `problems` of one domain, any number at a time.

        The future's `result()` waits for the scores, in the order of the texts. It raises
        StageError where a problem, the user's code or its process is broken.
        """
        rows = list(zip(texts, problems, strict=True))
        if domain not in self._inline:
            return self._threads.submit(self._ask_worker, domain, rows)
        done: Future[list[float]] = Future()
        try:
            done.set_result([self._inline[domain].score(t, p) for t, p in rows])
        except Exception as error:
            done.set_exception(error)
        return done

    def scores(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """The score of each text, a response to the problem beside it, of any domains; waits."""
        pending = [
            self.submit(problem["domain"], [text], [problem])
            for problem, text in zip(problems, texts, strict=True)
        ]
        return [found.result()[0] for found in pending]

    def check(self, domain: str, problems: Sequence[Problem]) -> None:
        """Raises StageError for the first problem whose answer the verifier cannot judge by."""
        if domain not in self._inline:
            self._ask_worker(domain, [(None, problem) for problem in problems])
            return
        for problem in problems:
            self._inline[domain].check(problem)

    def close(self) -> None:
        """End the workers, also in the middle of an answer."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.release()

    def _ask_worker(self, domain: str, rows: Sequence[Row]) -> list[float]:
        worker = self._idle.get()
        try:
            return worker.scores(domain, rows)
        finally:
            self._idle.put(worker)


def is_slow(name: str) -> bool:
    """Whether the verifier of that name is worth a process of its own."""
    kind, _, argument = name.partition(":")
    return kind in ("math", "python") or (kind == "reasoning_gym" and argument in SLOW)


def _is_python(name: str) -> bool:
    return name.startswith("python:")


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(
        self, arguments: Sequence[str], names: Mapping[str, str], limits: Mapping[str, float]
    ) -> None:
        """`arguments`: of the command; `names` and `limits` (seconds per row) by domain."""
        self._arguments, self._names, self._limits = arguments, names, limits
        self._closed = False
        self._ready = False
        """Whether the process has said that it is."""
        self._start()

    def scores(self, domain: str, rows: Sequence[Row]) -> list[float]:
        """The score of each row. Raises StageError, see `VerifierPool.submit`."""
        found: list[float] = []
        died_over = -1
        while len(found) < len(rows):
            self._request(domain, rows[len(found) :])
            for row in rows[len(found) :]:
                reply = self._read(self._limits[domain])
                if reply is not None and "error" in reply:
                    raise StageError(reply["error"], reply["exit_code"])
                if reply is not None and "score" in reply:
                    found.append(float(reply["score"]))
                    continue
                late = reply is not None
                if late:
                    self._process.kill()
                # The connection ends first: a process that is still ending takes no request.
                self._process.wait()
                if self._closed or row[0] is None or _is_python(self._names[domain]):
                    raise StageError(self._broken(domain, row, late))
                if late or died_over == len(found):
                    found.append(0.0)
                else:
                    # Once more: the system may have killed an innocent process for memory.
                    died_over = len(found)
                break
        return found

    def close(self) -> None:
        """End the process; a thread that waits for it gets a StageError."""
        self._closed = True
        self._kill()

    def release(self) -> None:
        """Close the connection to a process that has ended."""
        self._connection.close()

    def _request(self, domain: str, rows: Sequence[Row]) -> None:
        """Send rows to the process, to a new one where it has ended."""
        if self._process.poll() is not None:
            self.release()
            self._start()
        if not self._ready and self._read(PYTHON_SECONDS) != {"ready": True}:
            raise StageError(
                f"domain {domain!r}: its verifier {self._names[domain]} could not be asked: the "
                "process for it did not start. Its message stands in the log of the stage"
            )
        self._ready = True
        # A process that is gone is noticed when its reply is read.
        with contextlib.suppress(OSError):
            self._connection.send({"domain": domain, "rows": rows})

    def _broken(self, domain: str, row: Row, late: bool) -> str:
        """The message for a row that got no score: in time, or ever because the process ended."""
        response, problem = row
        advice = ""
        if response is None:
            over = f"over the answer of problem {problem['id']}"
        else:
            over = f"over problem {problem['id']}; response was {response[:200]!r}"
        if self._closed:
            ending = "was stopped"
        elif late:
            ending = f"took longer than {self._limits[domain]:g} s"
            if response is not None:
                advice = (
                    ". Give up earlier in it, and return 0.0 for a response that cannot be judged"
                )
        else:
            ending = _how_it_ended(self._process.returncode)
        return f"domain {domain!r}: its verifier {self._names[domain]} {ending} {over}{advice}"

    def _start(self) -> None:
        if self._closed:
            raise StageError("the verifiers were closed while answers were still being verified")
        root = str(Path(posttrain.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._ready = False
        self._connection, theirs = Pipe()
        handle = theirs.fileno()
        module = "posttrain.rewards.pool_worker"
        self._process = subprocess.Popen(
            # -P: a queue.py in the current directory is not the module that is meant.
            [sys.executable, "-P", "-m", module, str(handle), *self._arguments],
            # A verifier reads nothing, and prints to standard error, the log of the stage.
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[handle],
            env={**os.environ, "PYTHONPATH": path},
        )
        # Now the process alone has it, so that the connection ends when the process does.
        theirs.close()
        if self._closed:  # in the meantime, by another thread
            self._kill()

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next reply: {"timeout": true} where none came in time, None where none can come."""
        try:
            if not self._connection.poll(seconds):
                return {"timeout": True}
            reply: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            return None
        return reply

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended its process with status {code}"
    memory = " (if nobody sent it, memory ran out)" if -code == signal.SIGKILL else ""
    return f"crashed its process by signal {-code} ({signal.Signals(-code).name}){memory}"
