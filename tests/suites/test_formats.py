"""Every format of a table says the same, and what each value may be."""

import datetime
import gzip
import json
from decimal import Decimal

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.cells import plain_value, text_of
from posttrain.suites.checked import checked_facts, tables_of
from posttrain.suites.domain import Domain, Table, VerifierSpec, domain_node
from posttrain.suites.faults import Faults
from posttrain.suites.location import parse_location
from posttrain.suites.records import read_records

ROWS = [{"prompt": f'say "{n}", please\nnow', "answer": f"{n}", "demo": f"é{n}"} for n in range(60)]


def write(path, rows):
    """The rows in the format of the file's ending."""
    import csv
    import io

    ending = path.name.partition(".")[2]
    kind = ending.removesuffix(".gz")
    if kind in ("parquet", "arrow", "feather"):
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import feather, ipc, parquet

        table = arrow.Table.from_pylist(rows)
        if kind == "parquet":
            parquet.write_table(table, path)
        elif kind == "feather":
            feather.write_feather(table, path)
        else:
            with ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
        return
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        stream = io.StringIO()
        separator = "\t" if kind == "tsv" else ","
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)


def domain(train, verifier="exact", **fields):
    fields = {"validation": 0, "heldout": 0} | fields
    spec = VerifierSpec(name=verifier)
    return Domain(name="mine", source=Table(train=train, **fields), verifier=spec)


ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "feather")


@pytest.mark.parametrize("ending", [*ENDINGS, "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    write(tmp_path / f"t.{ending}", ROWS)
    node = domain_node(domain(f"t.{ending}", demo="demo"), tmp_path)
    found = list(tables_of(node.config, node.runtime["files"]).new_rows())
    assert [{name: row.problem[name] for name in ROWS[0]} for row in found] == ROWS
    assert node.runtime["facts"]["train"] == 60


def test_lines_of_json_may_stand_in_a_json_file(tmp_path):
    (tmp_path / "t.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert domain_node(domain("t.json"), tmp_path).runtime["facts"]["rows"] == 60


def test_a_conversation_in_a_cell(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"prompt": json.dumps(talk), "answer": "x"}, {"prompt": "[{not json", "answer": "y"}]
    write(tmp_path / "t.csv", rows)
    node = domain_node(domain("t.csv"), tmp_path)
    one, other = tables_of(node.config, node.runtime["files"]).new_rows()
    assert (one.prompt, one.problem["demo"]) == ("hi", "ho")
    assert other.prompt == "[{not json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "prompt,answer\na,1\nb\n", r"line 3: 1 cells under a header of 2"),
        ("t.csv", 'prompt,answer\n"a\nb",1\nc,\n', r"line 4: column 'answer' holds no value"),
        ("t.csv", 'prompt,answer\na,"1\n', r"line 2: unexpected end of data"),
        ("t.csv", "prompt,prompt\na,1\n", r"line 1: two columns are called 'prompt'"),
        ("t.csv", b"prompt,answer\na,\xff\n", r"line 2: not UTF-8.*save the table as UTF-8"),
        ("t.tsv", "prompt,answer\na,1\n", r"line 2: column 'prompt' is missing"),
        ("t.csv", "prompt,answer\n", r"t\.csv holds no row"),
        ("t.csv.gz", "no gzip", r"t\.csv\.gz is no whole gzip file"),
        ("t.json", "[1]", r"row 1: a int, but every row has to be one JSON object"),
        ("t.json", "[{", r"t\.json: not JSON"),
        ("t.feather", "no", r"t\.feather is not an Arrow or Feather file"),
        ("t.jsonl", '{"prompt": "a", "answer": NaN}', r"line 1: column 'answer' holds NaN"),
        ("t.jsonl", '{"prompt": NaN, "answer": "a"}', r"line 1: column 'prompt' holds NaN"),
        ("t.jsonl", '{"prompt": "a", "answer": 1e400}', r"line 1: column 'answer' holds inf"),
        ("t.json", '[{"prompt": "a", "answer": -Infinity}]', r"row 1: column 'answer' holds -inf"),
        ("t.jsonl", "[" * 100_000, r"line 1: JSON of too many levels"),
        ("t.jsonl", '{"prompt": "a", "answer": 1' + "0" * 5000 + "}", r"line 1: holds a number"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, name, content, message):
    if "feather" in name:
        pytest.importorskip("pyarrow")
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        domain_node(domain(name), tmp_path)
    assert str(caught.value).startswith("domain mine: train: ")


def test_nan_in_json_is_no_missing_demonstration(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": "a", "demo": "d"} for n in range(3)]
    rows[1]["demo"] = float("nan")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2: column 'demo' holds NaN"):
        domain_node(domain("t.jsonl", demo="demo"), tmp_path)


def test_deep_values_that_nobody_asked_for_are_told_with_their_line(tmp_path):
    deep = '{"prompt": "a", "answer": "1", "x": ' + "[" * 700 + "]" * 700 + "}\n"
    (tmp_path / "t.jsonl").write_text('{"prompt": "b", "answer": "1", "x": 1}\n' + deep)
    (tmp_path / "grade.py").write_text("def score(response, problem):\n    return 1.0\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2: JSON of too many levels"):
        domain_node(domain("t.jsonl", "python:grade.py:score"), tmp_path)


def test_all_bad_rows_are_found_at_once(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": None if n % 2 else "a"} for n in range(20)]
    write(tmp_path / "t.jsonl", rows)
    with pytest.raises(ConfigError, match=r"10 rows cannot be used; the first 5:") as caught:
        domain_node(domain("t.jsonl"), tmp_path)
    told = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in told[1:]] == [
        f"line {n}" for n in (2, 4, 6, 8, 10)
    ]


def test_whole_numbers_that_became_floats_are_whole_again(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,answer,x\na,3.0,1.5\nb,-4.0,2.0\n")
    location = parse_location("t.csv", tmp_path, where="here")
    records = [record.values for record in read_records(location, Faults("here"))]
    assert records == [
        {"prompt": "a", "answer": "3", "x": "1.5"},
        {"prompt": "b", "answer": "-4", "x": "2.0"},
    ]
    assert [text_of(value) for value in (3.0, 2.5, 10**20, Decimal("7.00"))] == [
        "3", "2.5", "1" + "0" * 20, "7",
    ]  # fmt: skip


def test_a_missing_demonstration_is_none_and_is_counted(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": "a", "demo": demo} for n, demo in enumerate("ab")]
    rows += [{"prompt": f"q{n}", "answer": "a", "demo": d} for n, d in enumerate((None, "", " "))]
    write(tmp_path / "t.jsonl", rows)
    node = domain_node(domain("t.jsonl", demo="demo"), tmp_path)
    assert node.runtime["facts"]["no_demo"] == 3
    found = tables_of(node.config, node.runtime["files"]).new_rows()
    assert [row.problem["demo"] for row in found] == ["a", "b", None, None, None]


def test_columns_that_nobody_asked_for_stop_nothing(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.datetime(2026, 1, 2, 3, 4)
    extra = {"day": day, "raw": b"\x00", "nan": float("nan"), "price": Decimal("1.50")}
    rows = [{"prompt": f"p{n}", "answer": 1.0, **extra} for n in range(5)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "grade.py").write_text("def score(response, problem):\n    return 1.0\n")
    node = domain_node(domain("t.parquet", "python:grade.py:score"), tmp_path)
    first = next(iter(tables_of(node.config, node.runtime["files"]).new_rows()))
    assert first.problem["answer"] == "1"
    assert first.problem["meta"] == {
        "day": "2026-01-02T03:04:00", "raw": None, "nan": None, "price": 1.5,
    }  # fmt: skip
    assert node.runtime["facts"]["left_out"] == 10
    assert plain_value([float("inf"), {"a": datetime.date(2026, 1, 2)}]) == (
        [None, {"a": "2026-01-02"}], 1,
    )  # fmt: skip


def test_a_table_that_was_found_good_is_not_read_again(tmp_path, monkeypatch):
    write(tmp_path / "t.jsonl", ROWS)
    store = tmp_path / "store"

    def facts():
        return domain_node(domain("t.jsonl"), tmp_path, cache=store / "cache").runtime["facts"]

    first = facts()
    assert not store.exists()
    store.mkdir()
    assert facts() == first

    def unread(*args, **kwargs):
        raise AssertionError("the table is read again")

    monkeypatch.setattr("posttrain.suites.checked.read_rows", unread)
    assert facts() == first
    # Another table, other columns and a damaged memory are other things.
    with pytest.raises(AssertionError, match="read again"):
        domain_node(domain("t.jsonl", demo="demo"), tmp_path, cache=store / "cache")
    for file in (store / "cache").iterdir():
        file.write_text("[]")
    with pytest.raises(AssertionError, match="read again"):
        facts()


def test_nothing_is_told_of_a_hub_table_before_it_is_read(tmp_path):
    node = domain_node(domain(f"hub:me/data@{'a' * 40}#train"), tmp_path)
    assert node.runtime["facts"] == {}
    assert checked_facts(tables_of(node.config, node.runtime["files"]), {}) == {}


def test_another_separator_is_told(tmp_path):
    (tmp_path / "t.csv").write_text("prompt;answer\na;b\n")
    with pytest.raises(ConfigError, match=r"one cell 'prompt;answer'; cells .* commas"):
        domain_node(domain("t.csv"), tmp_path)
