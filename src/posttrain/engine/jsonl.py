"""Files with one JSON object per line: the form in which stages hand rows on."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in its order."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write one object per line; `append` keeps the lines that are there."""
    with path.open("a" if append else "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
