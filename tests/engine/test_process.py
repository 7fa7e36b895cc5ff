"""What a stage's process leaves behind, read back; a damaged file is a stage without a result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from posttrain.engine.process import Failure, Running, Wait


def outcome(folder: Path, content: bytes | None, code: int) -> Any:
    """What `Running.outcome` makes of a result.json and an exit status."""
    if content is not None:
        (folder / "result.json").write_bytes(content)
    process = SimpleNamespace(join=lambda: None, exitcode=code, pid=None)
    running = SimpleNamespace(process=process, work=SimpleNamespace(path=folder))
    return Running.outcome(cast(Running, running))


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"metrics": [1]}',
        b'{"metrics": null}',
        b'{"waiting": 3}',
        b'{"exit_code": 2}',
        b'{"error": "x", "exit_code": "2"}',
        b'{"error": ["x"]}',
    ],
)
def test_a_damaged_result_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr("posttrain.engine.process._signal_group", lambda process, number: None)
    for code in (0, 1):
        found = outcome(tmp_path, content, code)
        assert isinstance(found, Failure)
        assert f"status {code}" in found.error


def test_a_whole_result_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.engine.process._signal_group", lambda process, number: None)
    assert outcome(tmp_path, b'{"metrics": {"loss": 1.5}}', 0) == {"loss": 1.5}
    waiting = outcome(tmp_path, b'{"waiting": "fill in x", "file": null}', 1)
    assert isinstance(waiting, Wait) and waiting.reason == "fill in x"
    failed = outcome(tmp_path, b'{"error": "wrong", "exit_code": 2}', 1)
    assert isinstance(failed, Failure) and (failed.error, failed.exit_code) == ("wrong", 2)
