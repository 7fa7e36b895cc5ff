"""Verification beside the work of a stage: slow verifiers run in processes of their own.

    stage                                     worker, a plain interpreter that runs this file
    -----                                     ------
    submit -> thread  -- (domain, text, problem) ->  load_verifier(domain)
              Future  <- {"score": float} --------   score

exact, regex, choice and most of reasoning-gym judge an answer in less time than it takes to send it
somewhere, so these are called at once, where they are. The others go to the workers: math, python
and the reasoning-gym datasets in `gym.SLOW`. The scores are the same either way. Responses of a
domain without a verifier have the score NaN: nobody knows.

A response over which math or reasoning-gym takes too long, or dies, is wrong: it is an expression
that cannot be evaluated, such as 9**9**9**9. A python verifier should know its own limits: there
the same is an error, which names the response.

A worker belongs to the process group of the stage and reads from it: it ends with the stage,
whatever ends the stage, and with it what its verifiers have started (`rewards/offspring.py`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import posttrain
from posttrain.engine.errors import PosttrainError, StageError
from posttrain.rewards.gym import FULL_SCORE, SLOW
from posttrain.rewards.offspring import adopt_orphans, end_below
from posttrain.rewards.oracle import load_quality, quality_name
from posttrain.rewards.own_judge import judge_name, load_judge
from posttrain.rewards.spec import UNVERIFIED
from posttrain.rewards.verifiers import Verifier, load_verifier, own_file, verifier_name
from posttrain.rewards.watching import Watch, Watched

By: TypeAlias = Literal["verifier", "oracle", "judge"]
Problem: TypeAlias = Mapping[str, Any]
Request: TypeAlias = tuple[str, str | None, Problem]
"""Domain, response, problem; without a response the problem itself is to be checked."""

PYTHON_SECONDS = START = 300.0
"""How long a python verifier may take over one answer, and a worker to start."""
RUNAWAY_SECONDS = 20.0
"""How long math and reasoning-gym may. math-verify gives up by itself after 5 s for each step."""

SHOWN = 10
"""Answers that a message names; it says how many there are in all."""

BY: Mapping[By, tuple[Callable[[Path], str], Callable[[Path], Verifier]]] = {
    "verifier": (verifier_name, load_verifier),
    "oracle": (quality_name, load_quality),
    "judge": (judge_name, load_judge),
}
"""Who scores -> what reads its name, and what loads it, from a directory."""


class VerifierPool:
    """The verifiers of some domains. Close it, or use it as a context manager."""

    def __init__(
        self,
        domains: Mapping[str, Path],
        *,
        num_workers: int,
        by: By = "verifier",
        watched: Watched | None = None,
        python_seconds: float = PYTHON_SECONDS,
        runaway_seconds: float = RUNAWAY_SECONDS,
    ) -> None:
        """`domains`: name -> the domain's artifact. Starts `num_workers` processes if one of the
        verifiers is slow, and does not wait for them. `by`: scores are what the hidden taste of the
        domains' oracles likes (`rewards/oracle.py`), or what a judge of the user's own says
        (`rewards/own_judge.py`, whose directories the `domains` then are), not the verifiers'.
        `watched`: where files that are read are noted in `opened`. Raises ConfigError for a
        verifier that does not load."""
        name_of, load = BY[by]
        names = {domain: name_of(path) for domain, path in domains.items()}
        slow = {domain: name for domain, name in names.items() if is_slow(name)}
        self.domains = tuple(domains)
        self.unverified = frozenset(d for d, name in names.items() if name == UNVERIFIED)
        """Domains that have no verifier."""
        self.opened: list[str] = []
        """Files below `watched` that were read and not declared, from there."""
        fast = [d for d in domains if d not in slow and d not in self.unverified]
        self._inline = {d: load(domains[d]) for d in fast}
        limits = {d: python_seconds if _is_python(n) else runaway_seconds for d, n in slow.items()}
        paths = json.dumps({domain: str(domains[domain]) for domain in slow})
        watch = json.dumps(None if watched is None else watched.to_json())
        subjects = {d: _subject(by, d, name, domains[d]) for d, name in slow.items()}
        self._workers = [
            _Worker([paths, by, watch], slow, subjects, limits)
            for _ in range(num_workers if slow else 0)
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
        done: Future[list[float]] = Future()
        if domain in self.unverified:
            done.set_result([math.nan] * len(rows))
            return done
        if domain not in self._inline:
            return self._threads.submit(self._ask_worker, domain, rows)
        try:
            done.set_result([self._inline[domain].score(t, p) for t, p in rows])
        except Exception as error:
            # Raised where the result is asked for, as with the workers.
            done.set_exception(error)
        return done

    def scores(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """The score of each text, a response to the problem beside it, of any domains; waits."""
        pending = [
            self.submit(problem["domain"], [text], [problem])
            for problem, text in zip(problems, texts, strict=True)
        ]
        return [found.result()[0] for found in pending]

    def check(
        self,
        domain: str,
        problems: Sequence[Problem],
        nonsense: Sequence[str] = (),
        *,
        nonsense_every: int = 1,
    ) -> None:
        """Raises StageError for problems whose answers the verifier cannot judge by, or cannot tell
        from `nonsense`, to all of which it gives full marks: the first of them, and how many there
        are. Every so many-th problem is shown the nonsense."""
        if domain in self.unverified:
            return
        faults = []
        for number, problem in enumerate(problems):
            texts = nonsense if number % nonsense_every == 0 else ()
            try:
                if domain in self._inline:
                    self._inline[domain].check(problem)
                else:
                    self._ask_worker(domain, [(None, problem)])
            except StageError as error:
                # Else it is not about the answer, and would come again with the next one.
                if not str(error).startswith(f"problem {problem['id']}:"):
                    raise
                faults.append(f"{error}; prompt: {problem['prompt'][:80]!r}")
                continue
            # The first that it refuses is enough.
            if texts and all(
                self.submit(domain, [text], [problem]).result()[0] >= FULL_SCORE for text in texts
            ):
                faults.append(
                    f"problem {problem['id']}: with the answer {problem['answer']!r:.80} the "
                    f"verifier gives full marks to nonsense, such as {texts[0]!r}; prompt: "
                    f"{problem['prompt'][:80]!r}"
                )
        if len(faults) == 1:
            raise StageError(faults[0])
        if faults:
            shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
            first = f"; the first {SHOWN}" if len(faults) > SHOWN else ""
            raise StageError(
                f"domain {domain}: {len(faults)} answers cannot be judged by{first}:{shown}"
            )

    def close(self) -> None:
        """End the workers, also in the middle of an answer."""
        for worker in self._workers:
            worker.close()
        # Before the connections: a thread may still be reading from one.
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.connection.close()

    def _ask_worker(self, domain: str, rows: Sequence[tuple[str | None, Problem]]) -> list[float]:
        worker = self._idle.get()
        try:
            return [worker.score((domain, text, problem)) for text, problem in rows]
        finally:
            self.opened += [path for path in worker.opened if path not in self.opened]
            self._idle.put(worker)


def is_slow(name: str) -> bool:
    """Whether the verifier of that name is worth a process of its own."""
    kind, _, argument = name.partition(":")
    return kind in ("math", "python") or (kind == "reasoning_gym" and argument in SLOW)


def _is_python(name: str) -> bool:
    return name.startswith("python:")


def _subject(by: By, domain: str, name: str, directory: Path) -> str:
    """What a message is about: a user's own function with the file that it stands in."""
    if by == "judge":
        return f"judges.python({domain!r})"
    file = own_file(directory, by) if _is_python(name) else None
    function = name.partition(":")[2]
    return f"domain {domain!r}: its {by} {name if file is None else f'python:{file}:{function}'}"


class _Worker:
    """One process, used by one thread at a time."""

    connection: Connection
    _process: subprocess.Popen[bytes]
    _ready: bool
    """Whether the process has said that it is."""

    def __init__(
        self,
        arguments: Sequence[str],
        names: Mapping[str, str],
        subjects: Mapping[str, str],
        limits: Mapping[str, float],
    ) -> None:
        """`arguments`: of the command; by domain the verifier's `names`, what messages call it, and
        `limits` (seconds per row)."""
        self._arguments, self._names, self._limits = arguments, names, limits
        self._subjects = subjects
        self.opened: dict[str, None] = {}
        """What its processes have read and not declared, in order."""
        self._closed = False
        self._start()

    def score(self, request: Request) -> float:
        """The score of one row. Raises StageError, see `VerifierPool.submit`."""
        domain, response, _ = request
        # Twice: the system may have killed an innocent process for memory.
        for _ in range(2):
            reply = self._ask(request)
            if reply is not None:
                # Each reply names all that its process has read.
                self.opened |= dict.fromkeys(reply.get("opened", ()))
            if reply is not None and "error" in reply:
                raise StageError(reply["error"], reply["exit_code"])
            if reply is not None and "score" in reply:
                return float(reply["score"])
            late = reply is not None
            if late:
                self._kill()
            # The connection ends first: a process that is still ending takes no request.
            self._process.wait()
            if self._closed or response is None or _is_python(self._names[domain]):
                raise StageError(self._broken(request, late))
            # It would be late again.
            if late:
                break
        return 0.0

    def close(self) -> None:
        """End the process; a thread that waits for it gets a StageError."""
        self._closed = True
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        # Stopped at first, so that it starts nothing while what it has started is being ended.
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGSTOP)
        if self._process.poll() is None:
            end_below(self._process.pid)
        self._process.kill()

    def _ask(self, request: Request) -> dict[str, Any] | None:
        """The reply to one request, as `_read`, by a new process where the last has ended."""
        domain = request[0]
        if self._process.poll() is not None:
            self.connection.close()
            self._start()
        if not self._ready:
            said = self._read(self._limits[domain] if _is_python(self._names[domain]) else START)
            if said != {"ready": True}:
                late = "was not ready in time" if said else "did not start"
                raise StageError(
                    f"{self._subjects[domain]} could not be asked: the process for it {late}. What "
                    "it said stands in the log of the stage"
                )
        self._ready = True
        # A process that is gone is noticed when its reply is read.
        with contextlib.suppress(OSError):
            self.connection.send(request)
        return self._read(self._limits[domain])

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next reply: {"timeout": true} where none came in time, None where none can come."""
        try:
            if not self.connection.poll(seconds):
                return {"timeout": True}
            reply: dict[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            return None
        return reply

    def _broken(self, request: Request, late: bool) -> str:
        """The message for a row that got no score: in time, or ever because the process ended."""
        domain, response, problem = request
        over, advice = f"over the answer of problem {problem['id']}", ""
        if response is not None:
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
        return f"{self._subjects[domain]} {ending} {over}{advice}"

    def _start(self) -> None:
        if self._closed:
            raise StageError("the verifiers were closed while answers were still being verified")
        root = str(Path(posttrain.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._ready = False
        self.connection, theirs = Pipe()
        handle = theirs.fileno()
        self._process = subprocess.Popen(
            # Not by multiprocessing, which would import the main module of the stage, and torch.
            # -P: a queue.py in the current directory is not the module that is meant.
            [sys.executable, "-P", "-m", __name__, str(handle), *self._arguments],
            # A verifier reads nothing, and prints to standard error, the log of the stage.
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[handle],
            env={**os.environ, "PYTHONPATH": path},
        )
        # Now the process alone has it, so that the connection ends when the process does.
        theirs.close()
        if self._closed:  # in the meantime, by another thread
            self.close()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended its process with status {code}"
    memory = " (if nobody sent it, memory ran out)" if -code == signal.SIGKILL else ""
    return f"crashed its process by signal {-code} ({signal.Signals(-code).name}){memory}"


def serve(
    connection: Connection, domains: Mapping[str, str], by: By, watched: Watched | None
) -> None:
    """The work of a worker: answer requests until the connection ends, which ends the process.

    Sends {"ready": True} at first, then for each `Request` {"score": float} or
    {"error": message, "exit_code": int}, with "opened" where it read files that it did not declare.
    `domains`: name -> the domain's artifact.
    """
    # Ctrl-C goes to the run, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
    watch = None if watched is None else Watch(watched)

    @functools.cache
    def verifier_of(domain: str) -> Verifier:
        with watch.active() if watch else contextlib.nullcontext():
            return BY[by][1](Path(domains[domain]))

    for domain in domains:
        # Imports take a second, in which the stage loads its models. What fails here fails again
        # when it is asked for, and is told then.
        with contextlib.suppress(Exception):
            verifier_of(domain)
    connection.send({"ready": True})
    # Verifiers run on the main thread, where the SIGALRM works by which math-verify gives up.
    while True:
        reply = _reply(verifier_of, requests.get(), watch)
        if watch is not None and watch.opened:
            reply["opened"] = watch.opened
        connection.send(reply)


def _reply(
    verifier_of: Callable[[str], Verifier], request: Request, watch: Watch | None
) -> dict[str, Any]:
    domain, response, problem = request
    try:
        verifier = verifier_of(domain)
        if response is not None:
            with watch.active() if watch else contextlib.nullcontext():
                return {"score": verifier.score(response, problem)}
        verifier.check(problem)
        return {"score": 1.0}
    except PosttrainError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except BaseException as error:  # also the SystemExit of a user's sys.exit()
        traceback.print_exc()
        said = "" if response is None else f"; response was {response[:200]!r}"
        return {
            "error": f"domain {domain!r}: its verifier raised {type(error).__name__}: {error} "
            f"on problem {problem['id']}{said}. The traceback is in the log of the stage",
            "exit_code": 1,
        }


def _listen(connection: Connection, requests: queue.SimpleQueue[Request]) -> None:
    """A thread of its own, so that the end of the stage is seen in the middle of an answer too."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(connection.recv())
    end_below(os.getpid())
    # sys.exit would end this thread only.
    os._exit(0)


def _main(handle: str, domains: str, by: By, watched: str) -> None:
    given = json.loads(watched)
    watch = None if given is None else Watched(**given)
    serve(Connection(int(handle)), json.loads(domains), by, watch)


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
