"""Verifiers of domains: what they depend on, and golds that they cannot judge by."""

import dataclasses
import functools
import re

import pytest

from posttrain.engine.errors import ConfigError, PosttrainError, StageError
from posttrain.rewards import spec as spec_module
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.verifiers import load_verifier
from posttrain.suites import build as build_module
from posttrain.suites.build import build_domain
from posttrain.suites.domain import (
    Domain,
    Table,
    VerifierSpec,
    domain_node,
)

from .building import build, numbered, sums, table, write_rows


def test_a_python_verifier_travels_with_the_artifact(tmp_path):
    rows = [{**row, "limit": len(row["steps"])} for row in numbered(100)]
    write_rows(tmp_path / "t.jsonl", rows)
    source = "def score(response, problem):\n    return len(response) <= problem['meta']['limit']\n"
    (tmp_path / "grade.py").write_text(source)
    domain = table("python:grade.py:score", train="t.jsonl", demo="steps")
    before = domain_node(domain, tmp_path)
    metrics, rows = build(domain, tmp_path, tmp_path / "out")
    assert metrics["demo_score"] == 1.0
    (tmp_path / "grade.py").unlink()
    verifier = load_verifier(tmp_path / "out")
    assert verifier.score("", rows["train"][0]) == 1.0
    assert verifier.score("x" * 99, rows["train"][0]) == 0.0
    (tmp_path / "grade.py").write_text(source.replace("<=", "<"))
    after = domain_node(domain, tmp_path)
    assert before.config == after.config
    assert before.data["train"] == after.data["train"]
    assert before.data["verifier"] != after.data["verifier"]


@pytest.mark.parametrize(
    ("body", "constant"),
    [
        ("0.5", 0.5),
        ("0.0", 0.0),
        ("response == problem['answer']", None),
        # Tells nothing but length apart, which is something.
        ("len(response) < 100", None),
    ],
)
def test_a_verifier_that_tells_nothing_apart_is_noticed(tmp_path, body, constant):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "grade.py").write_text(f"def score(response, problem):\n    return {body}\n")
    domain = table("python:grade.py:score", train="t.jsonl")
    metrics, _ = build(domain, tmp_path, tmp_path / "out")
    assert metrics.get("constant_score") == constant


def test_a_broken_python_verifier_stops_the_build(tmp_path):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "grade.py").write_text("def score(response, problem):\n    return {}['x']\n")
    with pytest.raises(StageError, match=r"score\(\) on problem mine-\w+ raised KeyError"):
        build(table("python:grade.py:score", train="t.jsonl"), tmp_path, tmp_path / "out")


def test_an_answer_that_the_verifier_cannot_use_stops_the_build(tmp_path):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    with pytest.raises(StageError, match="needs one letter from A to J"):
        build(table("choice", train="t.jsonl"), tmp_path, tmp_path / "out")


def wanting(*names):
    """The source of a verifier that reads the last of these files, and declares them."""
    return (
        "import json\nfrom pathlib import Path\n"
        f"DATA_FILES = {list(names)}\n"
        f"TABLE = json.loads((Path(__file__).parent / {names[-1]!r}).read_text())\n\n"
        "def score(response, problem):\n"
        "    return TABLE['value'] if response == problem['answer'] else 0.0\n"
    )


@pytest.mark.parametrize("name", ["table.json", "tables/own.json", "train.jsonl"])
def test_what_a_verifier_declares_is_in_the_identity_and_travels(tmp_path, name):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "tables").mkdir()
    (tmp_path / name).write_text('{"value": 0.5}')
    (tmp_path / "grade.py").write_text(wanting(name))
    domain = table("python:grade.py:score", train="t.jsonl")
    before = domain_node(domain, tmp_path)
    _, rows = build(domain, tmp_path, tmp_path / "out")
    (tmp_path / name).write_text('{"value": 0.75}')
    after = domain_node(domain, tmp_path)
    assert before.data[f"verifier/{name}"] != after.data[f"verifier/{name}"]
    problem = rows["train"][0]
    assert load_verifier(tmp_path / "out").score(problem["answer"], problem) == 0.5
    with pytest.raises(ConfigError, match=r"changed"):
        build_domain(before.config, before.runtime, tmp_path / "again", before.data)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("DATA_FILES = ['gone.json']", r"line 1: DATA_FILES: there is no file .*gone\.json"),
        ("DATA_FILES = ['../t.jsonl']", r"'\.\./t\.jsonl' has to lie beside grade\.py or below"),
        ("DATA_FILES = ['/etc/hosts']", "has to lie beside"),
        ("DATA_FILES: list = 'table.json'", "a plain list of texts"),
        ("DATA_FILES = [n for n in 'ab']", "a plain list of texts"),
    ],
)
def test_a_bad_declaration_is_told(tmp_path, declaration, message):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "grade.py").write_text(
        f"{declaration}\ndef score(response, problem):\n    return 0\n"
    )
    with pytest.raises(ConfigError, match=message):
        domain_node(table("python:grade.py:score", train="t.jsonl"), tmp_path)


READS = [
    "json.load(open({here!r}))['value']",
    "json.loads(Path({here!r}).read_bytes())['value']",
    "json.loads(os.read(os.open({here!r}, os.O_RDONLY), 99))['value']",
]


@pytest.mark.parametrize("part", ["verifier", "oracle"])
@pytest.mark.parametrize("reads", READS)
def test_an_undeclared_file_is_refused_by_name(tmp_path, part, reads):
    """Whether it is opened in the function or while the file is loaded, and however."""
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "table.json").write_text('{"value": 0.5}')
    value = reads.format(here=str(tmp_path / "table.json"))
    source = "import json, os\nfrom pathlib import Path\n\ndef score(response, problem):\n"
    (tmp_path / "grade.py").write_text(f"{source}    return {value}\n")
    domain = table("python:grade.py:score" if part == "verifier" else "exact", train="t.jsonl")
    if part == "oracle":
        domain = dataclasses.replace(domain, oracle="python:grade.py:score")
    with pytest.raises(ConfigError, match=rf"{part}: grade\.py reads 'table\.json', .*DATA_FILES"):
        build(domain, tmp_path, tmp_path / "out")


def test_what_is_not_the_users_own_may_be_read(tmp_path):
    """Files elsewhere, hidden ones, directories, what is written, and its own copy."""
    suite, other = tmp_path / "suite", tmp_path / "other.txt"
    suite.mkdir()
    other.write_text("0")
    (suite / ".cache").mkdir()
    (suite / ".cache" / "x").write_text("0")
    write_rows(suite / "t.jsonl", numbered(100))
    (suite / "grade.py").write_text(
        "import os\n\ndef score(response, problem):\n"
        f"    os.listdir({str(suite)!r})\n"
        f"    open({str(suite / 'log')!r}, 'w').close()\n"
        f"    open(__file__).close()\n"
        f"    open({str(suite / '.cache' / 'x')!r}).close()\n"
        f"    return float(open({str(other)!r}).read()) + (response == problem['answer'])\n"
    )
    _, rows = build(table("python:grade.py:score", train="t.jsonl"), suite, tmp_path / "out")
    assert sum(map(len, rows.values())) == 100


@pytest.mark.parametrize(
    ("verifier", "answers", "options"),
    [
        ("exact", {3: " ", 9: ""}, {}),
        ("regex", {3: ".", 9: "[", 30: r"\S"}, {"from_answer": True}),
        ("choice", {3: "seven", 9: "K"}, {}),
        ("math", {3: "-", 9: "??"}, {}),
        ("python:grade.py:score", None, {}),
    ],
)
def test_golds_that_nonsense_satisfies_are_refused_together(tmp_path, verifier, answers, options):
    good = "A" if verifier == "choice" else "7"
    rows = [{"prompt": f"ask {i}", "answer": (answers or {}).get(i, good)} for i in range(100)]
    write_rows(tmp_path / "t.jsonl", rows)
    (tmp_path / "grade.py").write_text("def score(response, problem):\n    return True\n")
    spec = VerifierSpec(name=verifier, options=options)
    domain = Domain(name="mine", source=Table(train="t.jsonl"), verifier=spec)
    wanted = ["ask 3'", "ask 9'", "ask 30'"][: len(answers or {})]
    try:
        build(domain, tmp_path, tmp_path / "out")
        message = "built"
    except PosttrainError as error:
        message = str(error)
    if answers is None:
        assert re.match(r"domain mine: 9 answers cannot be judged by:\n", message)
        assert message.count("full marks to nonsense, such as '?'") == 9
    else:
        assert all(text in message for text in wanted), message


def test_the_libraries_behind_math_are_in_the_identity(tmp_path, monkeypatch):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    domain = table("math", train="t.jsonl")
    before = domain_node(domain, tmp_path).config["verifier"]
    assert set(before["libraries"]) == {"math-verify", "sympy", "latex2sympy2_extended"}
    monkeypatch.setattr(spec_module, "version_of", lambda name: "9.9.9")
    assert domain_node(domain, tmp_path).config["verifier"] != before
    for other in ("exact", "choice"):
        config = domain_node(table(other, train="t.jsonl"), tmp_path).config["verifier"]
        assert config == {"name": other, "options": {}}, "theirs is what it was"


@pytest.mark.parametrize("body", ["    time.sleep(600)", "    return 1.0\ntime.sleep(600)"])
def test_a_verifier_that_never_returns_is_stopped_while_its_domain_is_built(
    tmp_path, monkeypatch, body
):
    """In the function, or while its file is loaded."""
    monkeypatch.setattr(
        build_module, "VerifierPool", functools.partial(VerifierPool, python_seconds=1.0)
    )
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "grade.py").write_text(f"import time\ndef score(response, problem):\n{body}\n")
    late = r"took longer than 1 s over problem mine-|could not be asked: .* was not ready in time"
    with pytest.raises(StageError, match=rf"its verifier python:grade\.py:score ({late})"):
        build(table("python:grade.py:score", train="t.jsonl"), tmp_path, tmp_path / "out")


def test_the_library_behind_a_table_of_reasoning_gym_is_in_the_identity(tmp_path):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    domain = table("reasoning_gym:chain_sum", train="t.jsonl")
    assert "reasoning-gym" in domain_node(domain, tmp_path).config["verifier"]["libraries"]
    config = domain_node(sums(), tmp_path).config
    assert "libraries" not in config["verifier"], "its source says the version"
