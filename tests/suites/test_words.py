"""The suite `words`: every worked answer is right, long enough and short enough, and the same each
time; no question tells its answer."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from posttrain.rewards.formats import find_format
from posttrain.rewards.verifiers import load_verifier
from posttrain.rewards.worked import ASKED, MARK
from posttrain.suites.build import build_domain, create_gym
from posttrain.suites.domain import Domain, domain_node
from posttrain.suites.load import load_suite

SUITE, DIRECTORY = load_suite("words")
COUNTED = 200
SMALL = {"train": 200, "validation": 25, "heldout": 40}
"""Problems per split of what is built here: the first of those that the suite has."""
PIECES = re.compile(r"\d|[A-Za-z]{1,6}|[^\sA-Za-z\d]")
"""About a token each of a vocabulary of 50,000 that has every digit by itself."""
Rows = dict[str, list[dict[str, Any]]]


def built(name: str, out: Path) -> Rows:
    """A small copy of a domain, as the store would have it."""
    import dataclasses

    domain = SUITE.domains[name]
    sizes = {f"num_{split}": count for split, count in SMALL.items()}
    source = dataclasses.replace(domain.source, **sizes)  # type: ignore[arg-type]
    parts = domain_node(Domain(name=name, source=source, verifier=domain.verifier), DIRECTORY)
    out.mkdir()
    build_domain(parts.config, parts.runtime, out, parts.data)
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in SMALL
    }


@pytest.fixture(scope="module", params=SUITE.domains)
def domain(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path, Rows]:
    """Name, directory and rows of each domain."""
    out = tmp_path_factory.mktemp("words") / request.param
    return request.param, out, built(request.param, out)


def test_worked_answers_are_right_and_others_are_not(domain: tuple[str, Path, Rows]) -> None:
    _, out, rows = domain
    verifier = load_verifier(out)
    problems = rows["train"]
    assert len(problems) == COUNTED
    assert all(verifier.score(p["demo"], p) == 1 for p in problems)
    shifted = [*problems[1:], problems[0]]
    wrong = [
        verifier.score(other["demo"], p)
        for p, other in zip(problems, shifted, strict=True)
        if p["answer"] != other["answer"]
    ]
    assert len(wrong) > 150 and not any(wrong)
    # The mark is what is asked for; an answer alone is none.
    assert not any(verifier.score(p["answer"], p) for p in problems)
    assert all(verifier.score(f"{MARK} {p['answer']}", p) == 1 for p in problems)


def test_worked_answers_have_30_to_150_tokens(domain: tuple[str, Path, Rows]) -> None:
    name, _, rows = domain
    lengths = sorted(len(PIECES.findall(p["demo"])) for p in rows["train"])
    assert lengths[len(lengths) // 50] >= 24 and lengths[-len(lengths) // 50] <= 160, name


def test_questions_ask_for_the_mark_and_tell_no_answer(domain: tuple[str, Path, Rows]) -> None:
    name, _, rows = domain
    problems = rows["train"]
    assert all(p["prompt"].endswith(ASKED) for p in problems)
    told = [p for p in problems if p["answer"] in p["prompt"].removesuffix(ASKED)]
    if name == "order":
        assert not told
    # A number of a story may be its answer by chance.
    assert len(told) < 0.5 * len(problems)
    answers = [p["answer"] for p in problems]
    assert max(map(answers.count, answers)) < 0.1 * len(answers)


def test_splits_share_no_problem_and_come_out_the_same(
    domain: tuple[str, Path, Rows], tmp_path: Path
) -> None:
    name, _, rows = domain
    text_format = find_format(SUITE.domains[name].source.format, where=name)  # type: ignore[union-attr]
    keys = {s: {text_format.key(p["meta"]["entry"]) for p in found} for s, found in rows.items()}
    assert {split: len(found) for split, found in keys.items()} == SMALL
    assert not keys["train"] & keys["heldout"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["heldout"]
    assert built(name, tmp_path / "again") == rows


EXAMPLES = {
    "legs": (
        {"animals": {"ant": 3, "dog": 1, "crab": 2}},
        "42",
        "How many legs do 3 ants, 1 dog and 2 crabs have together?",
        "3 ants: 3 * 6 = 18 legs\n1 dog: 1 * 4 = 4 legs\n2 crabs: 2 * 10 = 20 legs\n"
        "18 + 4 = 22\n22 + 20 = 42\n#### 42",
    ),
    "equation": (
        {"equation": "12 - 8*t = -20", "variable": "t"},
        "4",
        "Solve for t",
        "-8*t = -20 - 12 = -32\nt = -32 / -8 = 4\nCheck: -8 * 4 = -32\n#### 4",
    ),
    "order": (
        {"direction": "descending", "transformed_words": ["go", "acute"],
         "sorted_words": ["go", "acute"]},
        "go, acute",
        "Sort these words in descending alphabetical order: go, acute",
        "go: go\nac: acute\n#### go, acute",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_answers_by_hand(name: str) -> None:
    metadata, answer, question, worked = EXAMPLES[name]
    item = {"question": "Solve for t", "answer": answer, "metadata": metadata}
    text_format = find_format(name, where="here")
    assert text_format.prompt(item) == f"{question}\n{ASKED}"
    assert text_format.demo(item) == worked
    assert text_format.answer(worked) == answer
    with pytest.raises(ValueError, match="there is no ####"):
        text_format.answer(answer)


def test_equations_of_every_form_are_solved() -> None:
    text_format = find_format("equation", where="here")
    source = SUITE.domains["equation"].source
    found = create_gym("simple_equations", source.params, seed=7, size=300, where="here")  # type: ignore[union-attr]
    for item in islice(found, 300):
        if not text_format.fits(item):
            continue
        for line in text_format.steps(item).splitlines():
            sides = line.removeprefix("Check: ").split(" = ")
            name = item["metadata"]["variable"]
            values = {eval(side, {name: int(item["answer"])}) for side in sides}
            assert len(values) == 1, line
