"""`judges.python`: a function of the user's own, in the workers of a pool."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.judge_kinds import parse_judge
from posttrain.rewards.own_judge import JUDGED, load_judge, write_judge
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.watching import Watched

ROW = {"id": "p1", "domain": "d", "prompt": "1+1", "answer": "2", "meta": {"limit": 3}}
Ask = Callable[..., float]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """What a judge of this source says of a response, by a worker."""
    pools = []

    def made(source: str, response: str = "22", seconds: float = 30.0, **given: Any) -> float:
        (tmp_path / "own.py").write_text(source)
        judge: Any = judges.python(str(tmp_path / "own.py:mark"))
        directory = write_judge(judge.name, judge.source, judge.data, tmp_path / "work")
        pool = VerifierPool(
            {judge.name: directory},
            num_workers=1,
            by="judge",
            python_seconds=seconds,
            watched=Watched(root=str(tmp_path), declared=[str(tmp_path / "work")]),
        )
        pools.append(pool)
        judged = {"num_tokens": 3, "finished": True, "step": 7} | given
        found = pool.submit(judge.name, [response], [{**ROW, JUDGED: judged}]).result()[0]
        assert pool.opened == given.get("opened", [])
        return found

    yield made
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def mark(response, problem):\n    return len(response) - 10", -8.0),
        ("def mark(response, problem):\n    return problem['answer'] in response", 1.0),
        ("def mark(response, problem, step):\n    return step", 7.0),
        ("def mark(response, problem, num_tokens, *, finished):\n    return num_tokens", 3.0),
        ("def mark(r, p, *, finished=False, other=1):\n    return finished + other", 2.0),
        ("def mark(response, problem):\n    return len(problem)", 5.0),
    ],
)
def test_it_sees_what_it_asks_for(ask: Ask, code: str, value: float) -> None:
    assert ask(code) == value


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def mark(r, p):\n    return 1 / 0",
            r"own\.py: mark\(\) on problem p1 raised Zero.*line 2",
        ),
        ("def mark(r, p):\n    return 'x'", r"on problem p1 returned 'x' \(str\); .* a number$"),
        ("def mark(r, p):\n    return float('nan')", "returned nan"),
        ("import sys\ndef mark(r, p):\n    sys.exit(3)", r"raised SystemExit: 3 \(line 3\)"),
        ("1 / 0\ndef mark(r, p):\n    return 1", r"own\.py: loading .*ZeroDivisionError.*line 1"),
        ("def mark(r, p):\n    return 10**400", r"on problem p1 returned 1000.*\(int\); it has to"),
        (
            "def mark(r, p):\n    return open(__file__ + '.txt')",
            r'raised FileNotFoundError.*line 2\).*DATA_FILES = \["own\.py\.txt"\]',
        ),
        ("open('no.txt')\ndef mark(r, p):\n    return 1", r'loading .*DATA_FILES = \["no\.txt"\]'),
        ("import os\ndef mark(r, p):\n    os._exit(3)", "'own.py:mark'.* status 3 over problem p1"),
    ],
)
def test_what_goes_wrong_names_file_function_and_problem(ask: Ask, code: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        ask(code)


def test_one_that_never_returns_is_stopped(ask: Ask) -> None:
    message = r"judges\.python\('own\.py:mark'\) took longer than 1 s over problem p1"
    with pytest.raises(StageError, match=message):
        ask("def mark(r, p):\n    while True:\n        pass", seconds=1.0)


def test_its_files_go_with_it_and_others_are_noted(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("4")
    (tmp_path / "foreign.txt").write_text("5")
    code = (
        "from pathlib import Path\nDATA_FILES = ['own.txt']\n"
        "def mark(r, p):\n    return int((Path(__file__).parent / 'own.txt').read_text())"
    )
    assert ask(code) == 4.0
    foreign = code.replace(
        "Path(__file__).parent / 'own.txt'", f"Path({str(tmp_path)!r}) / 'foreign.txt'"
    )
    assert ask(foreign, opened=["foreign.txt"]) == 5.0


def test_text_function_and_files_are_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "DATA_FILES = ['t']\ndef one(r, p):\n    return 1\ndef two(r, p):\n    return 2\n"
    )
    (tmp_path / "t").write_text("a")
    first, second = (judges.python(f"{file}:{name}") for name in ("one", "two"))
    (tmp_path / "t").write_text("b")
    third = judges.python(f"{file}:one")
    file.write_text(file.read_text() + "\n")
    fourth = judges.python(f"{file}:one")
    assert len({judge.identity for judge in (first, second, third, fourth)}) == 4
    assert (first.label, second.label) == ("python.one", "python.two")
    assert parse_judge(first.to_json()) == first
    assert (first + 0.5 * second - judges.length(budget=3)).to_json()["terms"][1]["weight"] == 0.5
    assert str(tmp_path) not in first.identity, "where a file lies is no part of what it says"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def mark(r):\n    return 1", "line 1: .*has to take a response and a problem"),
        (
            "def mark(r, p, size):\n    return 1",
            "num_tokens, finished, step by name; it needs size",
        ),
        ("def other(r, p):\n    return 1", "defines no function 'mark'"),
        ("def mark(r, p:\n    return 1", "line 1"),
        ("import neighbour\ndef mark(r, p):\n    return 1", "'neighbour' from beside it"),
        ("DATA_FILES = ['big']\ndef mark(r, p):\n    return 1", "at most 1 MiB"),
        ("DATA_FILES = ['bytes']\ndef mark(r, p):\n    return 1", "has to be text"),
    ],
)
def test_mistakes_are_told_when_the_recipe_is_built(
    tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "big").write_text("x" * (2**20 + 1))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        judges.python(str(tmp_path / "own.py:mark"))


@pytest.mark.parametrize("place", ["own.py", "own:mark", "own.py:", "own.py:a b"])
def test_another_spelling_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as 'file\.py:function'"):
        judges.python(place)


DAEMON = """
import os, sys, time
def mark(response, problem):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            os.close(write)
            time.sleep(60)
        os._exit(0)
    os.wait()
    return int(os.read(read, 99))
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_a_daemon_that_it_starts_ends_with_the_pool(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DAEMON)
    judge: Any = judges.python(str(tmp_path / "own.py:mark"))
    directory = write_judge(judge.name, judge.source, judge.data, tmp_path / "work")
    with VerifierPool({judge.name: directory}, num_workers=1, by="judge") as pool:
        row = {**ROW, JUDGED: {}}
        pid = int(pool.submit(judge.name, [""], [row]).result()[0])
        assert alive(pid)
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


PLAIN = b"def mark(r, p):\n    return 1.0\n"


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (b"\xef\xbb\xbf" + PLAIN, 1.0),
        (PLAIN + b"def mark(r, p, *, step):\n    return step\n", 7.0),
        (PLAIN.replace(b"\n", b"\r\n"), 1.0),
    ],
    ids=["a mark of the byte order", "a function defined twice", "line ends of Windows"],
)
def test_files_as_editors_write_them(tmp_path: Path, source: bytes, value: float) -> None:
    (tmp_path / "own.py").write_bytes(source)
    judge: Any = judges.python(str(tmp_path / "own.py:mark"))
    directory = write_judge(judge.name, judge.source, judge.data, tmp_path / "work")
    assert (directory / "code" / "own.py").read_bytes() == source
    judged = {"num_tokens": 3, "finished": True, "step": 7}
    assert load_judge(directory).score("22", {**ROW, JUDGED: judged}) == value


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"# -*- coding: latin-1 -*-\nX = '\xe9'\n" + PLAIN, r"own\.py is no UTF-8 text"),
        (PLAIN + b"X = " + b"-" * 50_000 + b"1\n", r"own\.py cannot be read as Python"),
        (PLAIN + b"\0", r"own\.py.*null bytes"),
        (b"DATA_FILES = ['" + b"x" * 300 + b"']\n" + PLAIN, "there is no file"),
    ],
    ids=["another encoding", "too deep", "null bytes", "a name that no file can have"],
)
def test_files_that_cannot_be_read_are_told(tmp_path: Path, source: bytes, message: str) -> None:
    (tmp_path / "own.py").write_bytes(source)
    with pytest.raises(ConfigError, match=message):
        judges.python(str(tmp_path / "own.py:mark"))


def test_declared_files_keep_their_line_ends(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"a\r\nb\r\n")
    (tmp_path / "own.py").write_bytes(b"DATA_FILES = ['table.csv']\n" + PLAIN)
    judge: Any = judges.python(str(tmp_path / "own.py:mark"))
    directory = write_judge(judge.name, judge.source, judge.data, tmp_path / "work")
    assert (directory / "code" / "table.csv").read_bytes() == b"a\r\nb\r\n"


def test_a_file_that_is_read_each_time_is_noted_once(tmp_path: Path) -> None:
    (tmp_path / "foreign.txt").write_text("1")
    (tmp_path / "own.py").write_text(
        f"def mark(r, p):\n    return float(open({str(tmp_path / 'foreign.txt')!r}).read())\n"
    )
    judge: Any = judges.python(str(tmp_path / "own.py:mark"))
    directory = write_judge(judge.name, judge.source, judge.data, tmp_path / "work")
    watched = Watched(root=str(tmp_path), declared=[str(tmp_path / "work")])
    row = {**ROW, JUDGED: {"num_tokens": 3, "finished": True, "step": 7}}
    with VerifierPool({"j": directory}, num_workers=1, by="judge", watched=watched) as pool:
        assert pool.submit("j", ["a"] * 5, [row] * 5).result() == [1.0] * 5
        assert pool.opened == ["foreign.txt"]
        assert list(pool._workers[0].opened) == ["foreign.txt"]
