"""Chat completions of an OpenAI-compatible endpoint, for judges: many at once, none asked twice.

Every reply is kept in a file of the stage's work directory under the hash of its request, so that a
resumed stage goes on where it was and its scores do not change. What does not change a reply is no
setting of a judge but is read from the environment: `POSTTRAIN_ENDPOINT_CONCURRENCY` (requests at
once, 8), `POSTTRAIN_ENDPOINT_TIMEOUT` (seconds for one reply, 120), `POSTTRAIN_ENDPOINT_RETRIES`
(further attempts after a busy or failing server, 5).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx

from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.judge_fields import MAX_TOKENS
from posttrain.rewards.verdicts import SHOWN

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
LARGEST_REPLY = 4 * 2**20
"""Bytes of one reply."""


class ReplyCache:
    """Replies by the hash of their requests: one JSON object per line, added to as they come."""

    def __init__(self, path: Path) -> None:
        """Reads what an earlier attempt left; a line that a kill cut off is asked again."""
        self.path = path
        self._known: dict[str, str] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for entry in map(_entry, whole.splitlines()):
            if entry is not None:
                self._known[entry[0]] = entry[1]
        if whole != content:
            # Else the next reply would be written behind the part of a line.
            write_whole(path, whole)

    def get(self, key: str) -> str | None:
        """The reply, None where it was never asked."""
        return self._known.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; it is in the file when this returns."""
        line = json.dumps({"request": key, "reply": reply}) + "\n"
        self._known[key] = reply
        with self.path.open("a", encoding="ascii") as file:
            file.write(line)


def _entry(line: bytes) -> tuple[str, str] | None:
    """Request and reply of a line; None for a damaged one, which is asked again."""
    try:
        entry = json.loads(line)
        request, reply = entry["request"], entry["reply"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return (request, reply) if isinstance(request, str) and isinstance(reply, str) else None


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
    max_tokens: int = MAX_TOKENS
    """Longest reply."""
    limits: Mapping[str, float] = field(default_factory=lambda: {k: limit(k) for k in DEFAULTS})
    """`DEFAULTS` and the environment over them."""

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """What each question's reply comes to, sent as one user message at temperature 0.

        Equal prompts are sent once. A reply that cannot be read, by each question that asks for it,
        is asked for again with a reminder, and never kept. Raises ConfigError for a missing key or
        a request that the server refuses, StageError where it cannot be reached, stays busy, sends
        no completion, or none that can be read in `READINGS` attempts.
        """
        secret = self._secret()
        asked: dict[str, list[Question]] = {}
        for question in questions:
            asked.setdefault(self._identity(question.prompt), []).append(question)
        missing = {key: same for key, same in asked.items() if not self._is_known(key, same)}
        if missing:
            asyncio.run(self._fetch(missing, secret))
        return [q.read(str(self.cache.get(self._identity(q.prompt)))) for q in questions]

    def _is_known(self, key: str, questions: Sequence[Question]) -> bool:
        """Whether there is a reply that all of the questions can read: another judge may have kept
        it, which reads it otherwise."""
        reply = self.cache.get(key)
        if reply is None:
            return False
        try:
            _read_by_all(reply, questions)
        except StageError:
            return False
        return True

    async def _fetch(self, asked: Mapping[str, Sequence[Question]], secret: str | None) -> None:
        """Put the reply to each prompt into the cache, under its key; many at once."""
        many = int(self.limits[CONCURRENCY])
        headers = {"Content-Type": "application/json"}
        headers |= {} if secret is None else {"Authorization": f"Bearer {secret}"}
        waiting = iter(asked.items())

        async def work(server: _Server) -> None:
            for key, questions in waiting:
                # Under the plain prompt, also where it took a reminder.
                self.cache.put(key, await self._readable_reply(server, questions))

        async with httpx.AsyncClient(
            headers=headers,
            # The whole reply has a limit, not each part of it.
            timeout=None,
            limits=httpx.Limits(max_connections=many),
            # A key goes to the server that was named and to no other.
            follow_redirects=False,
        ) as client:
            address = f"{self.url.rstrip('/')}/chat/completions"
            server = _Server(client, address, self.limits[TIMEOUT], secret)
            workers = [asyncio.ensure_future(work(server)) for _ in range(min(many, len(asked)))]
            try:
                await asyncio.gather(*workers)
            finally:
                # The first error cancels what is under way.
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _readable_reply(self, server: _Server, questions: Sequence[Question]) -> str:
        """The reply to a prompt, asked for again where it is none or cannot be read."""
        prompt = questions[0].prompt
        for attempt in range(READINGS):
            answer = await self._answer(server, prompt + (REMINDER if attempt else ""))
            try:
                reply = self._completion(server, answer)
                _read_by_all(reply, questions)
                return reply
            except _NoVerdictError as error:
                problem = error
        raise StageError(f"{READINGS} times in a row: {problem}")

    async def _answer(self, server: _Server, prompt: str) -> _Answer:
        """The server's answer to one prompt, asked for again while it is busy or failing."""
        retries, wait = int(self.limits[RETRIES]), FIRST_WAIT
        for attempt in range(retries + 1):
            try:
                answer = await server.post(self._request(prompt))
            except TimeoutError:
                problem = f"its reply timed out: it was not whole after {server.seconds:g} s"
            except (httpx.RequestError, OSError) as error:
                said = str(error) or type(error).__name__
                problem = f"it cannot be reached ({server.shown(said)})"
            except httpx.InvalidURL as error:
                said = server.shown(str(error))
                raise ConfigError(
                    f"judge at {server.address}: it is no url that can be asked: {said}"
                ) from None
            else:
                if 200 <= answer.status < 300:
                    return answer
                problem = f"it answered {answer.status} {server.shown(answer.reason)}"
                problem += f": {server.shown(answer.body.decode(errors='replace').strip())}"
                if 300 <= answer.status < 400:
                    raise ConfigError(
                        f"judge at {server.address}: it answered {answer.status} and sends to "
                        f"{server.shown(answer.headers.get('Location', 'nowhere'))}, which is not "
                        "followed, because the key and the texts would go there; give the url of "
                        "the server that answers"
                    )
                if answer.status not in PASSING:
                    raise ConfigError(
                        f"judge at {server.address}: {problem}; check the url, the model name "
                        f"{self.model!r} and the key"
                    )
                # The header may hold a date as well, which is not waited for.
                asked = re.fullmatch(r"[0-9]{1,9}", answer.headers.get("Retry-After", ""))
                wait = float(asked[0]) if asked and int(asked[0]) > 0 else wait
            if attempt < retries:
                await pause(min(wait, LONGEST_WAIT))
                wait *= 2
        raise StageError(
            f"judge at {server.address}: {problem}, {retries + 1} times in a row; check that the "
            "server is up. The replies so far are kept; run the same command again",
            exit_code=1,
        )

    def _completion(self, server: _Server, answer: _Answer) -> str:
        """The text of a chat completion that is whole.

        Raises StageError where the answer is no completion, and _NoVerdictError where it was cut at
        `max_tokens` or is empty.
        """
        try:
            choice = json.loads(answer.body)["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content = message["content"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            content = reason = 0
        if reason == "length":
            raise _NoVerdictError(
                f"judge at {server.address}: its reply was cut at max_tokens = {self.max_tokens} "
                "and is no verdict; give the judge a larger max_tokens"
            )
        if not isinstance(content, str | None):
            body = server.shown(answer.body.decode(errors="replace"))
            raise StageError(
                f"judge at {server.address}: its answer is no chat completion, with a text at "
                f"choices[0].message.content: {body}"
            )
        if not (content or "").strip():
            raise _NoVerdictError(f"judge at {server.address}: its reply is empty")
        return str(content)

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

    def _secret(self) -> str | None:
        """The API key, None where there is to be none. It stands in no message."""
        if self.key is None:
            return None
        secret = os.environ.get(self.key, "").strip()
        if not re.fullmatch(r"[!-~]+", secret):
            wrong = "holds characters that no key has" if secret else "is empty or not set"
            raise ConfigError(
                f"judge at {self.url}: the environment variable {self.key} {wrong}; it has to hold "
                f"the API key (export {self.key}=...)"
            )
        return secret


class _NoVerdictError(StageError):
    """A reply that is to be asked for again."""


@dataclass(frozen=True)
class _Answer:
    """What a server sent."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Server:
    """An open connection to the server of an endpoint, and the limits of what it may send."""

    client: httpx.AsyncClient
    address: str
    seconds: float
    """For one reply from its first byte to its last."""
    secret: str | None

    async def post(self, content: bytes) -> _Answer:
        """The answer to one request.

        Raises TimeoutError where it is not whole in time, StageError where it is too large, and
        what httpx raises where there is none.
        """
        async with asyncio.timeout(self.seconds):
            async with self.client.stream("POST", self.address, content=content) as answer:
                body = bytearray()
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > LARGEST_REPLY:
                        raise StageError(
                            f"judge at {self.address}: its reply is longer than "
                            f"{LARGEST_REPLY // 2**20} MiB; check that it is a model's server"
                        )
            return _Answer(answer.status_code, answer.reason_phrase, answer.headers, bytes(body))

    def shown(self, text: str) -> str:
        """What the server says as a message quotes it: its beginning, without the key, and with
        control characters escaped."""
        hidden = text if self.secret is None else text.replace(self.secret, "***")
        return repr(hidden[:SHOWN])


def _read_by_all(reply: str, questions: Sequence[Question]) -> None:
    for question in questions:
        try:
            question.read(reply)
        except StageError as error:
            raise _NoVerdictError(str(error)) from None


async def pause(seconds: float) -> None:
    """Wait between two attempts."""
    await asyncio.sleep(seconds)


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
