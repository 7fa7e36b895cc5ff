"""Domains: disjoint splits, identity, checks at plan time, and the artifact that is built."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from posttrain.engine.errors import ConfigError, StageError
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.rewards.formats import FORMATS, TextFormat
from posttrain.rewards.verifiers import load_verifier
from posttrain.suites.build import build_domain
from posttrain.suites.domain import (
    Domain,
    Suite,
    domain_node,
)
from posttrain.suites.split import split_of

from .building import SPLITS, build, numbered, sums, table, write_rows


def require_disjoint(rows):
    for split in SPLITS:
        prompts = {row["prompt"] for row in rows[split]}
        assert prompts
        assert len(prompts) == len(rows[split])
        for other in SPLITS:
            if other != split:
                assert prompts.isdisjoint(row["prompt"] for row in rows[other])


def test_split_of_gives_the_stated_shares():
    counts = dict.fromkeys(SPLITS, 0)
    for n in range(20_000):
        counts[split_of(f"problem {n}")] += 1
    assert counts["heldout"] / 20_000 == pytest.approx(0.15, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.10, abs=0.01)


def test_procedural_splits_are_disjoint_full_and_repeatable(tmp_path):
    metrics, rows = build(sums(), tmp_path, tmp_path / "out")
    require_disjoint(rows)
    assert {split: len(rows[split]) for split in SPLITS} == {
        "train": 300,
        "validation": 40,
        "heldout": 60,
    }
    assert all(split_of(row["prompt"]) == split for split in SPLITS for row in rows[split])
    assert metrics["demo_score"] == 1.0
    assert 0 < metrics["top_answer_share"] < 0.2
    build(sums(), tmp_path, tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_procedural_splits_stay_disjoint_across_seeds(tmp_path):
    _, first = build(sums(seed=1), tmp_path, tmp_path / "one")
    _, second = build(sums(seed=2), tmp_path, tmp_path / "two")
    train = {row["prompt"] for row in first["train"]}
    assert train.isdisjoint(row["prompt"] for row in second["heldout"])
    assert train != {row["prompt"] for row in second["train"]}


def test_procedural_rows_are_scored_from_what_was_written(tmp_path):
    _, rows = build(sums(), tmp_path, tmp_path / "out")
    verifier = load_verifier(tmp_path / "out")
    for row in rows["heldout"]:
        assert set(row) == {"id", "domain", "prompt", "answer", "demo", "meta"}
        assert row["domain"] == "sums"
        assert verifier.score(row["demo"], row) == 1.0
        assert verifier.score(str(int(row["answer"]) + 1), row) == 0.0


def test_procedural_says_how_many_problems_there_are(tmp_path):
    small = sums(params={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    with pytest.raises(ConfigError, match=r"ran out of distinct problems: 200 found") as caught:
        build(small, tmp_path, tmp_path / "out")
    assert "of 300 for train" in str(caught.value)


@pytest.mark.parametrize("wrong", ["1", ""])
def test_a_demonstration_that_scores_below_one_is_an_error(tmp_path, monkeypatch, wrong):
    """The full one, or the one without steps."""

    class Wrong(TextFormat):
        def demo(self, item):
            return item["answer"] + wrong

        def direct(self, item):
            return None if wrong else item["answer"] + "1"

    monkeypatch.setitem(FORMATS, "wrong", Wrong())
    with pytest.raises(StageError, match=r"problem sums-\w+: its demonstration .* scores 0"):
        build(sums(format="wrong"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"params": {"max_term": 3}}, "params.max_term .* did you mean 'max_terms'"),
        ({"params": {"size": 3}}, "params.size is set by the domain"),
        ({"format": "plane"}, "unknown format 'plane'; did you mean 'plain'"),
        ({"num_heldout": 0}, "num_heldout is 0"),
        ({"params": {"max_terms": {1}}}, "no stable serialisation"),
    ],
)
def test_bad_procedural_domains_are_refused_at_plan_time(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        domain_node(sums(**changes), tmp_path)


def test_a_parameter_value_that_the_dataset_refuses(tmp_path):
    with pytest.raises(ConfigError, match="min_terms must be positive"):
        build(sums(params={"min_terms": 0}), tmp_path, tmp_path / "out")


def test_identity_of_a_procedural_domain_is_its_literals(tmp_path):
    def identity(domain):
        node = domain_node(domain, tmp_path)
        return digest({"config": node.config, "data": node.data})

    assert identity(sums()) == identity(sums())
    assert identity(sums()) != identity(sums(seed=4))
    assert identity(sums()) != identity(sums(params={"max_terms": 4}))


def test_table_without_own_splits_is_split_by_problem(tmp_path):
    write_rows(tmp_path / "all.jsonl", [*numbered(200), *numbered(5)])
    domain = table(train="all.jsonl", demo="steps")
    metrics, rows = build(domain, tmp_path, tmp_path / "out")
    require_disjoint(rows)
    assert sum(len(rows[split]) for split in SPLITS) == 200
    assert metrics["duplicates"] == 5
    assert all(split_of(row["prompt"]) == split for split in SPLITS for row in rows[split])
    row = rows["train"][0]
    assert row["demo"] == f"so {row['answer']}"
    assert row["id"].startswith("mine-")
    assert row["meta"] == {}


def test_table_with_own_splits_keeps_them(tmp_path):
    write_rows(tmp_path / "a.jsonl", numbered(50))
    write_rows(tmp_path / "b.jsonl", numbered(10, 100))
    write_rows(tmp_path / "c.jsonl", numbered(10, 200))
    own = table(train="a.jsonl", validation="b.jsonl", heldout="c.jsonl")
    _, rows = build(own, tmp_path, tmp_path / "own")
    require_disjoint(rows)
    assert [len(rows[split]) for split in SPLITS] == [50, 10, 10]
    heldout_only = table(train="a.jsonl", heldout="c.jsonl")
    _, rows = build(heldout_only, tmp_path, tmp_path / "heldout_only")
    require_disjoint(rows)
    assert len(rows["heldout"]) == 10
    assert len(rows["train"]) + len(rows["validation"]) == 50
    assert all(split_of(row["prompt"]) == "validation" for row in rows["validation"])


def test_a_problem_in_two_tables_is_an_error_that_names_both_lines(tmp_path):
    write_rows(tmp_path / "a.jsonl", numbered(50))
    write_rows(tmp_path / "c.jsonl", numbered(10, 41))
    pattern = r"a\.jsonl, line 42: this problem also stands in the heldout table .*c\.jsonl, line 1"
    with pytest.raises(ConfigError, match=pattern):
        domain_node(table(train="a.jsonl", heldout="c.jsonl"), tmp_path)


def test_identity_of_a_table_is_bytes_and_columns_and_not_place(tmp_path):
    nodes = []
    for folder, count in (("a", 100), ("b", 100), ("c", 101)):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / f"{folder}.jsonl", numbered(count))
        nodes.append(domain_node(table(train=f"{folder}.jsonl"), tmp_path / folder))
    same, moved, longer = nodes
    assert (same.config, same.data) == (moved.config, moved.data)
    assert same.data == {"train": file_digest(tmp_path / "a" / "a.jsonl")}
    assert same.data != longer.data
    assert str(tmp_path) not in json.dumps([same.config, same.data])
    other = domain_node(table(train="a.jsonl", answer="steps"), tmp_path / "a")
    assert other.config != same.config


def test_nothing_of_this_machine_is_written_into_the_artifact(tmp_path):
    write_rows(tmp_path / "all.jsonl", numbered(100))
    build(table(train="all.jsonl"), tmp_path, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path) not in file.read_text(), file.name


def test_a_file_that_changes_between_plan_and_run_is_an_error(tmp_path):
    write_rows(tmp_path / "all.jsonl", numbered(100))
    node = domain_node(table(train="all.jsonl"), tmp_path)
    write_rows(tmp_path / "all.jsonl", numbered(101))
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"all\.jsonl changed since the plan was made"):
        build_domain(node.config, node.runtime, tmp_path / "out", node.data)


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("", {}, r"t\.jsonl is empty"),
        ("\n\n", {}, r"t\.jsonl holds no row"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', {}, r"t\.jsonl, line 2: not JSON"),
        ('{"prompt": "a", "answer": "b"}\n["a"]\n', {}, r"t\.jsonl, line 2: a list"),
        (b'{"prompt": "\xff", "answer": "b"}\n', {}, r"t\.jsonl, line 1: not UTF-8"),
        (
            '{"question": "a", "answer": "b"}\n',
            {"prompt": "questions"},
            r"t\.jsonl, line 1: column 'questions' is missing; did you mean 'question'\? "
            r'columns there: answer, question; name the right one with prompt = "\.\.\."',
        ),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n',
            {},
            r"t\.jsonl, line 2: column 'answer' is missing",
        ),
        ('{"prompt": "a", "answer": "b"}\n', {"demo": "steps"}, r"demo = "),
        ('{"prompt": "a", "answer": null}\n', {}, r"line 1: column 'answer' holds no value"),
        ('{"prompt": [1], "answer": "b"}\n', {}, r"line 1: column 'prompt' .*\(list\)"),
        ('{"prompt": " ", "answer": "b"}\n', {}, r"line 1: column 'prompt' is empty"),
        (
            '{"prompt": "a", "answer": "b", "n": 1}\n{"prompt": "c", "answer": "b", "n": 1}\n',
            {"id": "n"},
            r"line 2: the id '1' already stands at .*line 1",
        ),
        ('{"prompt": "a", "answer": "b"}\n', {}, r"split got none of the 1 distinct problems"),
    ],
)
def test_bad_tables_are_refused_at_plan_time(content, fields, message, tmp_path):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.jsonl").write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        domain_node(table(train="t.jsonl", **fields), tmp_path)
    assert str(caught.value).startswith("domain mine")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("tabel.jsonl", r"tabel\.jsonl does not exist; did you mean 'table\.jsonl'"),
        ("table.xls", r"'table\.xls' is not a table that can be read; give a \.jsonl, "),
        ("folder", r"not written by datasets' save_to_disk"),
        ("hub:me/data#train", "the revision is missing.*identity has to be fixed"),
        ("hub:me/data@main#train", "revision 'main' can move.*identity has to be fixed"),
        (f"hub:me/data@{'a' * 40}", "names no split"),
        ("hub:me/data/x y", "has to be written 'hub:owner/name"),
    ],
)
def test_bad_locations_are_refused_at_plan_time(location, message, tmp_path):
    write_rows(tmp_path / "table.jsonl", numbered(100))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        domain_node(table(train=location), tmp_path)


def test_identity_of_a_hub_table_is_its_reference(tmp_path):
    reference = f"hub:me/data:small@{'a' * 40}#train"
    node = domain_node(table(train=reference), tmp_path)
    assert node.config["source"]["tables"] == {"train": reference}
    assert node.data == {}


def test_hub_table_is_read_at_its_commit(tmp_path, monkeypatch):
    asked = []

    def load_dataset(repo, config, *, revision, split):
        asked.append((repo, config, revision, split))
        if repo == "me/gone":
            raise ConnectionError("no network")
        return iter(numbered(100))

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    commit = "a" * 40
    _, rows = build(table(train=f"hub:me/data:small@{commit}#train"), tmp_path, tmp_path / "out")
    assert asked == [("me/data", "small", commit, "train")]
    assert sum(len(rows[split]) for split in SPLITS) == 100
    with pytest.raises(ConfigError, match=r"hub:me/gone@\w+#train could not be loaded.*no network"):
        build(table(train=f"hub:me/gone@{commit}#train"), tmp_path, tmp_path / "gone")


def test_a_dataset_without_reference_answers_is_refused(tmp_path):
    graph = sums(dataset="graph_color", params={})
    with pytest.raises(ConfigError, match="graph_color gives no reference answers"):
        build(graph, tmp_path, tmp_path / "out")


def test_numbers_and_a_byte_order_mark_are_read(tmp_path):
    rows = "".join(json.dumps({"prompt": f"p{n}", "answer": n}) + "\n" for n in range(100))
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    _, built = build(table(train="t.jsonl"), tmp_path, tmp_path / "out")
    assert {row["answer"] for rows in built.values() for row in rows} == set(map(str, range(100)))


def test_parquet_round_trip(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = numbered(100)
    write_rows(tmp_path / "t.jsonl", rows)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    _, from_parquet = build(table(train="t.parquet", demo="steps"), tmp_path, tmp_path / "p")
    _, from_jsonl = build(table(train="t.jsonl", demo="steps"), tmp_path, tmp_path / "j")
    assert from_parquet == from_jsonl
    with pytest.raises(ConfigError, match=r"t\.parquet: column 'promt' is missing; did you mean"):
        domain_node(table(train="t.parquet", prompt="promt"), tmp_path)
    parquet.write_table(arrow.Table.from_pylist(rows).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match=r"none\.parquet holds no row"):
        domain_node(table(train="none.parquet"), tmp_path)
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"bad\.parquet is not a Parquet file"):
        domain_node(table(train="bad.parquet"), tmp_path)


def test_save_to_disk_round_trip(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, heldout = numbered(100), numbered(10, 500)
    write_rows(tmp_path / "t.jsonl", rows)
    write_rows(tmp_path / "h.jsonl", heldout)
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_list(heldout)})
    both.save_to_disk(str(tmp_path / "both"))
    _, plain = build(table(train="t.jsonl"), tmp_path, tmp_path / "j1")
    _, folder = build(table(train="one"), tmp_path, tmp_path / "f1")
    assert folder == plain
    _, plain = build(table(train="t.jsonl", heldout="h.jsonl"), tmp_path, tmp_path / "j2")
    own = table(train="both#train", heldout="both#test")
    _, folder = build(own, tmp_path, tmp_path / "f2")
    assert folder == plain
    with pytest.raises(ConfigError, match="column 'question' is missing"):
        domain_node(table(train="one", prompt="question"), tmp_path)
    with pytest.raises(ConfigError, match=r"holds several splits.*splits: test, train"):
        domain_node(table(train="both"), tmp_path)
    with pytest.raises(
        ConfigError, match=r"has no split 'tests', as in 'both#train'; did you mean 'test'"
    ):
        domain_node(table(train="both#tests"), tmp_path)


def test_names_are_checked():
    with pytest.raises(ConfigError, match="the name 'My Domain' may only hold"):
        Domain(name="My Domain", source=sums().source, verifier=sums().verifier)
    with pytest.raises(ConfigError, match="has no domain"):
        Suite(name="empty", domains={})
    with pytest.raises(ConfigError, match="'sums' stands under the key 'adds'"):
        Suite(name="s", domains={"adds": sums()})


def test_planning_imports_nothing_heavy(tmp_path):
    write_rows(tmp_path / "t.jsonl", numbered(100))
    (tmp_path / "suite.toml").write_text(
        '[domains.a]\ntrain = "t.jsonl"\nverifier = "math"\n'
        '[domains.b]\ndataset = "chain_sum"\nparams = { max_terms = 3 }\n'
        "num_train = 10\nnum_validation = 10\nnum_heldout = 10\n"
        f'[domains.c]\ntrain = "hub:me/data@{"a" * 40}#train"\nverifier = "exact"\n'
    )
    heavy = ["torch", "transformers", "reasoning_gym", "datasets", "pyarrow", "sympy", "numpy"]
    program = (
        "import sys\n"
        "from posttrain.suites.domain import domain_node\n"
        "from posttrain.suites.load import load_suite\n"
        f"suite, base = load_suite({str(tmp_path / 'suite.toml')!r})\n"
        "for domain in suite.domains.values():\n"
        "    domain_node(domain, base)\n"
        "assert len(suite.domains) == 3\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    source = str(Path(sys.modules["posttrain"].__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": source, "PATH": ""},
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"
