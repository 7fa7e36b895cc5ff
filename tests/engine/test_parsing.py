"""Whatever is wrong with a text of others is one error in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.engine.parsing import (
    LEVELS,
    Unreadable,
    parse_json,
    parse_json_file,
    parse_toml,
    read_json,
)

DEEP = 100_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON .*line 1 column 1"),
        (b'{"a": 1,\n "b": }', "not JSON .*line 2 column 7"),
        (b"{} {}", "not JSON .*Extra data"),
        (b'{"a": "\xe9"}', "not UTF-8 .*position 7"),
        (b"[" * DEEP + b"]" * DEEP, "JSON of too many levels"),
        (b'{"a":' * DEEP, "JSON of too many levels"),
        (b"[" * (LEVELS + 2) + b"]" * (LEVELS + 2), "JSON of too many levels"),
        (b"9" * 5000, "number that cannot be read"),
        (b"\0", "not JSON"),
    ],
)
def test_what_is_no_json(content: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        parse_json(content)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400"])
def test_what_is_no_number_is_refused_where_it_has_to_be_one(text: str) -> None:
    parse_json(f'{{"a": {text}}}')
    with pytest.raises(Unreadable, match=text):
        parse_json(f'{{"a": {text}}}', finite=True)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}\r\n', {"a": 1}),
        (b"[" * LEVELS + b"]" * LEVELS, None),
        ('"漢"', "漢"),
        (b"[[1, 2]]" + b" " * 10, [[1, 2]]),
        (b'{"a": [' + b"[1]," * 500 + b"[1]]}", {"a": [[1]] * 501}),
    ],
)
def test_what_is_json(content: bytes | str, value: object) -> None:
    found = parse_json(content)
    assert value is None or found == value


def test_an_object_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1]")
    with pytest.raises(Unreadable, match="holds a list where an object is needed"):
        parse_json_file(path)
    path.write_bytes(b'{"a": 1}')
    assert parse_json_file(path) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = ", "Invalid value"),
        (b"a = 1\nb = x", "line 2"),
        (b'a = "\xe9"', "not UTF-8 .*position 5"),
        (b"a = " + b"[" * DEEP + b"]" * DEEP, "TOML of too many levels"),
        (b"a = " + b"[" * 150 + b"]" * 150, "TOML of too many levels"),
        (b"a = " + b"9" * 5000, "number that cannot be read"),
        (b"a = 1\0", "line 1"),
    ],
)
def test_what_is_no_toml(content: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        parse_toml(content)


def test_what_is_toml() -> None:
    assert parse_toml(b'\xef\xbb\xbf[a]\r\nb = "x"\r\n') == {"a": {"b": "x"}}


def test_a_key_that_an_object_has_twice_is_refused_where_it_has_to_be_one(tmp_path: Path) -> None:
    text = '{"a": [{"b": 1, "b": 2}]}'
    assert parse_json(text) == {"a": [{"b": 2}]}
    with pytest.raises(Unreadable, match="the key 'b' twice"):
        parse_json(text, unique=True)
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(Unreadable, match="the key 'b' twice"):
        read_json(tmp_path / "record.json", 100)
