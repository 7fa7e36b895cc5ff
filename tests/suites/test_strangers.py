"""Tables that a stranger wrote: values and files that are not as they claim."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.engine.errors import ConfigError
from posttrain.engine.jsonl import read_jsonl
from posttrain.suites.cells import plain_value, text_of
from posttrain.suites.data_table import TABLE, DataTable
from posttrain.suites.location import parse_location
from posttrain.suites.preferences import PREFERENCES, Preferences
from posttrain.suites.tables import Columns, read_rows

COLUMNS = Columns(named={"prompt": "prompt", "answer": "answer"}, keep_rest=True)


def rows(path: Path) -> list[object]:
    return list(read_rows(parse_location(str(path), Path(), where="d"), COLUMNS, where="d"))


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as told:
        rows(path)
    return str(told.value)


def test_numbers_beyond_floats_are_texts() -> None:
    assert text_of(10**400) == "1" + "0" * 400


def test_a_key_that_no_file_can_store_is_left_out() -> None:
    assert plain_value({"\ud800": 1, "a": {"\ud800": 2, "b": 3}}) == ({"a": {"b": 3}}, 2)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**30], type=pa.date32()),
        pa.array([1], type=pa.timestamp("s", tz="Mars/Phobos")),
        pa.array([2**62], type=pa.duration("s")),
    ],
)
def test_values_that_python_lacks_are_told_with_their_column(
    tmp_path: Path, column: pa.Array
) -> None:
    path = tmp_path / "d.parquet"
    texts = {"prompt": pa.array(["a"]), "answer": pa.array(["b"])}
    pq.write_table(pa.table(texts | {"extra": column}), path)
    assert str(path) in refused(path) and "'extra'" in refused(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    one = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([one, one, one], ["prompt", "prompt", "answer"]), path)
    assert "two columns are called 'prompt'" in refused(path)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"splits": 3, "_data_files": 3}',
        '{"splits": [{}], "_data_files": [{}]}',
        '{"splits": [3], "_data_files": [{"filename": 3}]}',
        '{"splits": ["train"], "_data_files": [{"filename": "gone.arrow"}]}',
    ],
)
def test_a_folder_that_is_not_whole_is_told(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert str(tmp_path) in refused(tmp_path)
    assert "#train" not in str(tmp_path) and str(tmp_path) in refused(Path(f"{tmp_path}#train"))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    assert "is a link to gone.jsonl" in refused(tmp_path / "a.jsonl")
    assert "does not exist" in refused(tmp_path / ("x" * 5000 + ".jsonl"))


def test_rows_around_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": 10**400, "answer": "b", "\ud800": 1}) + "\n")
    (row,) = rows(path)
    assert row.notes == Counter(left_out=1)  # type: ignore[attr-defined]


TALK = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
OTHER = TALK.replace('"b"', '"c"')


def made(tmp_path: Path, name: str, text: str, **columns: str) -> list[dict[str, object]]:
    """The rows that a table of preferences becomes."""
    path = tmp_path / name
    path.write_text(text)
    parts = PREFERENCES.node(Preferences(data=str(path), **columns), "p", tmp_path)
    PREFERENCES.build(parts.config, parts.runtime, tmp_path, parts.data)
    return list(read_jsonl(tmp_path / PREFERENCES.file))


def test_conversations_in_cells_of_csv_are_read(tmp_path: Path) -> None:
    cells = ",".join('"' + text.replace('"', '""') + '"' for text in (TALK, OTHER))
    (row,) = made(tmp_path, "p.csv", f"chosen,rejected\n{cells}\n")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("value", "said"),
    [(10**400, "has to be a number"), (None, "holds no value"), ("1e999", "has to be a number")],
)
def test_scores_that_are_no_numbers_are_told(tmp_path: Path, value: object, said: str) -> None:
    row = {"prompt": "a", "r": ["x", "y"], "s": [1, value]}
    with pytest.raises(ConfigError, match=f"line 1: column 's' .*{said}"):
        made(tmp_path, "p.jsonl", json.dumps(row), responses="r", scores="s")


def test_a_margin_beyond_floats_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "x", "rejected": "y", "c": 1e308, "r": -1e308}
    with pytest.raises(ConfigError, match=r"line 1: the scores 1e\+308 and -1e\+308 are too far"):
        made(tmp_path, "p.jsonl", json.dumps(row), chosen_score="c", rejected_score="r")


def test_a_table_of_conversations_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"talk": json.loads(TALK)}))
    with pytest.raises(ConfigError, match='write messages = "talk"'):
        TABLE.node(DataTable(data="t.jsonl"), "t", tmp_path)
