"""Tables whose reader is not installed: the message has the command that installs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.location import Location
from posttrain.suites.tables import Columns, read_rows


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        ("parquet", "pyarrow.parquet", "reading parquet needs pyarrow: pip install pyarrow$"),
        ("folder", "pyarrow.ipc", "reading folder needs pyarrow: pip install pyarrow$"),
        ("hub", "datasets", "reading the Hub needs datasets: pip install pyarrow datasets$"),
    ],
)
def test_a_missing_reader_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    columns = Columns(named={"prompt": "prompt", "answer": "answer"}, keep_rest=False)
    location = Location(text="mine", kind=kind, path=None if kind == "hub" else tmp_path)
    with pytest.raises(ConfigError, match=f"here: mine: {message}"):
        list(read_rows(location, columns, where="here"))
