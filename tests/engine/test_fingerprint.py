"""Identity: one text per value, nothing unstable accepted, differences by field."""

import dataclasses
import enum
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import (
    ABSENT,
    canonical_json,
    diff_payloads,
    digest,
    file_digest,
    files_digest,
    plain,
)


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: float


class Color(enum.Enum):
    RED = 1


def test_the_text_is_sorted_compact_and_ascii() -> None:
    value = {"b": [1, 2.5, None], "a": {"z": True, "é": "ü"}}
    assert canonical_json(value) == r'{"a":{"z":true,"\u00e9":"\u00fc"},"b":[1,2.5,null]}'
    assert digest(value) == hashlib.sha256(canonical_json(value).encode()).hexdigest()


@pytest.mark.parametrize(
    "same",
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, 2), [1, 2]),
    ],
)
def test_equal_content_has_one_digest(same: tuple[Any, Any]) -> None:
    assert digest(same[0]) == digest(same[1])


@pytest.mark.parametrize(
    "different", [(1, 1.0), (1, True), (0, None), ("1", 1), (0.3, 0.1 + 0.2), ([], {})]
)
def test_different_content_has_different_digests(different: tuple[Any, Any]) -> None:
    assert digest(different[0]) != digest(different[1])


def test_a_value_keeps_its_digest_through_json() -> None:
    value = {"rate": 1e-07, "big": 10**20, "tiny": 5e-324, "text": "\ud800\n", "whole": 2.0}
    assert digest(json.loads(json.dumps(value))) == digest(value)


def test_the_digest_does_not_depend_on_the_process() -> None:
    code = (
        "from posttrain.engine.fingerprint import digest; print(digest({'b': (1, 0.1), 'a': 'x'}))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(posttrain.__file__).parents[1])},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {digest({"a": "x", "b": [1, 0.1]})}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"reward": len}, r"config\.reward: <built-in function len> has no stable serialisation"),
        ({"a": [0, {"b": object()}]}, r"config\.a\[1\]\.b: <object object.* has no stable"),
        ({"names": {"x", "y"}}, r"config\.names: \{.*\} has no stable serialisation; use None"),
        ({"color": Color.RED}, r"config\.color: <Color\.RED: 1> has no stable"),
        ({"path": Path("x")}, r"config\.path: PosixPath\('x'\) has no stable"),
        ({"data": b"x"}, r"config\.data: b'x' has no stable"),
        ({"type": Frozen}, r"config\.type: <class .*Frozen'> has no stable"),
        ({"options": Frozen(1.0)}, r"config\.options: Frozen\(rate=1\.0\) has no stable"),
        ({"by": {1: "x"}}, r"config\.by: the key 1 is not a str; write it as '1'"),
        ({"rate": float("nan")}, r"config\.rate: nan is not a finite number"),
        ({"rate": float("-inf")}, r"config\.rate: -inf is not a finite number"),
    ],
)
def test_an_unstable_value_is_refused_with_its_path(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        canonical_json(value, at="config")


def test_plain_gives_json_data() -> None:
    assert plain({"a": ({"rate": 0.5},), "b": None}) == {"a": [{"rate": 0.5}], "b": None}


def test_files_digest_covers_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    assert files_digest(tmp_path, ["a", "b"]) == files_digest(tmp_path, ["b", "a"])
    assert files_digest(tmp_path, ["a"]) != files_digest(tmp_path, ["b"])


def test_differences_are_named_by_field() -> None:
    old = {"config": {"steps": 80, "rates": [1, 2], "gone": "x"}, "version": 1}
    new = {"config": {"steps": 120, "rates": [1, 3], "new": None}, "version": 1}
    assert diff_payloads(old, new) == [
        ("config.gone", "x", ABSENT),
        ("config.new", ABSENT, None),
        ("config.rates[1]", 2, 3),
        ("config.steps", 80, 120),
    ]


def test_a_changed_type_or_length_is_a_difference() -> None:
    assert diff_payloads({"a": 1}, {"a": 1.0}) == [("a", 1, 1.0)]
    assert diff_payloads({"a": [1]}, {"a": [1, 2]}) == [("a", [1], [1, 2])]
    assert diff_payloads({"a": {"b": 1}}, {"a": 2}) == [("a", {"b": 1}, 2)]
