"""A server on this machine that answers as a test says, and what judges ask it with."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.rewards import endpoint as module
from posttrain.rewards.endpoint import (
    CONCURRENCY,
    RETRIES,
    TIMEOUT,
    Endpoint,
    ReplyCache,
)
from posttrain.rewards.judging import Responses

Answer = tuple[int, str]


class Server:
    """Answers what `reply(prompt, n)` says to the n-th request: (status, text)."""

    def __init__(self) -> None:
        self.reply: Callable[[str, int], Answer] = lambda prompt, n: (200, "Grade: 5")
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.together = self.most = 0
        self.headers: dict[str, str] = {}
        self.reason = "stop"
        self.drip = 0.0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append(body)
                    server.keys.append(self.headers["Authorization"])
                    number = len(server.seen)
                    server.together += 1
                    server.most = max(server.most, server.together)
                status, text = server.reply(body["messages"][0]["content"], number)
                content = {
                    "choices": [{"message": {"content": text}, "finish_reason": server.reason}]
                }
                raw = text if status == 299 else json.dumps(content)
                with lock:
                    server.together -= 1
                self.send_response(200 if status == 299 else status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for part in raw if server.drip else [raw]:
                        time.sleep(server.drip)
                        self.wfile.write(part.encode())

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    for name in (CONCURRENCY, TIMEOUT, RETRIES):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def ask(server: Server, path: Path, key: str | None = None) -> Endpoint:
    return Endpoint(url=server.url, model="m", key=key, cache=ReplyCache(path / "replies.jsonl"))


def tools(server: Server, path: Path) -> Any:
    """What a stage gives to the judges that ask endpoints."""
    cache = ReplyCache(path / "replies.jsonl")

    def endpoint(judge: Any) -> Endpoint:
        asked = {name: getattr(judge, name) for name in ("url", "model", "key", "max_tokens")}
        return Endpoint(**asked, cache=cache)

    return SimpleNamespace(endpoint=endpoint)


def batch(*texts: str, **columns: Any) -> Responses:
    problem = {"id": "1", "domain": "d", "prompt": "1+1={x}", "answer": "2"} | columns
    count = len(texts)
    return Responses(
        problems=[problem] * count,
        texts=texts,
        group=[0] * count,
        finished=[True] * count,
        num_tokens=[1] * count,
    )
