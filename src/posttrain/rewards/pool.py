"""Verification beside the work of a stage: slow verifiers run in processes of their own.

    stage                                     worker (pool_worker.py), a plain interpreter
    -----                                     ------
    submit -> thread  -- rows of one domain ->  load_judge(domain)
              Future  <- a score per row ----   score, row by row

exact, regex, choice and most of reasoning-gym judge an answer in less time than it takes to send it
somewhere, so these are called at once, where they are. The others go to the workers: math, python
and the reasoning-gym datasets in `gym.SLOW`. The scores are the same either way.

A worker belongs to the process group of the stage and reads from it: it ends with the stage,
whatever ends the stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import posttrain
from posttrain.engine.errors import StageError
from posttrain.rewards.gym import SLOW
from posttrain.rewards.oracle import judge_name, load_judge

Problem: TypeAlias = Mapping[str, Any]

SECONDS = 300.0
"""How long a python verifier may take over one answer, and a worker to start."""
GYM_SECONDS = 20.0
"""After this long a response counts as wrong under a reasoning-gym verifier, as under math: it is
an expression that cannot be evaluated, such as 9**9**9**9."""


class VerifierPool:
    """The verifiers of some domains. Close it, or use it as a context manager."""

    def __init__(
        self,
        domains: Mapping[str, Path],
        *,
        num_workers: int,
        judge: Literal["verifier", "oracle"] = "verifier",
        seconds: float = SECONDS,
        gym_seconds: float = GYM_SECONDS,
    ) -> None:
        """`domains`: name -> the domain's artifact. Starts `num_workers` processes if one of the
        verifiers is slow, and does not wait for them. `judge = "oracle"`: scores are what the
        hidden taste of the domains' oracles likes (`rewards/oracle.py`). Raises ConfigError for a
        verifier that does not load."""
        names = {domain: judge_name(path, judge) for domain, path in domains.items()}
        slow = {domain: str(domains[domain]) for domain, name in names.items() if is_slow(name)}
        self.domains = tuple(domains)
        self._inline = {d: load_judge(path, judge) for d, path in domains.items() if d not in slow}
        limits = {d: gym_seconds if _is_gym(names[d]) else seconds for d in slow}
        self._workers = [
            _Worker(slow, names, limits, judge) for _ in range(num_workers if slow else 0)
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
        if domain not in self._inline:
            return self._threads.submit(self._score, domain, list(texts), list(problems))
        done: Future[list[float]] = Future()
        score = self._inline[domain].score
        try:
            done.set_result([score(t, p) for t, p in zip(texts, problems, strict=True)])
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

    def close(self) -> None:
        """End the workers, also in the middle of an answer."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.release()

    def _score(self, domain: str, texts: list[str], problems: list[Problem]) -> list[float]:
        worker = self._idle.get()
        try:
            return worker.scores(domain, texts, problems)
        finally:
            self._idle.put(worker)


def is_slow(name: str) -> bool:
    """Whether the verifier of that name is worth a process of its own."""
    kind, _, argument = name.partition(":")
    return kind in ("math", "python") or (kind == "reasoning_gym" and argument in SLOW)


def _is_gym(name: str) -> bool:
    return name.startswith("reasoning_gym:")


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(
        self,
        domains: Mapping[str, str],
        names: Mapping[str, str],
        limits: Mapping[str, float],
        judge: str,
    ) -> None:
        self._domains, self._names, self._limits = domains, names, limits
        self._judge = judge
        self._closed = False
        self._ready = False
        """Whether the process has said that it is."""
        self._buffer = b""
        """What it has said, after the last line that was read."""
        self._start()

    def scores(self, domain: str, texts: list[str], problems: list[Problem]) -> list[float]:
        """The score of each text. Raises StageError, see `VerifierPool.submit`."""
        found: list[float] = []
        while len(found) < len(texts):
            if self._process.poll() is not None:
                self.release()
                self._start()
            rest = list(zip(texts, problems, strict=True))[len(found) :]
            found += self._exchange(domain, rest)
        return found

    def close(self) -> None:
        """End the process; a thread that waits for it gets a StageError."""
        self._closed = True
        self._kill()

    def release(self) -> None:
        """Close the pipes of a process that has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, domain: str, rows: list[tuple[str, Problem]]) -> Iterator[float]:
        """Scores of `rows` in order; the last one given is of a row that took too long."""
        subject = f"domain {domain!r}: its verifier {self._names[domain]}"
        if not self._ready and self._read(SECONDS) != {"ready": True}:
            raise StageError(
                f"{subject} could not be asked: the process for it did not start. Its message "
                "stands in the log of the stage"
            )
        self._ready = True
        self._send({"domain": domain, "rows": rows})
        for text, problem in rows:
            over = f"over problem {problem['id']}; response was {text[:200]!r}"
            reply = self._read(self._limits[domain])
            if reply is None:
                raise StageError(f"{subject} {self._death()}, {over}")
            if "error" in reply:
                raise StageError(reply["error"], reply["exit_code"])
            if "score" in reply:
                yield float(reply["score"])
                continue
            self._kill()
            if not _is_gym(self._names[domain]):
                raise StageError(
                    f"{subject} took longer than {self._limits[domain]:g} s {over}. Give up "
                    "earlier in it, and return 0.0 for a response that cannot be judged"
                )
            yield 0.0
            return

    def _start(self) -> None:
        if self._closed:
            raise StageError("the verifiers were closed while answers were still being verified")
        root = str(Path(posttrain.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._ready, self._buffer = False, b""
        module = "posttrain.rewards.pool_worker"
        self._process = subprocess.Popen(
            # -P: a queue.py in the current directory is not the module that is meant.
            [sys.executable, "-P", "-m", module, json.dumps(self._domains), self._judge],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        if self._closed:  # in the meantime, by another thread
            self._kill()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        content = memoryview(json.dumps(request).encode("ascii") + b"\n")
        # A process that is gone is noticed when its reply is read.
        with contextlib.suppress(BrokenPipeError):
            while content:
                content = content[self._process.stdin.write(content) :]

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next reply: {"timeout": true} where none came in time, None where none can come."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            part = self._process.stdout.read(65536) if ready else b""
            if not part:
                return None if ready else {"timeout": True}
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _death(self) -> str:
        """How the process ended, as the end of a sentence."""
        if self._closed:
            return "was stopped"
        code = self._process.wait()
        if code >= 0:
            return f"ended its process with status {code}"
        memory = " (if nobody sent it, memory ran out)" if -code == signal.SIGKILL else ""
        return f"crashed its process by signal {-code} ({signal.Signals(-code).name}){memory}"

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
