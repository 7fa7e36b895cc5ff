"""The process in which slow verifiers run, started by `pool.py`, one for each worker of the pool.

Request: {"domain", "rows": [(response, problem), ...]}; a response that is None asks whether the
problem can be judged at all. Replies: {"ready": True} at first, then one per row: {"score": float},
or {"error": message, "exit_code": int}, which ends the request.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from posttrain.engine.errors import PosttrainError
from posttrain.rewards.oracle import load_quality
from posttrain.rewards.verifiers import Verifier, load_verifier


def replies(
    verifier_of: Callable[[str], Verifier], request: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The replies to one request; `verifier_of` gives the verifier of a domain."""
    domain = request["domain"]
    for response, problem in request["rows"]:
        try:
            verifier = verifier_of(domain)
            if response is None:
                verifier.check(problem)
                yield {"score": 1.0}
            else:
                yield {"score": verifier.score(response, problem)}
        except PosttrainError as error:
            yield {"error": str(error), "exit_code": error.exit_code}
            return
        except BaseException as error:  # also the SystemExit of a user's sys.exit()
            traceback.print_exc()
            said = "" if response is None else f"; response was {response[:200]!r}"
            yield {
                "error": f"domain {domain!r}: its verifier raised {type(error).__name__}: {error} "
                f"on problem {problem['id']}{said}. The traceback is in the log of the stage",
                "exit_code": 1,
            }
            return


def main() -> None:
    """Serve requests until the connection ends: then the stage is gone."""
    # Ctrl-C goes to the run, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
    domains: dict[str, str] = json.loads(sys.argv[2])
    load = load_quality if sys.argv[3] == "oracle" else load_verifier

    @functools.cache
    def verifier_of(domain: str) -> Verifier:
        return load(Path(domains[domain]))

    for domain in domains:
        # Imports take a second, in which the stage loads its models. What fails here fails again
        # when it is asked for, and is told then.
        with contextlib.suppress(Exception):
            verifier_of(domain)
    connection.send({"ready": True})
    # Verifiers run on the main thread, where the SIGALRM works by which math-verify gives up.
    while True:
        for reply in replies(verifier_of, requests.get()):
            connection.send(reply)


def _listen(connection: Connection, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """A thread of its own, so that the end of the stage is seen in the middle of an answer too."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(connection.recv())
    os._exit(0)


if __name__ == "__main__":
    main()
