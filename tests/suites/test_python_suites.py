"""Whatever a suite file of Python does is told with the file and a line, and never ends a program
without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.load import load_suite

IMPORTS = """from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.domain import Domain, Procedural, Suite, Table
EXACT, SUMS = VerifierSpec(name="exact"), Table(train="sums.jsonl")
def suite():
    return Suite(name="s", domains={"a": Domain(name="a", **PARTS)})
PARTS = """


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def suite():\n    return 1 / 0", r"ZeroDivisionError.*\(line 2\)"),
        ("import nowhere_at_all", r"No module named 'nowhere_at_all'.*\(line 1\)"),
        ("def suite():\n    return suite()", r"RecursionError.*\(line 2\)"),
        ("\ndef suite(x):\n    pass", r"missing 1 required positional argument: 'x' \(line 2\)"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0 \(line 2\)"),
        ("def suite():\n    raise SystemExit(3)", r"SystemExit: 3 \(line 2\)"),
        ("raise BaseException('odd')", r"BaseException: odd \(line 1\)"),
        ("def suite():\n    raise GeneratorExit", r"GeneratorExit.*\(line 2\)"),
        (
            "class E(Exception):\n    def __str__(self):\n        raise ValueError\n"
            "def suite():\n    raise E",
            r"suite\(\) raised E \(line 5\)",
        ),
        ("def suite():\n    return 3", "returned a int"),
        (IMPORTS + "dict(source=3, verifier=EXACT)", "source is 3.* Procedural or Table"),
        (IMPORTS + "dict(source=SUMS, verifier='exact')", "verifier is 'exact'.*a VerifierSpec"),
        (IMPORTS + "dict(source=Table(train=5), verifier=EXACT)", "source: train is 5"),
        (
            IMPORTS + "dict(source=SUMS, verifier=VerifierSpec(name=None))",
            "verifier: name is None",
        ),
        (
            IMPORTS + "dict(source=Procedural(dataset='chain_sum', num_train='9', "
            "num_validation=1, num_heldout=1), verifier=EXACT)",
            "source: num_train is '9'",
        ),
    ],
)
def test_what_a_suite_file_does_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=words) as caught:
        load_suite(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("where", ["", "def suite():\n    "])
def test_who_stops_it_is_heard(tmp_path: Path, where: str) -> None:
    (tmp_path / "own.py").write_text(f"{where}raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_suite(str(tmp_path / "own.py"))
