"""Chat completions of an OpenAI-compatible endpoint, for judges: many at once, none asked twice.

Every reply is kept in a file of the stage's work directory under the hash of its request, so that a
resumed stage goes on where it was and its scores do not change. What does not change a reply is no
setting of a judge but is read from the environment: `POSTTRAIN_ENDPOINT_CONCURRENCY` (requests at
once, 8), `POSTTRAIN_ENDPOINT_TIMEOUT` (seconds for one reply, 120), `POSTTRAIN_ENDPOINT_RETRIES`
(further attempts after a busy or failing server, 5).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError, StageError

CONCURRENCY, TIMEOUT, RETRIES = (
    f"POSTTRAIN_ENDPOINT_{name}" for name in ("CONCURRENCY", "TIMEOUT", "RETRIES")
)
DEFAULTS = {CONCURRENCY: 8.0, TIMEOUT: 120.0, RETRIES: 5.0}
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second attempt, doubled before each further one up to the longest."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses worth another attempt."""
READINGS = 3
REMINDER = "\n\nKeep to the form of the last line."
SHOWN = 200
"""Characters of a reply in a message."""


class ReplyCache:
    """Replies by the hash of their requests: one JSON object per line, added to as they come."""

    def __init__(self, path: Path) -> None:
        """Reads what an earlier attempt left; a line that a kill cut off is asked again."""
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for entry in map(json.loads, whole.splitlines()):
            self._known[entry["request"]] = entry["reply"]
        if whole != content:
            # Else the next reply would be written behind the part of a line.
            write_whole(path, whole)

    def get(self, key: str) -> str | None:
        """The reply, None where it was never asked."""
        return self._known.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; it is in the file when this returns."""
        line = json.dumps({"request": key, "reply": reply}) + "\n"
        with self._lock:
            self._known[key] = reply
            with self.path.open("a", encoding="ascii") as file:
                file.write(line)


@dataclass(frozen=True)
class Question:
    """What a model is asked, and how its reply is read."""

    prompt: str
    read: Callable[[str], float]
    """The number that a reply comes to. Raises StageError for one that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One model of one server."""

    url: str
    """The API's base, such as http://localhost:8000/v1."""
    model: str
    key: str | None = None
    """Environment variable that holds the API key; None: no key is sent."""
    cache: ReplyCache
    max_tokens: int = 1024
    """Longest reply."""
    limits: Mapping[str, float] = field(default_factory=lambda: {k: limit(k) for k in DEFAULTS})
    """`DEFAULTS` and the environment over them."""

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """What each question's reply comes to, sent as one user message at temperature 0.

        Equal prompts are sent once. A reply that cannot be read is asked for again with a reminder,
        and never kept. Raises ConfigError for a missing key or a request that the server refuses,
        StageError where it cannot be reached, stays busy, sends no completion, or none that can be
        read in `READINGS` attempts.
        """
        headers = {"Content-Type": "application/json"} | self._authorization()
        wanted = {self._identity(question.prompt): question for question in questions}
        missing = [(key, q) for key, q in wanted.items() if self.cache.get(key) is None]

        def fetch(key: str, question: Question) -> None:
            self.cache.put(key, self._readable(question, headers))

        if missing:
            with ThreadPoolExecutor(int(self.limits[CONCURRENCY])) as threads:
                pending = [threads.submit(fetch, *one) for one in missing]
                try:
                    for one in pending:
                        one.result()
                except BaseException:
                    # Those under way end by themselves; the rest would only fail the same way.
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
        return [q.read(str(self.cache.get(self._identity(q.prompt)))) for q in questions]

    def _readable(self, question: Question, headers: Mapping[str, str]) -> str:
        for attempt in range(READINGS):
            said = question.prompt + (REMINDER if attempt else "")
            reply = self._completion(self._request(said), headers)
            try:
                question.read(reply)
            except StageError:
                if attempt + 1 == READINGS:
                    raise
            else:
                break
        return reply

    def _request(self, prompt: str) -> bytes:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return json.dumps(body).encode("ascii")

    def _identity(self, prompt: str) -> str:
        whole = self.url.encode() + b"\n" + self._request(prompt)
        return hashlib.sha256(whole).hexdigest()

    def _authorization(self) -> dict[str, str]:
        if self.key is None:
            return {}
        secret = os.environ.get(self.key, "")
        if not secret:
            raise ConfigError(
                f"judge at {self.url}: the environment variable {self.key} is empty or not set; it "
                f"has to hold the API key (export {self.key}=...)"
            )
        return {"Authorization": f"Bearer {secret}"}

    def _completion(self, body: bytes, headers: Mapping[str, str]) -> str:
        address = f"{self.url.rstrip('/')}/chat/completions"
        retries, wait = int(self.limits[RETRIES]), FIRST_WAIT
        for attempt in range(retries + 1):
            try:
                return self._once(urllib.request.Request(address, body, dict(headers)))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace").strip()
                problem = f"it answered {error.code} {error.reason}: {said[:SHOWN]}"
                if error.code not in PASSING:
                    raise ConfigError(
                        f"judge at {address}: {problem}; check the url, the model name "
                        f"{self.model!r} and the key"
                    ) from None
                wait = _asked_to_wait(error) or wait
            except (OSError, http.client.HTTPException) as error:
                problem = f"it cannot be reached ({getattr(error, 'reason', None) or error!r})"
            if attempt < retries:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
        raise StageError(
            f"judge at {address}: {problem}, {retries + 1} times in a row; check that the server "
            "is up. The replies so far are kept; run the same command again",
            exit_code=1,
        )

    def _once(self, request: urllib.request.Request) -> str:
        with urllib.request.urlopen(request, timeout=self.limits[TIMEOUT]) as answer:
            text = answer.read().decode("utf-8", "replace")
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise StageError(
                f"judge at {request.full_url}: its answer is no chat completion, with a text at "
                f"choices[0].message.content: {text[:SHOWN]!r}"
            )
        return content


def limit(name: str) -> float:
    """The value of one of the environment's limits. Raises ConfigError for what is no number."""
    text = os.environ.get(name, "")
    lowest = 0 if name == RETRIES else 1
    try:
        value = float(text) if text else DEFAULTS[name]
    except ValueError:
        value = lowest - 1.0
    if not lowest <= value < float("inf"):
        raise ConfigError(f"{name}={text!r} in the environment; it has to be a number >= {lowest}")
    return value


def _asked_to_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds of a Retry-After header; None without one, or with a date in it."""
    value: Any = error.headers.get("Retry-After", "")
    return float(value) if value.isdigit() and int(value) > 0 else None
