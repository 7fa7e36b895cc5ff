"""Conversations in a user's tables: both spellings, what is parted off, and every mistake."""

import json

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.build import build_domain
from posttrain.suites.domain import Domain, Table, VerifierSpec, domain_node
from posttrain.suites.messages import read_messages

USER = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def domain(verifier="none", **fields):
    return Domain(
        name="talk",
        source=Table(train="t.jsonl", validation=0, heldout=0, **fields),
        verifier=VerifierSpec(name=verifier),
    )


def rows_of(tmp_path, rows, declared):
    """The training rows that come of these rows of a table."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = domain_node(declared, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    build_domain(node.config, node.runtime, out, node.data)
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def test_a_single_turn_is_a_prompt_and_its_demonstration(tmp_path):
    (row,) = rows_of(tmp_path, [{"messages": [USER, REPLY]}], domain(messages="messages"))
    assert {name: row[name] for name in ("prompt", "answer", "demo")} == {
        "prompt": "2 + 2?",
        "answer": None,
        "demo": "4",
    }
    assert "messages" not in row


def test_several_turns_keep_their_messages_and_read_as_a_text(tmp_path):
    talk = [SYSTEM, USER, REPLY, {"role": "user", "content": "Sure?"}, {**REPLY, "content": "Yes"}]
    (row,) = rows_of(tmp_path, [{"messages": talk}], domain(messages="messages"))
    assert row["messages"] == talk[:-1]
    assert row["demo"] == "Yes"
    assert row["prompt"] == "user: 2 + 2?\n\nassistant: 4\n\nuser: Sure?"


def test_a_conversation_that_ends_with_the_user_has_no_demonstration(tmp_path):
    (row,) = rows_of(tmp_path, [{"messages": [USER]}], domain(messages="messages"))
    assert (row["prompt"], row["demo"]) == ("2 + 2?", None)


def test_a_last_word_that_cannot_be_learned_is_told(tmp_path):
    calls = [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    ends = [REPLY, {"role": "assistant", "content": ""}, {**REPLY, "tool_calls": calls}]
    more = {"role": "user", "content": "And 3 + 3?"}
    talks = [[USER, REPLY, more, end] for end in ends] + [[USER, REPLY, more]]
    for number, talk in enumerate(talks):
        talk[0] = {"role": "user", "content": f"question {number}"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"m": talk}) + "\n" for talk in talks))
    facts = domain_node(domain(messages="m"), tmp_path).runtime["facts"]
    # Of the one that ends with the user the first turn is learned.
    assert (facts["rows"], facts["no_demo"]) == (4, 2)


def test_sharegpt_and_tools_are_read(tmp_path):
    talk = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": "clock()"},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "It is noon."},
    ]
    (row,) = rows_of(tmp_path, [{"conversations": talk}], domain(messages="conversations"))
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool"]
    assert row["demo"] == "It is noon."


def test_other_keys_of_a_message_are_passed_through(tmp_path):
    calls = [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    talk = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "1", "name": None},
        REPLY,
    ]
    (row,) = rows_of(tmp_path, [{"messages": talk}], domain(messages="messages"))
    assert row["messages"][1] == {"role": "assistant", "content": None, "tool_calls": calls}
    # A key without a value is what Parquet gives to every message.
    assert row["messages"][2] == {"role": "tool", "content": "noon", "tool_call_id": "1"}
    assert "clock" in row["prompt"]


def test_a_prompt_of_messages_and_a_demonstration_of_one(tmp_path):
    table = [{"prompt": [SYSTEM, USER], "answer": "4", "completion": [REPLY]}]
    (row,) = rows_of(tmp_path, table, domain("exact", demo="completion"))
    assert row["messages"] == [SYSTEM, USER]
    assert (row["prompt"], row["answer"], row["demo"]) == ("2 + 2?", "4", "4")


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?", "image": None}]
    assert read_messages([{"role": "user", "content": parts}]) == [USER]


@pytest.mark.parametrize(
    ("fields", "row", "system"),
    [
        ({"system": "Be kind."}, {"messages": [USER, REPLY]}, "Be kind."),
        ({"system": "Be kind."}, {"messages": [SYSTEM, USER, REPLY]}, "Be brief."),
        ({"system_column": "s"}, {"messages": [USER, REPLY], "s": "Be odd."}, "Be odd."),
        ({"system_column": "s"}, {"messages": [SYSTEM, USER, REPLY], "s": "x"}, "Be brief."),
        ({"system_column": "s"}, {"messages": [USER, REPLY], "s": ""}, None),
        ({"system_column": "s"}, {"messages": [USER, REPLY], "s": None}, None),
    ],
)
def test_the_system_message_of_domain_column_and_row(tmp_path, fields, row, system):
    (found,) = rows_of(tmp_path, [row], domain(messages="messages", **fields))
    if system is None:
        assert "messages" not in found
    else:
        assert found["messages"] == [{"role": "system", "content": system}, USER]
    assert found["prompt"] == "2 + 2?"


def test_a_system_message_stands_before_a_prompt_that_is_a_text(tmp_path):
    (row,) = rows_of(tmp_path, [{"prompt": "2 + 2?"}], domain(system="Be brief."))
    assert row["messages"] == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], r"column 'messages' holds '\[\]' \(list\); it has to be a list of messages"),
        ("[{", r"column 'messages': not JSON"),
        (None, r"column 'messages' holds no messages"),
        (["hi"], r"column 'messages': message 1: a str; a message is an object"),
        ([USER, {"role": "asistant", "content": "4"}], r"message 2: role = 'asistant' is no role; "
         r"did you mean 'assistant'"),
        ([{"from": "humn", "value": "x"}], r"from = 'humn' is no role; did you mean 'human'"),
        ([USER, SYSTEM], r"message 2: a system message stands first or not at all"),
        ([REPLY], r"the user says nothing"),
        ([{"role": "user", "content": " "}], r"the user says nothing"),
        ([USER, {"role": "assistant", "content": None}], r"message 2: it has no content, which only"
         r" a message with tool_calls may lack"),
        ([USER, {"role": "assistant"}], r"message 2: it has no content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
         r"message 1: its content has a part of type 'image_url'; models here read text alone"),
        ([{"role": "user", "content": {"a": 1}}], r"message 1: its content holds .*\(dict\)"),
        ([{"role": "user", "content": "\ud800"}], r"message 1: its content holds half of a char"),
    ],
)  # fmt: skip
def test_a_mistake_names_line_column_and_message(tmp_path, talk, message):
    good = {"messages": [{"role": "user", "content": "fine"}, REPLY]}
    lines = [json.dumps(good), json.dumps({"messages": talk})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message) as caught:
        domain_node(domain(messages="messages"), tmp_path)
    assert "t.jsonl, line 2: column 'messages'" in str(caught.value)


def test_two_demonstrations_of_one_row_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [USER, REPLY], "demo": "5"}))
    with pytest.raises(ConfigError, match="the conversation ends with one of its own"):
        domain_node(domain(messages="messages", demo="demo"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "a", "system_column": "b"}, "system and system_column are both given"),
        ({"messages": "m", "prompt": "q"}, "prompt = 'q' is not read beside messages = 'm'"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, fields, message):
    (tmp_path / "t.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        domain_node(domain(**fields), tmp_path)


def test_a_missing_prompt_points_at_what_the_table_holds(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"talk": [USER, REPLY]}))
    with pytest.raises(ConfigError, match="'talk' holds conversations; write messages = \"talk\""):
        domain_node(domain(), tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b"}))
    with pytest.raises(ConfigError, match=r"those of preferences, .*r\.preferences"):
        domain_node(domain(), tmp_path)
