"""Mistakes: one clear message, exit code 2, nothing computed, the store as it was."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import weights_file

import posttrain.engine.store
from posttrain.engine.work import Work

MINI = ("mini.py", "--suite", "pairs.toml")

RECIPES = {
    "no function": ("def recepe(r): ...", ["bad.py", "`recipe(r, ...)`", "recepe"]),
    "syntax": ("def recipe(r):\n    return (\n", ["bad.py, line 2", "never closed"]),
    "import": ("import nowhere_at_all", ["bad.py, line 1", "nowhere_at_all"]),
    "raises": (
        "def recipe(r):\n    steps = {}['long']\n",
        ["bad.py, line 2", "steps = {}['long']", "KeyError: 'long'"],
    ),
    "exits": ("raise SystemExit(3)", ["bad.py, line 1", "SystemExit: 3"]),
    "returns nothing": ("def recipe(r):\n    r.domains\n", ["bad.py", "None", "return"]),
    "no builder": ("def recipe():\n    pass\n", ["def recipe(r, ...)"]),
    "needs a value": ("def recipe(r, base):\n    pass\n", ["'base'", "--set base=VALUE"]),
    "cycle": (
        "def recipe(r):\n"
        "    p = r.prompts(r.domains)\n"
        "    a = r.rl(start=r.stage('b'), prompts=p, steps=1, name='a')\n"
        "    return r.rl(start=a, prompts=p, steps=1, name='b')\n",
        ["cycle", "a -> b -> a"],
    ),
    "cycle of starts": (
        "def recipe(r):\n"
        "    p, d = r.prompts(r.domains), r.demos(r.domains)\n"
        "    s = r.sft(start=r.stage('t'), data=d, steps=1, name='s')\n"
        "    t = r.sft(start=s, data=d, steps=1, name='t')\n"
        "    return r.distill(start=t, teachers=dict.fromkeys(r.domains, s), prompts=p, steps=1)\n",
        ["cycle", "s -> t -> s"],
    ),
    "unknown stage": (
        "def recipe(r):\n"
        "    return r.rl(start=r.stage('bose'), prompts=r.prompts(r.domains), steps=1)\n",
        ["'bose'", "'start'"],
    ),
    "one name twice": (
        "def recipe(r):\n"
        "    base = r.pretrain(data=r.demos(r.domains), steps=1)\n"
        "    return r.sft(start=base, data=r.demos(r.domains), steps=1, name='base')\n",
        ["'base'", "name="],
    ),
    "unknown option": (
        "def recipe(r):\n    return r.pretrain(data=r.demos(r.domains), stepz=1)\n",
        ["'base' (pretrain)", "'stepz'", "'steps'", "bad.py, line 2"],
    ),
    "unknown domain": (
        "def recipe(r):\n    return r.pretrain(data=r.demos('sum'), steps=1)\n",
        ["'sum'", "'sums'", "copies"],
    ),
    "no teacher": (
        "def recipe(r):\n"
        "    s = r.pretrain(data=r.demos(r.domains), steps=1)\n"
        "    p = r.prompts(r.domains)\n"
        "    return r.distill(start=s, teachers={'sums': s}, prompts=p, steps=1)\n",
        ["'copies'", "teachers are given for sums", '"self"'],
    ),
    "other vocabulary": (
        "def recipe(r):\n"
        "    s, t = r.model('one', name='s'), r.model('two', name='t')\n"
        "    p = r.prompts(r.domains)\n"
        "    return r.distill(start=s, teachers=dict.fromkeys(r.domains, t), prompts=p, steps=1)\n",
        ["vocabulary", "one/tokenizer.json", "two/tokenizer.json", "'b'"],
    ),
    "no checkpoint": (
        "def recipe(r):\n    return r.model('three')\n",
        ["'three'", "no such directory", "Hub id"],
    ),
}


def checkpoint(folder: Path, vocabulary: dict[str, int]) -> None:
    """Files with the names of a checkpoint's; only the vocabulary is real."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": 0}')
    tensors = {"model.norm.weight": ("F32", (2,))}
    (folder / "model.safetensors").write_bytes(weights_file(tensors))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def refused(place: Path, result: Any, words: list[str]) -> None:
    """One message for people with all of `words`, exit code 2, no store made."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    missing = [word for word in words if word not in result.err]
    assert not missing, result.err
    assert not (place / "posttrain-store").exists()


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_mistakes_in_a_recipe_file(
    cli: Callable[..., Any], place: Path, command: str, case: str
) -> None:
    text, words = RECIPES[case]
    (place / "bad.py").write_text(text)
    checkpoint(place / "one", {"a": 0, "b": 1})
    checkpoint(place / "two", {"a": 0, "b": 2})
    refused(place, cli(command, "bad.py", "--suite", "pairs.toml"), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mop",), ["'mop'", "did you mean 'mopd'?"]),
        (("mino.py",), ["mino.py does not exist", "'mini.py'"]),
        (("pairs.toml/x",), ["does not exist"]),
        ((*MINI, "--set", "stps=3"), ["'stps'", "'steps'", "base", "seed", "STAGE.FIELD"]),
        ((*MINI, "--set", "steps"), ["--set steps", "PARAMETER=VALUE"]),
        ((*MINI, "--set", "steps=two"), ["'two'", "int"]),
        ((*MINI, "--set", "steps=2.5"), ["'2.5'", "int"]),
        ((*MINI, "--set", "steps=true"), ["'true'", "int"]),
        ((*MINI, "--set", "lr=fast"), ["'fast'", "float"]),
        ((*MINI, "--set", "cards=perhaps"), ["'perhaps'", "bool"]),
        ((*MINI, "--set", "size=smal"), ["'small'", "smaller"]),
        ((*MINI, "--set", "seed=x"), ["--set seed=x", "int"]),
        ((*MINI, "--set", "seed=1", "--seed", "2"), ["--seed 2", "seed=1"]),
        ((*MINI, "--set", "suite=core"), ["pairs.toml", "suite=core"]),
        ((*MINI, "--set", "studnt.steps=3"), ["studnt", "'student'"]),
        ((*MINI, "--set", "student.stepz=3"), ["'student' (distill)", "'stepz'", "'steps'"]),
        ((*MINI, "--set", "student.steps=-3"), ["'student' (distill)", "'steps'", "-3"]),
        ((*MINI, "--set", "*_teacher.stepz=3"), ["stepz", "'steps'"]),
        (("mini.py", "--suite", "pair"), ["'pair'", "core"]),
        (("mini.py", "--suite", "pair.toml"), ["pair.toml does not exist", "'pairs.toml'"]),
    ],
)
def test_mistakes_in_a_command(
    cli: Callable[..., Any], place: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    refused(place, cli("run", *arguments), words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('verifier = "exact"', 'verifier = "exactly"', ["exactly", "'exact'"]),
        ('demo = "demo"', 'demo = "worked"', ["sums.jsonl", "worked"]),
        ('"sums.jsonl"', '"empty.jsonl"', ["empty.jsonl", "empty"]),
        ('"sums.jsonl"', '"gone.jsonl"', ["gone.jsonl"]),
    ],
)
def test_mistakes_in_a_suite(
    cli: Callable[..., Any], place: Path, old: str, new: str, words: list[str]
) -> None:
    path = place / "pairs.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    (place / "empty.jsonl").touch()
    refused(place, cli("run", *MINI), words)


def test_a_report_that_cannot_be_written_is_noticed_first(
    cli: Callable[..., Any], place: Path
) -> None:
    refused(place, cli("run", *MINI, "--report", "no/such/page.html"), ["no/such", "--report"])
    refused(place, cli("run", *MINI, "--report", "."), ["directory", "report.html"])


def test_a_store_of_a_newer_version(cli: Callable[..., Any], place: Path) -> None:
    store = place / "newer"
    store.mkdir()
    (store / "store.json").write_text('{"format": 99}')
    for command in (("run", *MINI), ("ls",), ("verify",), ("gc", "--yes"), ("show", "student")):
        result = cli(*command, "--store", store)
        refused(place, result, ["newer posttrain", "format 99", "upgrade"])
    assert [path.name for path in store.iterdir()] == ["store.json"]


def test_a_directory_that_is_no_store(cli: Callable[..., Any], place: Path) -> None:
    refused(place, cli("run", *MINI, "--store", "."), ["not a store", "empty"])
    refused(place, cli("run", *MINI, "--store", "mini.py"), ["mini.py is not a directory"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["disk full", "free where", "posttrain gc", "same command again"]),
        (errno.EACCES, ["not allowed to write", "choose another store directory"]),
    ],
)
def test_a_disk_that_takes_nothing(
    cli: Callable[..., Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    words: list[str],
) -> None:
    def refuse(path: Path, *, wait: bool) -> Work | None:
        raise OSError(number, "refused", str(path))

    monkeypatch.setattr(posttrain.engine.store, "open_work", refuse)
    result = cli("run", *MINI)
    assert result.code == 2
    assert all(word in result.err for word in words), result.err
    assert not list((place / "posttrain-store").glob("artifacts/*/*"))


def test_the_user_of_a_pipe_leaves(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, Path]:
        raise BrokenPipeError

    monkeypatch.setattr("posttrain.language.loader.shipped_recipes", broken)
    monkeypatch.setattr("sys.stderr", open("/dev/null", "w"))  # noqa: SIM115
    assert cli("recipes").code == 1
