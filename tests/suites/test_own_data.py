"""Tables of a user's own that are no domain: preferences in all forms, and rows to imitate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.data_table import TABLE, DataTable
from posttrain.suites.domain import Suite
from posttrain.suites.load import load_suite
from posttrain.suites.own_data import TableKind
from posttrain.suites.preferences import PREFERENCES, Preferences
from posttrain.suites.records import Record

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def made(folder: Path, rows: Rows, **columns: str) -> tuple[Rows, Mapping[str, Any]]:
    """The rows of pairs.jsonl and what was counted; planned and built say the same."""
    return _made(folder, PREFERENCES, Preferences, rows, columns)


def tabled(folder: Path, rows: Rows, **columns: str) -> tuple[Rows, Mapping[str, Any]]:
    return _made(folder, TABLE, DataTable, rows, columns)


def _made(
    folder: Path, kind: TableKind, source: type[Any], rows: Rows, columns: Mapping[str, str]
) -> tuple[Rows, Mapping[str, Any]]:
    declared = source(data=write(folder / "rows.jsonl", rows), **columns)
    node = kind.node(declared, "mine", folder)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    facts = kind.build(node.config, node.runtime, out, node.data)
    assert facts == node.runtime["facts"]
    return [json.loads(line) for line in (out / kind.file).open()], facts


def refused(folder: Path, rows: Rows, **columns: str) -> str:
    with pytest.raises(ConfigError) as error:
        made(folder, rows, **columns)
    return str(error.value)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
PAIR = {"prompt": "Hello?", "chosen": "Hi!", "rejected": "What?"}


def test_pairs_of_texts(tmp_path: Path) -> None:
    """One exact repeat, one contradiction, two prompts. Prompt, line end and response have 10, 12,
    12, 10, 5 and 6 characters."""
    other = {"prompt": "Bye", "chosen": "x", "rejected": "yz"}
    back = PAIR | {"chosen": "What?", "rejected": "Hi!"}
    rows, facts = made(tmp_path, [PAIR | {"note": 1}, PAIR | {"note": 2}, back, other])
    assert rows[0] == {"id": rows[0]["id"], "domain": "mine", **PAIR}
    assert rows[0]["id"] == rows[1]["id"] != rows[2]["id"]
    assert rows[0]["id"].startswith("mine-")
    assert facts == {
        **{"rows": 3, "read": 4, "duplicates": 1, "prompts": 2, "contradictions": 1},
        **{"median": 10, "longest": 12},
    }


def test_columns_of_other_names_and_margins(tmp_path: Path) -> None:
    rows, _ = made(
        tmp_path,
        [{"q": "Q", "good": "a", "poor": "b", "gap": 0.5, "how": 3}],
        **{"prompt": "q", "chosen": "good", "rejected": "poor"},
        **{"margin": "gap", "strength": "how"},
    )
    assert rows[0] | {"id": ""} == {
        **{"id": "", "domain": "mine", "prompt": "Q", "chosen": "a", "rejected": "b"},
        **{"margin": 0.5, "strength": 3},
    }
    scores = {"chosen_score": "c", "rejected_score": "r"}
    rows, _ = made(tmp_path, [PAIR | {"c": 8.5, "r": 6}], **scores)
    assert rows[0]["margin"] == 2.5


def test_whole_conversations_hold_their_prompt(tmp_path: Path) -> None:
    """The common beginning is the prompt: of UltraFeedback, whose prompt column says it once more,
    with or without that column, and of a longer conversation."""
    first = {"prompt": "Hello?", "chosen": [user("Hello?"), assistant("Hi!")]}
    first |= {"rejected": [user("Hello?"), assistant("What?")]}
    before = [SYSTEM, user("One?"), assistant("1"), user("Two?")]
    longer = {"chosen": [*before, assistant("2")], "rejected": [*before, assistant("3")]}
    rows, facts = made(tmp_path, [first, longer])
    assert rows[0] == {"id": rows[0]["id"], "domain": "mine", **PAIR}
    assert rows[1]["messages"] == before
    assert rows[1]["prompt"] == "user: One?\n\nassistant: 1\n\nuser: Two?"
    assert (rows[1]["chosen"], rows[1]["rejected"]) == ("2", "3")
    assert facts["prompts"] == 2
    named, _ = made(tmp_path, [first], prompt="prompt")
    assert named == rows[:1]


def test_transcripts_hold_their_prompt(tmp_path: Path) -> None:
    """HH-RLHF's form; what looks like it within a turn, or beside a prompt column, is text."""
    before = "\n\nHuman: One?\n\nAssistant: 1\nHuman: no\n\nHuman: Two?\n\nAssistant:"
    rows, _ = made(tmp_path, [{"chosen": before + " 2", "rejected": before + " 3\n\nor 4"}])
    said = [("user", "One?"), ("assistant", "1\nHuman: no"), ("user", "Two?")]
    assert [(m["role"], m["content"]) for m in rows[0]["messages"]] == said
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("2", "3\n\nor 4")
    row = {"prompt": "Write a talk.", "chosen": before, "rejected": "no"}
    assert made(tmp_path, [row])[0][0]["chosen"] == before


def test_messages_in_a_prompt_column_and_responses_as_messages(tmp_path: Path) -> None:
    prompt = [user("One?"), assistant("1"), user("Two?")]
    row = {"prompt": prompt, "chosen": [assistant("2")], "rejected": [assistant("3")]}
    rows, _ = made(tmp_path, [row, PAIR], system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert [one["messages"] for one in rows] == [[system, *prompt], [system, user("Hello?")]]
    assert rows[1]["prompt"] == "Hello?"
    assert rows[0]["chosen"] == "2"
    rows, _ = made(tmp_path, [PAIR | {"s": None}, PAIR | {"s": "Sing."}], system_column="s")
    assert "messages" not in rows[0]
    assert rows[1]["messages"][0] == {"role": "system", "content": "Sing."}
    assert rows[0]["id"] != rows[1]["id"], "another prompt"


def test_rankings_become_all_pairs_with_a_strict_preference(tmp_path: Path) -> None:
    """a 3, b 1, c 3: a and c are equal, so two pairs; best first, three pairs."""
    row = {"prompt": "p", "all": ["a", "b", "c"], "points": [3, 1, 3.5]}
    rows, facts = made(tmp_path, [row], responses="all", scores="points")
    found = [(one["chosen"], one["rejected"], one["margin"]) for one in rows]
    assert found == [("a", "b", 2), ("c", "a", 0.5), ("c", "b", 2.5)]
    assert facts["prompts"] == 1 and len({one["id"] for one in rows}) == 1
    tied = row | {"points": [3, 1, 3]}
    rows, _ = made(tmp_path, [tied], responses="all", scores="points")
    assert [(one["chosen"], one["rejected"]) for one in rows] == [("a", "b"), ("c", "b")]
    equal = row | {"points": [1, 1, 1]}
    rows, facts = made(tmp_path, [tied, equal], responses="all", scores="points")
    assert (len(rows), facts["read"], facts["tied"]) == (2, 2, 1)
    rows, facts = made(tmp_path, [row], responses="all")
    assert [(one["chosen"], one["rejected"]) for one in rows] == [
        *(("a", "b"), ("a", "c"), ("b", "c"))
    ]
    assert (facts["read"], facts["rows"]) == (1, 3) and "margin" not in rows[0]


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1", "👍", "up"])
def test_single_rows(tmp_path: Path, label: Any) -> None:
    good = {"prompt": "p", "completion": "yes", "label": label}
    bad = {"prompt": "q", "completion": [assistant("no")], "label": False}
    again = {"prompt": "p", "completion": "yes", "label": "👎"}
    rows, facts = made(tmp_path, [good, bad, again], response="completion")
    assert [(one["prompt"], one["response"], one["desirable"]) for one in rows] == [
        *(("p", "yes", True), ("q", "no", False), ("p", "yes", False)),
    ]
    assert (facts["desirable"], facts["contradictions"], facts["prompts"]) == (1, 1, 2)


MARGIN, SCORES = {"margin": "m"}, {"chosen_score": "c", "rejected_score": "r"}
RANKING, SINGLE = {"responses": "all", "scores": "points"}, {"label": "label"}
THREE = {"prompt": "p", "all": ["a", "b", "c"], "points": [1, 2, 3]}
TALK = [user("Hello?"), assistant("Hi!")]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (PAIR | {"rejected": "Hi!"}, {}, "are the same text"),
        (PAIR | {"chosen": " "}, {}, "column 'chosen' is empty"),
        (PAIR | {"prompt": "\n"}, {}, "column 'prompt' is empty"),
        (PAIR | {"rejected": None}, {}, "column 'rejected' holds no value"),
        (PAIR | {"rejected": float("nan")}, {}, "column 'rejected' holds no value"),
        (PAIR | {"rejected": {"a": 1}}, {}, "column 'rejected' holds .*has to be a text"),
        ({"prompt": "p", "chosne": "a"}, {}, "'chosen' is missing; columns there: prompt, chosne"),
        ({"prompt": "p"}, {"chosen": "good"}, "'good' is missing; .*the right one with chosen"),
        ({"chosen": "a", "rejected": "b"}, {}, "column 'prompt' is missing.*prompt = "),
        (PAIR | {"m": -1}, MARGIN, "'m' is -1; a margin says how much better"),
        (PAIR | {"m": "wide"}, MARGIN, "'m' holds 'wide' .str.; it has to be a number"),
        (PAIR | {"m": True}, MARGIN, "'m' holds 'True' .bool.; it has to be a number"),
        (PAIR | {"c": 1, "r": 2}, SCORES, "has the lower score, 1 against 2; swap"),
        (PAIR | {"s": 5}, {"strength": "s"}, "'s' is 5; a strength is 1, 2, 3 or 4"),
        (PAIR | {"chosen": TALK}, {}, "whole conversation and the other only a response"),
        (
            {"chosen": TALK, "rejected": [user("Hello"), assistant("Hi")]},
            {},
            "the conversations part at message 1 already",
        ),
        (PAIR | {"chosen": TALK[:1]}, {}, "last message is one of the role 'user'"),
        (
            {"prompt": "Bye", "chosen": TALK, "rejected": [TALK[0], assistant("a")]},
            {"prompt": "prompt"},
            "'prompt' is not what the conversation begins with; leave prompt out",
        ),
        (PAIR | {"prompt": TALK}, {}, "'prompt' ends with a message of the role 'assistant'"),
        (PAIR | {"prompt": [{"role": "bot", "content": "x"}]}, {}, "role = 'bot' is no role"),
        (THREE | {"points": [1, 2]}, RANKING, "3 responses and 2 scores"),
        (THREE | {"all": ["a"]}, RANKING, "holds 1 response; a ranking has two or more"),
        (THREE | {"all": ["a", "b", "a"]}, RANKING, "responses 1 and 3 are the same text"),
        (THREE | {"all": {"a": 1}}, RANKING, "the responses of a ranking are a list"),
        (
            {"prompt": "p", "response": "r", "label": "maybe"},
            SINGLE,
            "'label' holds 'maybe' .str.; a",
        ),
        (
            {"prompt": "p", "response": "r", "label": 2},
            SINGLE,
            "'label' holds '2' .int.; a label is",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_line(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        made(tmp_path, [row], **columns)
    assert f"preferences mine: {tmp_path / 'rows.jsonl'}, line 1: " in str(error.value)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    same = PAIR | {"chosen": "a", "rejected": "a"}
    text = refused(tmp_path, [PAIR, same, PAIR | {"prompt": ""}, same])
    assert "3 rows cannot be used" in text
    assert [f"line {n}: " in text for n in (1, 2, 3, 4)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"chosen": "a", "responses": "b"},
            "chosen is a column of pairs and responses one of ra",
        ),
        ({"label": "a", "scores": "b"}, "a table has one form"),
        ({"scores": "b"}, "scores = 'b' are those of a list of responses"),
        ({"chosen_score": "a"}, "name both columns"),
        ({"margin": "m", "chosen_score": "a", "rejected_score": "b"}, "name one of them"),
    ],
)
def test_columns_of_two_forms_are_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preferences(data="x.jsonl", **columns)


def test_a_declaration_in_python_is_checked() -> None:
    with pytest.raises(ConfigError, match="preferences of x: margin = 3; it has to be a text"):
        Preferences(data="x", margin=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"preferences\['x'\] is 'pairs.jsonl', no Preferences"):
        Suite(name="mine", preferences={"x": "pairs.jsonl"})  # type: ignore[dict-item]


def test_a_table_of_prompts_and_demonstrations(tmp_path: Path) -> None:
    """Two answers to one prompt are two rows; white space is text like any other here."""
    rows = [{"prompt": "p", "demo": "a"}, {"prompt": "p", "demo": "bcd"}]
    found, facts = tabled(tmp_path, [*rows, rows[0]])
    assert [one["demo"] for one in found] == ["a", "bcd"]
    assert found[0] == {"id": found[0]["id"], "domain": "mine", "prompt": "p", "demo": "a"}
    assert found[0]["id"] == found[1]["id"]
    assert facts == {
        **{"rows": 2, "read": 3, "duplicates": 1, "prompts": 1},
        **{"median": 3, "longest": 5},
    }


def test_a_table_of_conversations(tmp_path: Path) -> None:
    """Also ShareGPT's; the last message is what is learned, the others what comes before."""
    sharegpt = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]
    sharegpt += [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
    found, _ = tabled(
        tmp_path, [{"talk": TALK}, {"talk": sharegpt}, {"talk": [SYSTEM, *TALK]}], messages="talk"
    )
    assert [one["demo"] for one in found] == ["Hi!", "2", "Hi!"]
    assert "messages" not in found[0] and found[0]["prompt"] == "Hello?"
    assert found[1]["messages"] == [user("One?"), assistant("1"), user("Two?")]
    assert found[2]["messages"] == [SYSTEM, user("Hello?")]
    assert found[2]["prompt"] == "Hello?"


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "p", "demo": ""}, {}, "line 1: column 'demo' is empty"),
        ({"prompt": "p", "demo": None}, {}, "line 1: column 'demo' holds no value"),
        ({"prompt": "p", "answer": "a"}, {}, "column 'demo' is missing.*demo = "),
        ({"prompt": "p", "demo": TALK}, {}, "name it with messages = 'demo'"),
        ({"talk": TALK[:1]}, {"messages": "talk"}, "its last message is one of the role 'user'"),
        ({"talk": TALK[1:]}, {"messages": "talk"}, "has no message before the response"),
        ({"talk": "Hello?"}, {"messages": "talk"}, "not JSON"),
    ],
)
def test_a_row_without_a_demonstration_is_refused(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tabled(tmp_path, [row], **columns)


def test_identity_is_bytes_and_columns(tmp_path: Path) -> None:
    source = Preferences(data=write(tmp_path / "a.jsonl", [PAIR]))
    node = PREFERENCES.node(source, "mine", tmp_path)
    moved = Preferences(data=write(tmp_path / "b.jsonl", [PAIR]))
    again = PREFERENCES.node(moved, "mine", tmp_path)
    assert (node.config, node.data) == (again.config, again.data)
    assert node.config == {"name": "mine", "table": "jsonl"}
    other = PREFERENCES.node(Preferences(data="a.jsonl", system="Be kind."), "mine", tmp_path)
    assert other.config != node.config and other.data == node.data
    write(tmp_path / "a.jsonl", [PAIR | {"chosen": "Hello!"}])
    assert PREFERENCES.node(source, "mine", tmp_path).data != node.data
    with pytest.raises(ConfigError, match="changed since the plan was made"):
        PREFERENCES.build(node.config, node.runtime, tmp_path, node.data)


def test_other_formats(tmp_path: Path) -> None:
    """CSV, whose cells are texts, and Parquet, whose messages all have the keys that one has."""
    (tmp_path / "a.csv").write_text("prompt,response,label\np,yes,1\nq,no,0\n")
    node = PREFERENCES.node(Preferences(data="a.csv", label="label"), "mine", tmp_path)
    assert node.runtime["facts"]["desirable"] == 1
    arrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
    talks = [TALK, [user("Hello?"), assistant("What?") | {"name": "bot"}]]
    columns = {"chosen": [talks[0]], "rejected": [talks[1]], "prompt": ["Hello?"]}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    source = Preferences(data="a.parquet", prompt="prompt")
    node = PREFERENCES.node(source, "mine", tmp_path)
    PREFERENCES.build(node.config, node.runtime, tmp_path, node.data)
    (row,) = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert row == {"id": row["id"], "domain": "mine", **PAIR}


def test_a_table_of_the_hub_is_read_when_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"hub:owner/name@{'0' * 40}#train"
    node = PREFERENCES.node(Preferences(data=place), "mine", tmp_path)
    assert node.config["table"] == place and node.data == {} and "facts" not in node.runtime
    records = [Record(place="row 1", values=PAIR)]
    monkeypatch.setattr("posttrain.suites.own_data.read_records", lambda *_: iter(records))
    facts = PREFERENCES.build(node.config, node.runtime, tmp_path, node.data)
    assert facts["rows"] == 1
    with pytest.raises(ConfigError, match="the revision is missing"):
        PREFERENCES.node(Preferences(data="hub:owner/name#train"), "mine", tmp_path)


def test_a_checked_table_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Preferences(data=write(tmp_path / "a.jsonl", [PAIR]))
    cache = tmp_path / "store" / "cache"
    cache.parent.mkdir()
    first = PREFERENCES.node(source, "mine", tmp_path, cache=cache)
    monkeypatch.setattr("posttrain.suites.own_data.read_records", None)
    assert PREFERENCES.node(source, "mine", tmp_path, cache=cache) == first
    with pytest.raises(TypeError):
        PREFERENCES.node(source, "other", tmp_path, cache=cache)


def test_a_built_table_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Preferences(data=write(tmp_path / "a.jsonl", [PAIR]))
    cache = tmp_path / "store" / "cache"
    first = PREFERENCES.node(source, "mine", tmp_path, cache=cache)
    cache.parent.mkdir()
    PREFERENCES.build(first.config, first.runtime, tmp_path, first.data, cache)
    monkeypatch.setattr("posttrain.suites.own_data.read_records", None)
    assert PREFERENCES.node(source, "mine", tmp_path, cache=cache) == first


SUITE = """
name = "mine"
[preferences.helpful]
data = "pairs.jsonl"
margin = "gap"
[tables.chat]
data = "chat.jsonl"
messages = "messages"
"""


def test_a_suite_has_preferences_and_tables(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SUITE)
    suite, _ = load_suite(str(tmp_path / "mine.toml"))
    assert suite.preferences == {"helpful": Preferences(data="pairs.jsonl", margin="gap")}
    assert suite.tables == {"chat": DataTable(data="chat.jsonl", messages="messages")}
    assert suite.domains == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("margin", "margins"),
            "preferences.helpful: unknown key 'margins'; did you mean",
        ),
        (('data = "pairs', 'dta = "pairs'), "preferences.helpful: unknown key 'dta'; did you mean"),
        (('data = "pairs.jsonl"\n', ""), "preferences.helpful: data is missing; write data ="),
        (('"gap"', "3"), "preferences.helpful.margin is 3; it has to be a text"),
        (
            ('margin = "gap"', 'label = "a"\nscores = "b"'),
            "helpful: preferences of pairs",
        ),
        (("[tables.", "[table."), "unknown key 'table'; did you mean 'tables'"),
        (("tables.chat", "tables.helpful"), "'helpful' is a name in preferences and in tables"),
        (("helpful", "Helpful"), "may only hold the characters a-z, 0-9 and _"),
    ],
)
def test_mistakes_in_a_suite_are_named(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    (tmp_path / "mine.toml").write_text(SUITE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_suite(str(tmp_path / "mine.toml"))
