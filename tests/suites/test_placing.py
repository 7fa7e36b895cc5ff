"""Which rows of a table are one problem, and which split it belongs to."""

import json

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, VerifierSpec, domain_node
from posttrain.suites.split import SPLITS, normalised, prompt_digest, split_of


def table(verifier="exact", **fields):
    spec = VerifierSpec(name=verifier)
    return Domain(name="mine", source=Table(**fields), verifier=spec)


def build(domain, base):
    node = domain_node(domain, base)
    out = base / f"out-{len(list(base.glob('out-*')))}"
    out.mkdir()
    metrics = build_domain(node.config, node.runtime, out, node.data)
    rows = {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }
    facts = node.runtime["facts"]
    assert {name: metrics[name] for name in facts} == facts
    return facts, rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def variants(number):
    """One text in other white space, case and Unicode form."""
    text = f"Café ﬁne straße {number}"
    return [text, f"  CAFE\u0301\t{text[5:].upper()} ", f"café  fine STRASSE {number}"]


def test_a_normalised_text_has_one_form():
    assert {normalised(text) for text in variants(7)} == {"café fine strasse 7"}
    assert all(normalised(normalised(text)) == normalised(text) for text in ("İ", "ΐ", "ǰ ẞ"))


def test_a_split_does_not_separate_what_reads_the_same(tmp_path):
    rows = [
        {"prompt": text, "answer": str(form), "demo": "x"}
        for number in range(40)
        for form, text in enumerate(variants(number))
    ]
    write(tmp_path / "t.jsonl", rows)
    facts, found = build(table(train="t.jsonl"), tmp_path)
    where = {}
    for split, of_split in found.items():
        assert of_split
        for row in of_split:
            where.setdefault(normalised(row["prompt"]), set()).add(split)
            assert split_of(normalised(row["prompt"])) == split
    assert len(where) == 40
    assert all(len(splits) == 1 for splits in where.values())
    # Other answers to one question: told, and each a problem with an id of its own.
    assert facts["contradicting"] == 40
    assert len({row["id"] for rows in found.values() for row in rows}) == 120


def test_the_first_of_a_text_is_named_by_it_and_others_by_their_answer_too(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": str(n), "demo": "x"} for n in range(60)]
    write(tmp_path / "t.jsonl", [*rows, {"prompt": "p7", "answer": "other", "demo": "x"}])
    _, found = build(table(train="t.jsonl"), tmp_path)
    ids = {(row["prompt"], row["answer"]): row["id"] for of in found.values() for row in of}
    assert ids["p7", "7"].endswith(prompt_digest("p7")[:12])
    assert len(set(ids.values())) == 61


def test_conversations_that_open_alike_stay_together(tmp_path):
    rows = [
        {"m": [{"role": "user", "content": f"open {n % 40}"}, {"role": "assistant", "content": "?"},
               {"role": "user", "content": f"more {n}"}]}
        for n in range(200)
    ]  # fmt: skip
    write(tmp_path / "t.jsonl", rows)
    _, found = build(table("none", train="t.jsonl", messages="m"), tmp_path)
    opened = {
        split: {row["messages"][0]["content"] for row in rows} for split, rows in found.items()
    }
    assert sum(map(len, found.values())) == 200
    assert all(opened.values())
    assert sum(map(len, opened.values())) == 40


def test_every_demonstration_of_a_prompt_is_kept(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "demo": text} for text in ("x", "y", "x", "z", None)]
    rows += [{"prompt": "A ", "answer": " 1", "demo": "w"}]
    rows += [{"prompt": "b", "answer": "1", "demo": text} for text in (None, "late")]
    write(tmp_path / "t.jsonl", rows)
    mine = table(train="t.jsonl", demo="demo", validation=0, heldout=0)
    facts, found = build(mine, tmp_path)
    first, second = found["train"]
    assert (first["demo"], first["demos"]) == ("x", ["y", "z", "w"])
    assert second["demo"] == "late"
    assert "demos" not in second
    assert {name: facts[name] for name in ("rows", "duplicates", "further_demos", "no_demo")} == {
        "rows": 8,
        "duplicates": 3,
        "further_demos": 3,
        "no_demo": 0,
    }
    # Every row that was read is a problem, a repeat or a further demonstration.
    assert facts["rows"] == facts["train"] + facts["duplicates"] + facts["further_demos"]
    assert facts["contradicting"] == 0


def test_rows_that_think_differently_stay_rows(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "demo": "1", "why": why} for why in ("x", "y", "x")]
    write(tmp_path / "t.jsonl", rows)
    mine = table(train="t.jsonl", demo="demo", thought="why", validation=0, heldout=0)
    facts, found = build(mine, tmp_path)
    assert [row["thought"] for row in found["train"]] == ["x", "y"]
    assert len({row["id"] for row in found["train"]}) == 2
    assert (facts["duplicates"], facts["further_demos"], facts["contradicting"]) == (1, 0, 0)


def test_without_a_verifier_answers_tell_nothing_apart(tmp_path):
    rows = [{"prompt": "a", "answer": answer, "demo": answer} for answer in "xyz"]
    write(tmp_path / "t.jsonl", rows)
    mine = table("none", train="t.jsonl", demo="demo", validation=0, heldout=0)
    facts, found = build(mine, tmp_path)
    (row,) = found["train"]
    assert (row["demo"], row["demos"]) == ("x", ["y", "z"])
    assert (facts["further_demos"], facts["contradicting"]) == (2, 0)


def test_the_same_question_in_two_tables_is_refused_however_it_is_written(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": f"What is {n}?", "answer": "1"} for n in range(50)])
    write(tmp_path / "h.jsonl", [{"prompt": " what IS  7?", "answer": "2"}])
    pattern = r"a\.jsonl, line 8: this problem also stands in the heldout table .*h\.jsonl, line 1"
    with pytest.raises(ConfigError, match=pattern):
        domain_node(table(train="a.jsonl", heldout="h.jsonl"), tmp_path)
    # Another system message makes no other question.
    with pytest.raises(ConfigError, match="also stands in the heldout table"):
        write(tmp_path / "a.jsonl", [{"prompt": "What is 7?", "answer": "1", "s": "Be brief."}])
        write(tmp_path / "h.jsonl", [{"prompt": "What is 7?", "answer": "1", "s": ""}])
        domain_node(table(train="a.jsonl", heldout="h.jsonl", system_column="s"), tmp_path)


def test_a_domain_may_do_without_a_split(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": str(n), "demo": str(n)} for n in range(50)]
    write(tmp_path / "t.jsonl", rows)
    _, found = build(table(train="t.jsonl", heldout=0), tmp_path)
    assert found["heldout"] == []
    assert len(found["train"]) + len(found["validation"]) == 50
    assert all(split_of(row["prompt"]) == "validation" for row in found["validation"])
    _, found = build(table(train="t.jsonl", heldout=0, validation=0), tmp_path)
    assert len(found["train"]) == 50
    one = domain_node(table(train="t.jsonl"), tmp_path)
    assert "without" not in one.config["source"]
    assert domain_node(table(train="t.jsonl", heldout=0), tmp_path).config != one.config


@pytest.mark.parametrize("number", [1, -1])
def test_another_number_is_no_split(tmp_path, number):
    write(tmp_path / "t.jsonl", [{"prompt": "p", "answer": "a"}])
    with pytest.raises(ConfigError, match=r"heldout = .*; it takes a table of its own, or 0"):
        domain_node(table(train="t.jsonl", heldout=number), tmp_path)


def test_a_domain_without_a_verifier_is_built_without_answers(tmp_path):
    write(tmp_path / "t.jsonl", [{"prompt": f"p{n}", "demo": "?"} for n in range(60)])
    facts, found = build(table("none", train="t.jsonl", demo="demo"), tmp_path)
    assert all(row["answer"] is None for rows in found.values() for row in rows)
    assert facts["rows"] == 60
    # A column of that name that is no answer is one that nobody asked for.
    write(
        tmp_path / "t.jsonl", [{"prompt": f"p{n}", "answer": [n], "demo": "?"} for n in range(60)]
    )
    assert build(table("none", train="t.jsonl", demo="demo"), tmp_path)[0]["left_out"] == 60
    write(tmp_path / "t.jsonl", [{"prompt": f"p{n}", "demo": "?"} for n in range(60)])
    with pytest.raises(ConfigError, match="column 'answer' is missing"):
        domain_node(table("exact", train="t.jsonl", demo="demo"), tmp_path)
