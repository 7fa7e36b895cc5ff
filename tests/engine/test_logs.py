"""The log of a stage that prints without end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.engine.errors import StageError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.logs import LOG_BYTES, bound, open_bounded, written_up
from posttrain.engine.process import LOG, Failure
from posttrain.engine.runner import run
from posttrain.engine.store import Store


def numbers(text: bytes) -> list[int]:
    return [int(line) for line in text.splitlines() if line.isdigit()]


def test_first_and_last_lines_stay_and_the_cut_is_counted(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    lines = [b"%06d\n" % number for number in range(1000)]
    log.write_bytes(b"".join(lines))
    bound(log, 7000)
    assert log.read_bytes() == b"".join(lines)  # as long as it may be
    for more in (0, 500, 500):  # cut once, and again after more was appended
        lines += [b"%06d\n" % number for number in range(len(lines), len(lines) + more)]
        with log.open("ab") as file:
            file.write(b"".join(lines[len(lines) - more :]))
        bound(log, 3500)
        text = log.read_bytes()
        assert len(text) <= 3500
        found = numbers(text)
        (mark,) = [line for line in text.splitlines() if line.startswith(b"---")]
        gone = len(lines) - len(found)
        assert mark == b"--- %d bytes are left out here ---" % (7 * gone)
        assert found[0] == 0 and found[-1] == len(lines) - 1
        first = next(i for i, number in enumerate(found) if number != i)
        assert 100 < first < len(found) - 100
        assert found[first:] == list(range(found[first], len(lines)))


def test_a_line_without_end_is_cut_too(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 10_000)
    bound(log, 4000)
    assert len(log.read_bytes()) < 2200
    assert b"\n--- 8" in log.read_bytes()


def test_a_stage_that_prints_60_mb(
    store: Store, make_graph: Callable[..., Graph], toys: str
) -> None:
    graph = make_graph(Node(name="loud", kind="chatter"))
    with pytest.raises(StageError, match="the end"):
        list(run(graph, store, execute=toys))
    log = store.work_path(graph.fingerprints()["loud"]) / LOG
    assert log.stat().st_size <= LOG_BYTES
    text = log.read_bytes()
    assert text.startswith(b"--- 20") and b"bytes are left out here" in text
    printed = [int(number) for number in re.findall(rb"^ *(\d+) xxx", text, re.MULTILINE)]
    # The last lines may fall into the moment of a cut.
    assert printed[0] == 1 and 59_900 < printed[-1] <= 60_000


def test_a_burst_from_several_processes_stays_bounded(tmp_path: Path) -> None:
    """60 MB as fast as three processes can write them: whoever is too fast waits."""
    log, limit = tmp_path / "log.txt", 1_000_000
    handle, writer = open_bounded(log, limit)
    text = "import os\nfor _ in range(10): os.write(1, b'x' * 1_999_999 + b'\\n')"
    loud = [subprocess.Popen([sys.executable, "-c", text], stdout=handle) for _ in range(3)]
    os.close(handle)
    largest = 0
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        largest = max(largest, log.stat().st_size)
        time.sleep(0.001)
    assert [process.wait() for process in loud] == [0, 0, 0]
    # What a pipe holds comes on top, until it is cut.
    assert 0 < max(largest, log.stat().st_size) <= limit + 2**16
    assert b"bytes are left out here" in log.read_bytes()


def test_what_was_printed_before_a_kill_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    handle, writer = open_bounded(log)
    text = "import os, signal; os.write(1, b'last words'); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", text], stdout=handle).returncode == -9
    os.close(handle)
    written_up(log)
    assert log.read_bytes() == b"last words"
    os.waitpid(writer, 0)


def test_a_log_that_somebody_still_holds_is_not_waited_for_long(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    handle, writer = open_bounded(log)
    began = time.monotonic()
    written_up(log)
    assert 1.0 < time.monotonic() - began < 10.0
    os.close(handle)
    os.waitpid(writer, 0)


def test_the_writer_keeps_nothing_else_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a limit of open files is a billion, or none, closing each number is no way."""
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    monkeypatch.setattr(os, "closerange", lambda low, high: None)
    reading, writing = os.pipe()
    handle, writer = open_bounded(tmp_path / "log.txt")
    os.close(writing)
    os.set_blocking(reading, False)
    deadline, found = time.monotonic() + 10, None
    while found is None and time.monotonic() < deadline:
        try:
            found = os.read(reading, 1)
        except BlockingIOError:
            time.sleep(0.001)
    os.close(handle)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(reading)
    assert found == b""


def test_a_stage_is_named_once() -> None:
    failure = Failure(error="stage 'sft': its data has no rows")
    assert failure.describe("sft") == "stage sft failed: its data has no rows"
