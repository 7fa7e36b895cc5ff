"""Chat completions of an OpenAI-compatible endpoint, for judges: many at once, none asked twice.

Every reply is kept in a file of the stage's work directory under the hash of its request, so that a
resumed stage goes on where it was and its scores do not change. What does not change a reply is no
setting of a judge but is read from the environment: `POSTTRAIN_ENDPOINT_CONCURRENCY` (requests at
once, 8), `POSTTRAIN_ENDPOINT_TIMEOUT` (seconds for one reply, 120), `POSTTRAIN_ENDPOINT_RETRIES`
(further attempts after a busy or failing server, 5).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx

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
"""Attempts at a reply that can be read."""
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
        # Many threads fetch at once; their lines must not mix.
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
        missing = [key for key in wanted if self.cache.get(key) is None]
        if missing:
            self._fetch({key: wanted[key] for key in missing}, headers)
        return [q.read(str(self.cache.get(self._identity(q.prompt)))) for q in questions]

    def _fetch(self, questions: Mapping[str, Question], headers: Mapping[str, str]) -> None:
        """Put the reply to each question into the cache, under its key; many at once."""
        many = int(self.limits[CONCURRENCY])
        with (
            httpx.Client(
                headers=headers,
                timeout=self.limits[TIMEOUT],
                limits=httpx.Limits(max_connections=many),
            ) as client,
            ThreadPoolExecutor(many) as threads,
        ):

            def fetch(key: str) -> None:
                # Under the plain prompt, also where it took a reminder.
                self.cache.put(key, self._readable_reply(client, questions[key]))

            # The first error ends the loop and cancels what is not under way yet.
            for _ in threads.map(fetch, questions):
                pass

    def _readable_reply(self, client: httpx.Client, question: Question) -> str:
        """The reply to a question, asked again where it cannot be read."""
        for attempt in range(READINGS):
            reply = self._reply(client, question.prompt + (REMINDER if attempt else ""))
            try:
                question.read(reply)
            except StageError:
                if attempt + 1 == READINGS:
                    raise
            else:
                break
        return reply

    def _reply(self, client: httpx.Client, prompt: str) -> str:
        """The completion of one prompt, asked for again while the server is busy or failing."""
        address = f"{self.url.rstrip('/')}/chat/completions"
        retries, wait = int(self.limits[RETRIES]), FIRST_WAIT
        for attempt in range(retries + 1):
            try:
                answer = client.post(address, content=self._request(prompt))
            except httpx.RequestError as error:
                problem = f"it cannot be reached ({str(error) or type(error).__name__})"
            else:
                if answer.is_success:
                    return _completion(answer)
                said = answer.text.strip()[:SHOWN]
                problem = f"it answered {answer.status_code} {answer.reason_phrase}: {said}"
                if answer.status_code not in PASSING:
                    raise ConfigError(
                        f"judge at {address}: {problem}; check the url, the model name "
                        f"{self.model!r} and the key"
                    )
                # The header may hold a date as well, which is not waited for.
                asked = answer.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() and int(asked) > 0 else wait
            if attempt < retries:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
        raise StageError(
            f"judge at {address}: {problem}, {retries + 1} times in a row; check that the server "
            "is up. The replies so far are kept; run the same command again",
            exit_code=1,
        )

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


def _completion(answer: httpx.Response) -> str:
    """The text of a chat completion. Raises StageError where the answer is none."""
    try:
        content = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise StageError(
            f"judge at {answer.url}: its answer is no chat completion, with a text at "
            f"choices[0].message.content: {answer.text[:SHOWN]!r}"
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
