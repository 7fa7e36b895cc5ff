"""The noisy annotator: how often it errs, that it repeats itself, and wrong demonstrations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends.prompting import in_modes, visible
from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.oracle import (
    Oracle,
    brevity,
    demonstrate,
    ends_alike,
    load_quality,
)
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.spec import VerifierSpec
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Procedural, Suite, Table, domain_node
from posttrain.suites.load import load_suite

Problem = dict[str, Any]
TASTE = """
def quality(response, problem):
    return response.count("z") / 10
"""


DOCUMENTED = {0.0: 1.0, 0.5: 0.9, 1.0: 0.87, 2.0: 0.77, 4.0: 0.65}
"""Noise to agreement, as docs/suites.md has it."""


def write(domain: Domain, base: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    node = domain_node(domain, base)
    metrics = build_domain(node.config, node.runtime, out, node.data)
    record = json.loads((out / "domain.json").read_text())
    assert record["config"] == node.config and metrics["train"]
    return out


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four domains of the suite core, fewer problems each."""
    suite, directory = load_suite("core")
    root = tmp_path_factory.mktemp("core")
    paths = {}
    for name, domain in suite.domains.items():
        assert isinstance(domain.source, Procedural)
        source = replace(domain.source, num_train=400, num_validation=20, num_heldout=40)
        paths[name] = write(replace(domain, source=source), directory, root / name)
    return paths


@pytest.fixture(scope="module")
def judge(core: dict[str, Path]) -> Iterator[VerifierPool]:
    with VerifierPool(core, num_workers=1, by="oracle") as pool:
        yield pool


@pytest.fixture(scope="module")
def verifier(core: dict[str, Path]) -> Iterator[VerifierPool]:
    with VerifierPool(core, num_workers=1) as pool:
        yield pool


def rows_of(path: Path) -> list[Problem]:
    return [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]


def wrong(pool: VerifierPool, row: Problem, rows: list[Problem], seed: int = 0) -> str:
    return demonstrate(row, rows, scorer(pool), noise=1.0, seed=seed)


def scorer(pool: VerifierPool) -> Any:
    return lambda text, problem: pool.scores([problem], [text])[0]


def pairs(
    core: dict[str, Path], verifier: VerifierPool, each: int = 400
) -> list[tuple[Problem, str, str]]:
    """Per problem of every domain two responses, drawn from the right one and two wrong ones."""
    found = []
    for path in core.values():
        rows = rows_of(path)
        for number, row in enumerate(rows[:each]):
            texts = [row["demo"], *(wrong(verifier, row, rows, seed) for seed in (1, 2))]
            found.append((row, *list(itertools.combinations(texts, 2))[number % 3]))
    return found


def agreement(oracle: Oracle, asked: list[tuple[Problem, str, str]]) -> float:
    """Share of the pairs of unlike quality in which the oracle prefers the better one."""
    right = []
    for row, a, b in asked:
        of_a, of_b = oracle.qualities([row, row], [a, b])
        if of_a != of_b:
            right.append(oracle.prefer(row, a, b)[0] == int(of_b > of_a))
    assert len(right) > 0.8 * len(asked)
    return sum(right) / len(right)


def test_agreement_with_what_it_likes_falls_with_the_noise(
    core: dict[str, Path], judge: VerifierPool, verifier: VerifierPool
) -> None:
    """The rates that docs/suites.md gives, on 1600 pairs of the suite core."""
    asked = pairs(core, verifier)
    rates = {
        noise: agreement(Oracle(qualities=judge.scores, noise=noise), asked) for noise in DOCUMENTED
    }
    assert rates[0.0] == 1.0
    assert rates == pytest.approx(DOCUMENTED, abs=0.02)


def test_one_pair_errs_as_bradley_and_terry_say(core: dict[str, Path], judge: VerifierPool) -> None:
    """Over 4000 seeds, P(a) = sigmoid(5 * difference / noise) within 4 standard errors."""
    row = rows_of(core["reverse"])[0]
    a, b = row["demo"], row["demo"][::-1]
    of_a, of_b = judge.scores([row, row], [a, b])
    known = {a: of_a, b: of_b}
    share = sum(
        Oracle(
            qualities=lambda _, texts: [known[text] for text in texts], noise=3.0, seed=seed
        ).prefer(row, a, b)[0]
        == 0
        for seed in range(4000)
    )
    expected = 1 / (1 + math.exp(-5 * (of_a - of_b) / 3))
    assert 0.55 < expected < 0.95
    assert share / 4000 == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))


def test_an_answer_depends_on_the_question_alone(
    core: dict[str, Path], judge: VerifierPool
) -> None:
    rows = rows_of(core["add"])
    first, again, other = (
        Oracle(qualities=judge.scores, noise=4.0, seed=seed) for seed in (1, 1, 2)
    )
    said, changed = [], 0
    for row in rows[:100]:
        index, strength = first.prefer(row, row["demo"], "1=2")
        # Which is named first does not matter, nor what was asked before.
        assert first.prefer(row, "1=2", row["demo"]) == (1 - index, strength)
        assert again.prefer(row, row["demo"], "1=2") == (index, strength)
        worth = [oracle.rates([row], ["1=2"]) for oracle in (first, again, other)]
        assert worth[0] == worth[1] != worth[2]
        said.append(index)
        changed += other.prefer(row, row["demo"], "1=2")[0] != index
    assert 0 < sum(said) < 100 and changed > 0
    assert first.prefer(rows[0], "1", "1") == (0, 1)


def test_strengths_are_of_the_margin(core: dict[str, Path]) -> None:
    row = rows_of(core["add"])[0]
    known = {"a": 0.5, "b": 0.42, "c": 0.3, "d": 0.1, "e": -0.3}
    exact = Oracle(qualities=lambda _, texts: [known[text] for text in texts], noise=0.0)
    assert [exact.prefer(row, "a", text) for text in "bcde"] == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_rates_are_one_order_and_pairs_need_not_be(
    core: dict[str, Path], judge: VerifierPool, verifier: VerifierPool
) -> None:
    """Without noise both are the order of the qualities. With noise, rates still are one order that
    does not hang on the order of the texts, while some triples of pairs go round in a circle."""
    rows = rows_of(core["sort"])
    exact = Oracle(qualities=judge.scores, noise=0.0)
    noisy = Oracle(qualities=judge.scores, noise=4.0)
    circles = unlike = 0
    for row in rows[:150]:
        texts = list(
            dict.fromkeys([row["demo"], *(wrong(verifier, row, rows, s) for s in range(3))])
        )
        same = [row] * len(texts)
        worth = exact.qualities(same, texts)
        assert exact.rates(same, texts) == pytest.approx([5 * quality for quality in worth])
        rates = noisy.rates(same, texts)
        assert noisy.rates(same, texts[::-1]) == rates[::-1]
        unlike += rates.index(max(rates)) != worth.index(max(worth))
        for a, b, c in itertools.combinations(texts, 3):
            wins = [noisy.prefer(row, x, y)[0] for x, y in ((a, b), (b, c), (c, a))]
            circles += len(set(wins)) == 1
            assert len({exact.prefer(row, x, y)[0] for x, y in ((a, b), (b, c), (c, a))}) == 2
    assert circles > 10 and unlike > 30


def test_style_is_brevity_and_an_ending() -> None:
    assert [brevity(text, "abcd") for text in ("", "ab", "abcd", "a" * 8, "a" * 99)] == [
        1.0, 0.75, 0.5, 0.0, 0.0,
    ]  # fmt: skip
    assert ends_alike("4-1=7", "3") and ends_alike("xy", "a")
    assert not any(ends_alike(text, "3") for text in ("", "3=", "3 ", "x"))


def test_right_beats_wrong_whatever_the_style(core: dict[str, Path], judge: VerifierPool) -> None:
    row = rows_of(core["palindrome"])[0]
    right, short = judge.scores([row, row], [row["demo"] + " ", row["demo"][:-1]])
    assert right > short + 0.3


@pytest.mark.parametrize("name", ["add", "reverse", "sort", "palindrome"])
@pytest.mark.parametrize("modes", [(), ("think", "no_think")])
def test_demonstrations_are_wrong_at_the_rate_of_the_noise(
    core: dict[str, Path], verifier: VerifierPool, name: str, modes: tuple[str, ...]
) -> None:
    rows = in_modes(rows_of(core[name]), modes)
    given = {
        noise: [demonstrate(r, rows, scorer(verifier), noise=noise, seed=3) for r in rows]
        for noise in (0.0, 0.2, 0.6)
    }
    assert given[0.0] == [row["demo"] for row in rows]
    for noise in (0.2, 0.6):
        scores = verifier.scores(rows, given[noise])
        changed = [text != row["demo"] for text, row in zip(given[noise], rows, strict=True)]
        # Wrong exactly where it was changed, and still in the form of its mode.
        assert [score < 1 for score in scores] == changed
        assert sum(changed) / len(rows) == pytest.approx(noise, abs=4 * math.sqrt(0.25 / len(rows)))
        for text, row in zip(given[noise], rows, strict=True):
            assert text.strip() and visible(text, row.get("mode")) is not None
    # What is wrong at one noise is wrong in the same way at a higher one.
    low, high = (
        [text != row["demo"] for text, row in zip(given[noise], rows, strict=True)]
        for noise in (0.2, 0.6)
    )
    assert all(b for a, b in zip(low, high, strict=True) if a)
    assert given[0.2] != [demonstrate(r, rows, scorer(verifier), noise=0.2, seed=4) for r in rows]


def test_a_verifier_that_accepts_everything_has_no_wrong_demonstration(
    core: dict[str, Path],
) -> None:
    rows = rows_of(core["add"])
    with pytest.raises(StageError, match="none of 40 corrupted demonstrations is wrong"):
        demonstrate(rows[0], rows, lambda text, problem: 1.0, noise=1.0, seed=0)


def own_domain(base: Path, oracle: str | None) -> Domain:
    rows = [{"prompt": f"{i} apples", "answer": str(i), "demo": str(i)} for i in range(100)]
    base.mkdir(exist_ok=True)
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "taste.py").write_text(TASTE)
    return Domain(
        name="own",
        source=Table(train="rows.jsonl", demo="demo"),
        verifier=VerifierSpec(name="exact"),
        oracle=oracle,
    )


def test_a_suite_may_bring_its_own_taste(tmp_path: Path) -> None:
    domain = own_domain(tmp_path / "base", "python:taste.py:quality")
    path = write(domain, tmp_path / "base", tmp_path / "out")
    row = rows_of(path)[0]
    assert load_quality(path).score("zz", row) == pytest.approx(0.2)
    thinks = row | {"mode": "think"}
    assert load_quality(path).score("<think>zzz</think>z", thinks) == pytest.approx(0.1)
    with VerifierPool({"own": path}, num_workers=1, by="oracle") as pool:
        # In a process of its own, as a python verifier.
        assert pool.scores([row, row], ["zz", row["answer"]]) == pytest.approx([0.2, 0.0])
        assert Oracle(qualities=pool.scores, noise=0.0).prefer(row, row["answer"], "zz") == (1, 2)
    with VerifierPool({"own": path}, num_workers=1) as pool:
        assert pool.scores([row, row], ["zz", row["answer"]]) == [0.0, 1.0]


def test_an_oracle_is_part_of_a_domains_identity(tmp_path: Path) -> None:
    with_taste = own_domain(tmp_path, "python:taste.py:quality")
    node, plain = (domain_node(d, tmp_path) for d in (with_taste, replace(with_taste, oracle=None)))
    assert node.config == plain.config | {"oracle": "python:quality"}
    assert set(node.data) - set(plain.data) == {"oracle"}
    (tmp_path / "taste.py").write_text(TASTE + "# changed\n")
    assert domain_node(with_taste, tmp_path).data["oracle"] != node.data["oracle"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConfigError, match=r"domain own: oracle: .* changed since the plan"):
        build_domain(node.config, node.runtime, out, node.data)


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        ("taste", "domain own: oracle: 'taste' has to be written 'python:<file.py>:<function>'"),
        ("python:taste.py:qualty", "did you mean 'quality'"),
        ("python:none.py:quality", "none.py does not exist"),
    ],
)
def test_a_wrong_oracle_is_refused_while_planning(
    tmp_path: Path, oracle: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        domain_node(own_domain(tmp_path, oracle), tmp_path)


def test_a_suite_file_names_oracle_and_columns(tmp_path: Path) -> None:
    own_domain(tmp_path, None)
    (tmp_path / "mine.toml").write_text(
        '[domains.own]\ntrain = "rows.jsonl"\nverifier = "exact"\ndemo = "demo"\n'
        'thought = "prompt"\ndirect = "answer"\noracle = "python:taste.py:quality"\n'
    )
    suite, base = load_suite(str(tmp_path / "mine.toml"))
    assert isinstance(suite, Suite)
    domain = suite.domains["own"]
    assert domain.oracle == "python:taste.py:quality"
    row = rows_of(write(domain, base, tmp_path / "out"))[0]
    assert (row["thought"], row["direct"]) == (row["prompt"], row["answer"])
    (tmp_path / "mine.toml").write_text(
        '[domains.own]\ntrain = "rows.jsonl"\nverifier = "exact"\noracle = 3\n'
    )
    with pytest.raises(ConfigError, match=r"domains.own.oracle is 3; it has to be a text"):
        load_suite(str(tmp_path / "mine.toml"))
