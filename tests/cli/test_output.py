"""Outputs that take nothing, or not every character: no traceback, and the whole of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("ls", "recipes --json", "--help")


def run(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`posttrain` in a process of its own, by a shell that sends its output somewhere."""
    return subprocess.run(
        f"{sys.executable} -m posttrain {words}",
        shell=True,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_output(finished: Path, words: str) -> None:
    done = run(f"{words} > /dev/full", finished)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert said.count("error: ") == 1 and "No space left" in said
    assert "Traceback" not in said and "Exception ignored" not in said


@pytest.mark.parametrize("words", ["ls"])
@pytest.mark.parametrize("rest", [">&-", "2>&-", "> /dev/full 2>&1", "| head -c 1", "< /dev/null"])
def test_outputs_that_are_gone(finished: Path, words: str, rest: str) -> None:
    done = run(f"{words} {rest}", finished)
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"COLUMNS": "1"}],
    ids=["ascii", "latin-1", "one column"],
)
@pytest.mark.parametrize("words", ["show evaluation", "recipes --json"])
def test_what_the_encoding_lacks_is_written_out(
    finished: Path, words: str, environment: dict[str, str]
) -> None:
    done = run(words, finished, **environment)
    assert done.returncode == 0 and done.stderr == b""
    if words.endswith("--json"):
        found = json.loads(done.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8")))
        assert found == json.loads(run(words, finished).stdout)
    elif "COLUMNS" not in environment:
        assert rb"0.0\u2013" in done.stdout


def test_what_the_system_refuses_is_told_in_words(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for words in (f"ls --store {tmp_path}/loop", f"ls --store {tmp_path}/{'x' * 300}"):
        done = run(words, finished)
        assert b"Traceback" not in done.stderr and done.stderr.count(b"error: ") == 1, done.stderr
        assert done.returncode in (1, 2)
