"""The log of a stage that prints without end."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.engine.errors import StageError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.logs import LOG_BYTES, bound
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


def test_a_stage_is_named_once() -> None:
    failure = Failure(error="stage 'sft': its data has no rows")
    assert failure.describe("sft") == "stage sft failed: its data has no rows"
