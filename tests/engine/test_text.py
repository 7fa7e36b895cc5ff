"""Text of others is written out where it steers a terminal, and stays where it does not."""

from __future__ import annotations

import pytest

from posttrain.engine.text import plain_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;OWNED\x07", r"\x1b]0;OWNED\x07"),
        ("\x1b[31mred\x9b0m", r"\x1b[31mred\x9b0m"),
        ("done\rnot", r"done\rnot"),
        ("\x00\x7f\x85", r"\x00\x7f\x85"),
        ("a\u202eb\u2066c\u200fd\u061c", r"a\u202eb\u2066c\u200fd\u061c"),
        ("stu\u200bdent\ufeff", r"stu\u200bdent\ufeff"),
        ("stu\u200ddent\u200c", r"stu\u200ddent\u200c"),
        ("soft\u00adhyphen\u2060\u3164", r"soft\xadhyphen\u2060\u3164"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("half \ud83d", r"half \ud83d"),
        ("line\u2028end", r"line\u2028end"),
    ],
)
def test_what_steers_is_written_out(text: str, shown: str) -> None:
    assert plain_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "é ß 漢字 кот ไทย",
        "👍🏽 👩\u200d🔬 ❤\ufe0f",
        "\u0645\u06cc\u200c\u062e\u0648",
        "a\tb\nc",
        r"\x1b",
    ],
)
def test_what_does_not_steer_stays(text: str) -> None:
    assert plain_text(text) == text
