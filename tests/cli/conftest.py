"""A tiny recipe on two tables, run once for the whole session, and the command line in-process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main

MINI = Path(__file__).with_name("mini.py")
SUITE = """
name = "pairs"
[domains.sums]
train = "sums.jsonl"
demo = "demo"
verifier = "exact"
[domains.copies]
train = "copies.jsonl"
demo = "demo"
verifier = "exact"
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object on the last line of standard output, which has no other line."""
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


def write_suite(folder: Path) -> Path:
    """A suite of two tables in `folder`; returns its file."""
    digits = [(a, b) for a in range(9) for b in range(9)]
    tables = {
        "sums": [(f"{a}+{b}=", str(a + b)) for a, b in digits],
        "copies": [(f"c{a}{b}", f"{a}{b}") for a, b in digits],
    }
    for name, rows in tables.items():
        lines = [json.dumps({"prompt": p, "answer": answer, "demo": answer}) for p, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "pairs.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the tiny recipe and its suite."""
    shutil.copy(MINI, tmp_path / "mini.py")
    write_suite(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_STORE", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    # Workers of xdist are given the width of its terminal.
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


@pytest.fixture
def cli(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("ls", "--json")`: run a command in `place`."""

    def run(*arguments: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the tiny recipe has run; tests read it or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(MINI, folder / "mini.py")
    write_suite(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = main(["run", "mini.py", "--suite", "pairs.toml", "--jobs", "2", "--json"])
    assert code == 0
    return folder


@pytest.fixture
def done(finished: Path, place: Path) -> Path:
    """`place` with a copy of the finished store and report in it."""
    shutil.copytree(finished / "posttrain-store", place / "posttrain-store")
    shutil.copy2(finished / "report.html", place / "report.html")
    return place


@pytest.fixture(scope="session")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the store, the page and the JSON (out.json) of a sweep of the tiny recipe:
    two learning rates of the student by two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    shutil.copy(MINI, folder / "mini.py")
    write_suite(folder)
    options = ("--axis", "student.lr=1e-4,0.02", "--seeds", "0,1", "--jobs", "2", "--json")
    with pytest.MonkeyPatch.context() as patch, (folder / "out.json").open("w") as file:
        patch.chdir(folder)
        patch.setattr("sys.stdout", file)
        code = main(["sweep", "mini.py", "--suite", "pairs.toml", *options])
    assert code == 0
    return folder
