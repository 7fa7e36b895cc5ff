"""Sockets where the temporary directory has a long path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
from posttrain.engine.errors import ConfigError
from posttrain.engine.sockets import use_short_sockets

PROGRAM = """
import sys, tempfile
from multiprocessing import util
from pathlib import Path
from posttrain.engine.graph import Graph, Node
from posttrain.engine.runner import run
from posttrain.engine.store import Store
graph = Graph(nodes={"a": Node(name="a", kind="add", config={"value": 2})}, target="a")
kinds = [event.kind for event in run(graph, Store(Path(sys.argv[1])), execute=sys.argv[2])]
print(kinds[-1], tempfile.gettempdir(), len(util.get_temp_dir()) < 40)
"""


def test_a_run_under_a_long_tmpdir(tmp_path: Path, toys: str) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), toys],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "TMPDIR": str(long),
            "PYTHONPATH": str(Path(posttrain.__file__).parents[1]),
        },
    )
    assert done.stderr == ""
    # What else is temporary stays where TMPDIR says.
    assert done.stdout.split() == ["finished", str(long), "True"]


def test_no_place_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/x" * 60)
    with pytest.raises(ConfigError, match=r"TMPDIR: /x.* set TMPDIR to a directory of at most 68"):
        use_short_sockets([str(tmp_path / "none")])
