"""What every shipped recipe has to be: short, explained, made of verbs, and plannable anywhere."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from pathlib import Path

import pytest

from posttrain.engine.store import Store
from posttrain.language.loader import describe, load_recipe, shipped_recipes

RECIPES = shipped_recipes()
MAY_IMPORT = {"posttrain", "typing", "collections", "itertools", "__future__"}
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
SUITE = """
from posttrain import Domain, Suite, Table, VerifierSpec

verifier = VerifierSpec(name="exact")
rows = Table(train="rows.jsonl", demo="demo", thought="thought")


def suite() -> Suite:
    domains = {name: Domain(name=name, source=rows, verifier=verifier) for name in NAMES}
    return Suite(name="other", domains=domains)
"""


def lines_of_code(path: Path) -> int:
    """Lines that hold more than comments, blanks and the module's docstring."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0]
    assert docstring.end_lineno is not None
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*LAYOUT, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len({line for line in lines if line > docstring.end_lineno})


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_short(name: str) -> None:
    assert lines_of_code(RECIPES[name]) <= 80


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_what_it_is_where_it_is_from_and_what_it_leaves_out(name: str) -> None:
    text = ast.get_docstring(ast.parse(RECIPES[name].read_text(encoding="utf-8"))) or ""
    assert describe(RECIPES[name]).summary.endswith(".")
    for label in ("Source:", "In one line:", "Left out:"):
        assert f"\n{label} " in text or f"\n{label}\n" in text, label


@pytest.mark.parametrize("name", RECIPES)
def test_it_holds_verbs_and_no_machine_learning(name: str) -> None:
    tree = ast.parse(RECIPES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots = {(node.module or "").split(".")[0]}
            if node.module and node.module.startswith("posttrain."):
                values = node.module == "posttrain.algorithms"
                assert values or node.module.startswith("posttrain.recipes."), node.module
        else:
            continue
        assert roots <= MAY_IMPORT, roots
    assert not any(isinstance(node, ast.ClassDef | ast.Lambda | ast.While) for node in tree.body)


@pytest.mark.parametrize("name", RECIPES)
def test_it_plans_to_an_evaluation(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name, store=Store(tmp_path / "store"))
    graph = loaded.graph
    assert loaded.warnings == ()
    assert graph.nodes[graph.target].kind == "evaluate"
    assert sum(node.kind == "domain" for node in graph.nodes.values()) == 4


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("domains", [("left", "right"), ("one", "two", "three", "four", "five")])
def test_it_plans_on_a_suite_of_other_domains(
    name: str, domains: tuple[str, ...], tmp_path: Path
) -> None:
    row = {"prompt": "p", "answer": "a", "demo": "a", "thought": "t"}
    rows = [row | {"prompt": f"p{number}"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = tmp_path / "suite.py"
    suite.write_text(SUITE.replace("NAMES", repr(domains)))
    graph = load_recipe(name, store=Store(tmp_path / "store"), suite=str(suite)).graph
    assert {node.name for node in graph.nodes.values() if node.kind == "domain"} == set(domains)


@pytest.mark.parametrize("name", RECIPES)
def test_it_names_no_domain_of_a_suite(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    code = text[text.index('"""', 3) + 3 :]
    for domain in ("add", "reverse", "sort", "palindrome"):
        assert f'"{domain}"' not in code
