"""Every hard case of the recipe language has a test: a test function whose docstring begins with
"Case NN". Case 17, a trainable orchestrator with frozen sub-agents, and case 18, chains of several
responses with one reward, are left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
CASES = {*range(1, 17), *range(19, 23)}


def cases() -> Iterator[int]:
    """The numbers that the docstrings of tests begin with."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found = re.match(r"Case (\d+)\b", ast.get_docstring(node) or "")
                if found is not None:
                    named = re.match(r"test_case_(\d+)_", node.name)
                    assert named is None or int(named[1]) == int(found[1]), node.name
                    yield int(found[1])


def test_every_case_has_a_test() -> None:
    assert set(cases()) == CASES
