"""`judges.python`: a judge that is a function of the user's own, `(response, problem) -> number`.

The text of its file, and what it declares in `DATA_FILES`, is part of the judge, so that it goes
wherever the recipe's settings go. A stage writes them into its work directory, where a worker of
`rewards/pool.py` loads them: under the limits of a python verifier, beside the stage.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.engine.atomic import write_whole
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import digest
from posttrain.rewards.python_file import PythonVerifier, check_file, data_files, python_verifier

GIVEN = ("num_tokens", "finished", "step")
"""What a function may ask for by name beside the response and the problem."""
JUDGED = "judged"
"""Where a problem holds it on its way to the worker."""
LARGEST = 2**20
"""Bytes of declared files in all: they stand in the record of every stage that asks the judge."""


def read_judge(path: Path, function: str, *, where: str) -> dict[str, Any]:
    """The fields of the judge that is a function of a file. Runs nothing.

    Raises ConfigError as `check_file` and `data_files`, for a function that cannot be called with
    what there is, or for declared files that are no text or too large.
    """
    check_file(path, function, where=where)
    try:
        # Byte by byte, line ends included: what is written for the worker is what the user has.
        source = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: {path} is no UTF-8 text ({error}); its text stands in the record, so save "
            "it as UTF-8"
        ) from None
    names_of(source, function, where=f"{where}: {path}")
    data, size = {}, 0
    for name, place in data_files(path, where=where).items():
        size += place.stat().st_size
        try:
            data[name] = place.read_bytes().decode("utf-8") if size <= LARGEST else ""
        except UnicodeDecodeError:
            size = LARGEST + 1
        if size > LARGEST:
            raise ConfigError(
                f"{where}: {place}: what a judge reads stands in the record, so it has to be text "
                f"(UTF-8) and at most {LARGEST // 2**20} MiB in all; put more into columns of the "
                "problems, or into a python verifier"
            )
    return {
        "name": f"{path.name}:{function}",
        "source": source,
        "data": data,
    }


def names_of(source: str, function: str, *, where: str) -> tuple[str, ...]:
    """Which of `GIVEN` a function takes. Raises ConfigError where it cannot be called with the
    response, the problem and these."""
    body = ast.parse(source.encode("utf-8")).body
    nodes = [node for node in body if isinstance(node, ast.FunctionDef)]
    # Of several of one name the last is the one that is called.
    found = [node for node in nodes if node.name == function][-1]
    taken = found.args
    placed = [*taken.posonlyargs, *taken.args]
    named = [*placed[2:], *taken.kwonlyargs]
    optional = {a.arg for a in placed[len(placed) - len(taken.defaults) :]}
    optional |= {
        a.arg
        for a, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
        if default is not None
    }
    names = tuple(a.arg for a in named if a.arg in GIVEN and a not in taken.posonlyargs)
    wrong = [a.arg for a in named if a.arg not in names and a.arg not in optional]
    if wrong or (len(placed) < 2 and taken.vararg is None):
        raise ConfigError(
            f"{where}, line {found.lineno}: {function}() has to take a response and a problem, and "
            f"may take {', '.join(GIVEN)} by name"
            + (f"; it needs {', '.join(wrong)} as well" if wrong else "")
        )
    return names


def write_judge(name: str, source: str, data: Mapping[str, str], work: Path) -> Path:
    """A directory below `work` from which `load_judge` takes the judge; equal judges share it."""
    directory = work / "judges" / digest([name, source, dict(data)])[:16]
    file, _, function = name.rpartition(":")
    for below, text in {file: source, **data}.items():
        path = directory / "code" / below
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8"))
    about = {"file": file, "function": function}
    write_whole(directory / "judge.json", json.dumps(about).encode("ascii"))
    return directory


def judge_name(directory: Path) -> str:
    """Its name in the form of a python verifier's."""
    return f"python:{_about(directory)['function']}"


def load_judge(directory: Path) -> PythonJudge:
    """The judge of a directory that `write_judge` has made."""
    about = _about(directory)
    path = directory / "code" / about["file"]
    names = names_of(path.read_bytes().decode("utf-8"), about["function"], where=about["file"])
    made = python_verifier(path, about["function"], shown=about["file"], names=names)
    return PythonJudge(made)


def _about(directory: Path) -> dict[str, str]:
    about: dict[str, str] = json.loads((directory / "judge.json").read_text(encoding="ascii"))
    return about


class PythonJudge:
    """Calls the user's function; in the form of a verifier, so that a pool can run it."""

    def __init__(self, function: PythonVerifier) -> None:
        self.function = function

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """Any finite number. Raises StageError as a python verifier."""
        row = {name: value for name, value in problem.items() if name != JUDGED}
        return self.function.number(response, row, problem[JUDGED], math.isfinite, "a number")

    def check(self, problem: Mapping[str, Any]) -> None:
        """Nothing to check."""
