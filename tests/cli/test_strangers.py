"""Files of a store that are damaged, of another form, or written to deceive: told by file, or done
without where they can be had again. A traceback would fail these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Result

Cli = Callable[..., Result]
STORE = Path("posttrain-store")
DEEP = "[" * 100_000
DAMAGED = ["", "{", "null", "[]", "{}", "3", '"x"', DEEP, '{"format": 1, "names": {"f": []}}']
STEERING = "\x1b[31m\u202e"


def the(kind: str, name: str) -> Path:
    (found,) = STORE.glob(f"artifacts/{kind}/{name}-*")
    return found


def edited(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("content", DAMAGED)
def test_what_can_be_had_again_is_done_without(done: Path, cli: Cli, content: str) -> None:
    work = STORE / "work" / "0123456789ab"
    work.mkdir()
    remembered = [STORE / "names.json", *STORE.glob("cache/*"), STORE / "hashes.json"]
    for path in [*remembered, *(work / f for f in ("stage.json", "warnings.jsonl", "facts.json"))]:
        path.write_text(content)
    assert cli("ls").code == 0
    assert cli("show", "student").code == 0
    planned = cli("plan", "mini.py", "--suite", "pairs.toml", "--json").json
    assert {stage["action"] for stage in planned["stages"]} == {"cached"}
    assert {found["domain"] for found in planned["data"]} == {"sums", "copies"}


@pytest.mark.parametrize("content", [*DAMAGED, None])
@pytest.mark.parametrize("name", ["evaluation.json", "transcripts.json", "metrics.jsonl"])
def test_a_changed_file_is_named(done: Path, cli: Cli, name: str, content: str | None) -> None:
    path = the("evaluate", "evaluation") / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    told = cli("report", "evaluation", "--report", "new.html")
    assert told.code == 2 and str(path) in told.err
    if name == "evaluation.json":
        told = cli("show", "evaluation")
        assert told.code == 2 and str(path) in told.err


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": []},
        {"inputs": {"start": {}}},
        {"history": [{}]},
        {"metrics": None},
        {"provenance": []},
        {"warnings": 3},
        {"warnings": [3]},
        {"files": {"../out": {"sha256": "0", "bytes": 1}}},
        {"payload": None},
        {"created": "yesterday"},
    ],
)
def test_a_record_of_another_form_is_named(done: Path, cli: Cli, fields: dict[str, Any]) -> None:
    record = the("distill", "student") / "record.json"
    edited(record, **fields)
    told = cli("ls")
    assert told.code == 0 and str(record) in told.out and f"({next(iter(fields))}" in told.out
    assert "sums_teacher" in told.out
    told = cli("verify")
    assert told.code == 1 and str(record) in told.out


def test_no_text_of_a_record_steers_the_terminal(done: Path, cli: Cli) -> None:
    record = the("distill", "student") / "record.json"
    edited(record, name=STEERING, warnings=[STEERING], metrics={STEERING: 1})
    for command in (("ls",), ("show", "student"), ("lineage", "evaluation"), ("ls", "--json")):
        told = cli(*command)
        assert not set(STEERING[0] + STEERING[-1]) & set(told.out + told.err)
    assert cli("ls", "--json").json["artifacts"]


def test_no_word_of_an_error_steers_the_terminal(place: Path, cli: Cli) -> None:
    (place / "sums.jsonl").write_text(json.dumps({STEERING: 1}) + "\n")
    told = cli("plan", "mini.py", "--suite", "pairs.toml")
    assert told.code == 2 and "\\x1b[31m\\u202e" in told.err
    assert not set(STEERING[0] + STEERING[-1]) & set(told.err)


def test_no_text_of_a_record_is_markup(done: Path, cli: Cli) -> None:
    marked = "[link=http://evil]sums[/link] :boom:"
    record = the("distill", "student") / "record.json"
    edited(record, metrics={marked: 1}, warnings=[marked])
    assert marked in " ".join(cli("ls").out.split())
    assert " ".join(cli("show", "student").out.split()).count(marked) == 2
