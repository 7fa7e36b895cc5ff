"""What is done with artifacts once they are there: look, compare, verify, move, remove."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.conftest import weights_file

from posttrain.backends.outside.headers import num_parameters, read_headers
from posttrain.commands.io import age
from posttrain.engine import transfer
from posttrain.engine.store import Store

MINI = ("mini.py", "--suite", "pairs.toml")


@pytest.fixture
def store(done: Path) -> Store:
    return Store(done / "posttrain-store")


def test_ls(store: Store, cli: Callable[..., Any]) -> None:
    found = cli("ls", "--json").json
    assert found["store"] == str(store.root)
    names = [artifact["name"] for artifact in found["artifacts"]]
    assert names == [artifact.name for artifact in store.list()][::-1]
    assert names[0] == "evaluation"
    keys = ["name", "kind", "fingerprint", "path", "bytes", "created", "metrics"]
    assert all(list(artifact) == keys for artifact in found["artifacts"])
    text = cli("ls").out
    assert all(artifact.fingerprint[:12] in text for artifact in store.list())
    assert "reward" in text and "KL" in text


def test_an_empty_store(cli: Callable[..., Any], place: Path) -> None:
    assert cli("ls", "--json").json["artifacts"] == []
    assert "no artifacts" in cli("ls").out
    assert cli("verify", "--json").json == {
        "ok": True,
        "problems": [],
        "artifacts": 0,
        "files": 0,
        "records": 0,
    }
    result = cli("show", "student")
    assert (result.code, result.out) == (2, "")
    assert "no artifact 'student'" in result.err
    assert not (place / "posttrain-store").exists()


def test_the_store_may_be_named_by_the_environment(
    store: Store, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = store.root.rename(store.root.with_name("elsewhere"))
    assert cli("ls", "--json").json["artifacts"] == []
    monkeypatch.setenv("POSTTRAIN_STORE", str(moved))
    assert len(cli("ls", "--json").json["artifacts"]) == 8


def test_show(store: Store, cli: Callable[..., Any]) -> None:
    student = store.resolve("student")
    for name in ("student", student.label, student.fingerprint[:8], str(student.path)):
        assert cli("show", name, "--json").json == {
            "path": str(student.path),
            "names": ["student"],
            **student.record,
        }
    text = cli("show", "student").out
    words = ("inputs", "settings", "metrics", "files", "provenance", "model.safetensors", "torch")
    assert all(word in text for word in words)
    assert "Accuracy on held-out problems" in cli("show", "evaluation").out
    unknown = cli("show", "studnt")
    assert unknown.code == 2
    assert "did you mean 'student'?" in unknown.err


def test_lineage(store: Store, cli: Callable[..., Any]) -> None:
    found = cli("lineage", "sums_teacher", "--json").json
    labels = {name: store.resolve(name).label for name in ("sums", "copies", "base", "sft")}
    target = store.resolve("sums_teacher").label
    assert found["target"] == target
    assert {node["label"] for node in found["nodes"]} == {*labels.values(), target}
    assert {"from": labels["sft"], "to": target, "edge": "start"} in found["edges"]
    assert {"from": labels["base"], "to": labels["sft"], "edge": "start"} in found["edges"]
    assert all(node["in_store"] and not node["missing"] for node in found["nodes"])
    text = cli("lineage", "student").out
    # The SFT checkpoint is the start of three stages; its own ancestors are drawn once.
    assert text.count(" sft  ") == 3
    assert text.count("start: base") == 1
    assert "(above)" in text


def test_diff(store: Store, cli: Callable[..., Any], done: Path) -> None:
    same = cli("diff", "student", "student", "--json").json
    assert same["differences"] == []
    assert "the same settings" in cli("diff", "student", "student").out
    teachers = cli("diff", "sums_teacher", "copies_teacher", "--json").json
    (difference,) = teachers["differences"]
    assert difference["path"] == ""
    assert {field["field"] for field in difference["fields"]} == {
        "inputs.domains.copies",
        "inputs.domains.sums",
    }
    assert set(teachers["metrics"]) == {"reward", "tokens"}
    assert cli("run", *MINI, "--set", "base.lr=0.5", "--no-report").code == 0
    students = [a for a in Store(store.root).list() if a.name == "student"]
    old, new = (artifact.label for artifact in students)
    found = cli("diff", old, new, "--json").json
    assert [d["path"] for d in found["differences"]] == ["start / start"]
    (field,) = found["differences"][0]["fields"]
    assert (field["field"], field["b"]) == ("config.lr", 0.5)
    shown = cli("diff", old, new).out
    assert "start / start" in shown
    # Fingerprints by their start.
    assert not re.search("[0-9a-f]{40}", cli("diff", "sums_teacher", "copies_teacher").out)
    ambiguous = cli("show", "student")
    assert ambiguous.code == 2
    assert old in ambiguous.err and new in ambiguous.err


def test_verify(store: Store, cli: Callable[..., Any]) -> None:
    whole = cli("verify", "--json").json
    files = sum(len(artifact.files) for artifact in store.list())
    expected = {"ok": True, "problems": [], "artifacts": 8, "files": files, "records": 8}
    assert whole == expected == cli("verify", "--all", "--json").json
    assert cli("verify", "sft", "--json").json["artifacts"] == 4
    assert f"ok: {files} files and 8 records" in cli("verify").out


def test_verify_finds_changed_weights_from_every_descendant(
    store: Store, cli: Callable[..., Any]
) -> None:
    path = store.resolve("base").path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for names in ((), ("student",), ("base",)):
        result = cli("verify", *names, "--json")
        found = json.loads(result.out)
        assert result.code == 1
        assert not found["ok"]
        (problem,) = found["problems"]
        assert "base-" in problem and "model.safetensors was changed" in problem
    assert cli("verify", "sums").code == 0
    text = cli("verify")
    assert text.code == 1
    assert "1 problem" in text.out


def test_verify_finds_a_damaged_record(store: Store, cli: Callable[..., Any]) -> None:
    (store.resolve("sft").path / "record.json").write_text("{")
    for names in ((), ("student",)):
        result = cli("verify", *names, "--json")
        assert result.code == 1
        assert any("record.json" in problem for problem in json.loads(result.out)["problems"])


def test_an_export_stands_alone(store: Store, cli: Callable[..., Any], done: Path) -> None:
    found = cli("export", "student", "out", "--json").json
    shutil.rmtree(store.root)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = done / "out"
    assert found["path"] == str(folder)
    assert {"README.md", "history.json", "model.safetensors"} <= set(found["files"])
    assert not any(path.is_symlink() for path in folder.iterdir())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("1+2=", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[-1] == len(tokenizer)
    assert num_parameters(read_headers(folder)) == sum(p.numel() for p in model.parameters())
    (evaluation,) = found["evaluations"]
    card = (folder / "README.md").read_text()
    assert "## Scores" in card and evaluation in card
    text = cli("chat", folder, "--prompt", "1+2=", "--temperature", "0", "--max-new-tokens", "3")
    assert text.code == 0
    assert len(text.out.strip()) <= 3


def test_an_export_says_what_it_carries(store: Store, cli: Callable[..., Any], done: Path) -> None:
    said = cli("export", "student", "out").out
    for name in (path.name for path in (done / "out").iterdir()):
        assert name in said
    count = len(json.loads((done / "out" / "history.json").read_text())["records"])
    assert f"history.json: records of {count} artifacts" in said
    assert "mini.py" in said and platform.node() in said
    diff = (done / "out" / "code.diff").exists()
    assert ("code.diff: the changes" in said) is diff
    shutil.rmtree(done / "out")
    records = cli("export", "student", "out", "--json").json["records"]
    assert len(records) == count and records[-1].startswith("student-")


def test_an_export_adopted_elsewhere_keeps_its_history(
    store: Store, cli: Callable[..., Any], done: Path
) -> None:
    assert cli("export", "sft", "out").code == 0
    found = cli("adopt", "out", "--name", "mine", "--store", "second", "--json").json
    assert sorted(found["history"]) == ["base", "copies", "sft", "sums"]
    assert not found["was_present"]
    assert cli("verify", "--store", "second", "--json").json["records"] == 5
    nodes = cli("lineage", "mine", "--store", "second", "--json").json["nodes"]
    assert {node["name"]: node["in_store"] for node in nodes} == {
        "sums": False,
        "copies": False,
        "base": False,
        "sft": False,
        "mine": True,
    }
    assert "record only" in cli("lineage", "mine", "--store", "second").out
    weights = Path(found["path"]) / "model.safetensors"
    assert weights.is_symlink()
    with safe_open(weights, "pt") as tensors:
        assert tensors.keys()

    base = ("--set", "base=mine", "--store", "second")
    stages = cli("plan", *MINI, *base, "--json").json["stages"]
    actions = {stage["name"]: stage["action"] for stage in stages}
    assert actions.pop("base") == "cached"
    assert set(actions.values()) == {"run"}
    assert cli("run", *MINI, *base, "--no-report", "--set", "sft.steps=1").code == 0
    assert cli("verify", "--store", "second", "--json").json["ok"]


def test_adopt_copies_and_refuses(store: Store, cli: Callable[..., Any], done: Path) -> None:
    cli("export", "sft", "one")
    cli("export", "base", "two")
    copied = cli("adopt", "one", "--name", "mine", "--copy", "--store", "second", "--json").json
    assert not (Path(copied["path"]) / "model.safetensors").is_symlink()
    again = cli("adopt", "one", "--name", "other", "--store", "second")
    assert "already, under the name 'mine'" in again.out
    taken = cli("adopt", "two", "--name", "mine", "--store", "second")
    assert taken.code == 2
    assert "another model of that name" in taken.err
    missing = cli("adopt", "three", "--name", "x", "--store", "second")
    assert missing.code == 2
    assert "no such directory" in missing.err
    (done / "two" / "model.safetensors").write_bytes(b"not weights")
    broken = cli("adopt", "two", "--name", "broken", "--store", "third")
    assert broken.code == 2
    assert "not a safetensors file" in broken.err
    assert not (done / "third").exists()


def test_a_linked_file_that_changed_is_another_model_in_the_plan(
    store: Store, cli: Callable[..., Any], done: Path
) -> None:
    cli("export", "base", "out")
    adopted = cli("adopt", "out", "--name", "mine", "--store", "second", "--json").json

    def planned() -> dict[str, Any]:
        found = cli("plan", *MINI, "--set", "base=mine", "--store", "second", "--json").json
        return next(stage for stage in found["stages"] if stage["kind"] == "model")

    before = planned()
    assert (before["action"], before["fingerprint"]) == ("cached", adopted["fingerprint"])
    config = done / "out" / "config.json"
    config.write_text(config.read_text() + " ")
    after = planned()
    assert after["action"] == "run"
    assert after["fingerprint"] != before["fingerprint"]


def test_adopt_copies_what_lies_in_the_store(
    store: Store, cli: Callable[..., Any], done: Path
) -> None:
    linked = done / "linked"
    linked.mkdir()
    for path in store.resolve("base").path.iterdir():
        (linked / path.name).symlink_to(path)
    for source, name in ((store.resolve("sft").path, "one"), (linked, "two")):
        found = cli("adopt", source, "--name", name, "--json").json
        files = list(Path(found["path"]).iterdir())
        assert any(path.name == "model.safetensors" for path in files)
        assert not any(path.is_symlink() for path in files)
    assert cli("gc", "--only", "--keep", "one", "--keep", "two", "--yes").code == 0
    assert cli("verify", "--json").json["artifacts"] == 2


def test_export_refuses_a_directory_in_use(store: Store, cli: Callable[..., Any]) -> None:
    result = cli("export", "student", ".")
    assert result.code == 2
    assert "not an empty directory" in result.err


def test_an_export_may_be_rounded(store: Store, cli: Callable[..., Any], done: Path) -> None:
    """Its history would vouch for other bytes; without a change of type nothing changes."""
    whole, half = done / "whole", done / "half"
    assert cli("export", "student", whole, "--dtype", "float32", "--json").json["rounded"] is False
    assert (whole / "history.json").exists()
    found = cli("export", "student", half, "--dtype", "bfloat16", "--json").json
    assert found["rounded"] is True and "history.json" not in found["files"]
    ours, theirs = (read_headers(path) for path in (half, whole))
    assert {tensor.dtype for tensor in ours.values()} == {"BF16"}
    assert ours.keys() == theirs.keys()
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert "rounded to bfloat16" in (half / "README.md").read_text()
    said = cli("export", "sft", done / "third", "--dtype", "float16").out
    assert "rounded to float16" in said and "history.json" not in said
    result = cli("export", "student", done / "fourth", "--dtype", "int8")
    assert (result.code, (done / "fourth").exists()) == (2, False)
    assert "--dtype int8" in result.err and "bfloat16, float16, float32" in result.err
    result = cli("export", "sums", done / "fourth", "--dtype", "bfloat16")
    assert (result.code, (done / "fourth").exists()) == (2, False)
    assert "is no model" in result.err


def test_a_hostile_checkpoint_is_not_adopted(cli: Callable[..., Any], place: Path) -> None:
    """What a link points at would be exported with the model."""
    folder = place / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    tensors = {"model.norm.weight": ("F32", (2,))}
    (folder / "model.safetensors").write_bytes(weights_file(tensors))
    (folder / "vocab.json").symlink_to("/etc/passwd")
    result = cli("adopt", folder, "--name", "mine")
    assert result.code == 2
    assert "hostile/vocab.json: a link to /etc/passwd" in result.err and "cp -L" in result.err
    assert cli("ls", "--json").json["artifacts"] == []


def labels(found: Any) -> set[str]:
    return {item["label"].rpartition("-")[0] for item in found["removed"]}


def test_gc_keeps_what_the_usual_roots_need(store: Store, cli: Callable[..., Any]) -> None:
    assert cli("gc", "--dry-run", "--json").json == {"dry_run": True, "removed": [], "bytes": 0}
    assert "nothing to remove" in cli("gc", "--yes").out


def test_gc_by_name(store: Store, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (store.root / "work" / "0123456789ab").mkdir(parents=True)
    only = ("gc", "--only", "--keep", "sums_teacher")
    found = cli(*only, "--dry-run", "--json").json
    assert labels(found) == {"copies_teacher", "student", "evaluation"}
    assert found["bytes"] == sum(item["bytes"] for item in found["removed"]) > 0
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert cli(*only).code == 0
    assert len(store.list()) == 8
    monkeypatch.setattr("typer.confirm", lambda question: True)
    assert "3 not needed" in cli(*only).out
    assert {artifact.name for artifact in store.list()} == {
        "sums",
        "copies",
        "base",
        "sft",
        "sums_teacher",
    }
    assert (store.root / "work" / "0123456789ab").is_dir()
    assert cli("verify").code == 0
    removed = cli("gc", "--unfinished", "--yes", "--json").json["removed"]
    assert [item["label"] for item in removed] == ["work/0123456789ab"]


def test_gc_leaves_what_was_made_while_it_asked(
    store: Store, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, done: Path
) -> None:
    """A run that ends between the list and the answer."""
    only = ("gc", "--only", "--keep", "sums_teacher")
    listed = labels(cli(*only, "--dry-run", "--json").json)
    shutil.copytree(store.resolve("base").path, done / "mine")
    made: list[str] = []

    def answer(question: str) -> bool:
        # In a process of its own it would be a run; the lock is free while gc asks.
        place = Store(store.root)
        adopted = transfer.adopt(
            place, done / "mine", name="mine", kind="model", files=["config.json"], link=False,
            metrics={}, provenance={},
        )  # fmt: skip
        made.append(adopted.label)
        return True

    monkeypatch.setattr("typer.confirm", answer)
    out = cli(*only).out
    assert "removed 3" in out
    assert made[0] not in out
    left = {artifact.name for artifact in store.list()}
    assert "mine" in left
    assert not listed & left


def test_ls_and_gc_name_what_is_damaged_and_go_on(store: Store, cli: Callable[..., Any]) -> None:
    (store.root / "artifacts" / ".DS_Store").write_text("x")
    (store.root / "artifacts" / "stray").write_text("x")
    path = store.resolve("evaluation").path / "record.json"
    path.write_text('{"format": 1}')
    listed = cli("ls", "--json").json
    assert len(listed["artifacts"]) == 7
    stray, damaged = listed["damaged"]
    assert stray == f"{store.root}/artifacts/stray is no artifact; move it out of the store"
    assert damaged.startswith(f"{path} is not as posttrain writes it (name)")
    for command in (("ls",), ("gc", "--dry-run")):
        said = cli(*command)
        assert said.code == 0
        assert stray in said.out and damaged in said.out
    assert cli("show", "student").code == 0
    assert cli("lineage", "student").code == 0
    planned = cli("plan", *MINI)
    assert planned.code == 2
    assert damaged in planned.err
    assert "Traceback" not in planned.err


def test_gc_asks_and_takes_a_recipe(store: Store, cli: Callable[..., Any]) -> None:
    nothing_shared = cli("gc", "--only", "--keep", "mopd", "--dry-run", "--json").json
    assert len(nothing_shared["removed"]) == 8
    unasked = cli("gc", "--only", "--keep", "mopd", "--json")
    assert unasked.code == 2
    assert "--yes" in unasked.err
    assert cli("gc", "--only").code == 2
    assert len(store.list()) == 8


def test_report(store: Store, cli: Callable[..., Any], done: Path) -> None:
    for target in ((), ("evaluation",), MINI):
        Path("page.html").unlink(missing_ok=True)
        result = cli("report", *target, "--report", "page.html")
        assert result.code == 0, result.err
        assert store.resolve("evaluation").fingerprint in Path("page.html").read_text()
    unmade = cli("report", *MINI, "--set", "steps=9")
    assert unmade.code == 2
    assert "posttrain run" in unmade.err
    misplaced = cli("report", "evaluation", "--seed", "1")
    assert misplaced.code == 2
    assert "belong to a recipe" in misplaced.err
    empty = cli("report", "--store", "none")
    assert empty.code == 2
    assert "no evaluation" in empty.err


def test_recipes(cli: Callable[..., Any]) -> None:
    found = {recipe["name"]: recipe for recipe in cli("recipes", "--json").json["recipes"]}
    assert "arXiv" in found["mopd"]["source"]
    assert "distillation" in found["mopd"]["summary"]
    assert "mopd" in cli("recipes").out


def test_chat(store: Store, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    once = [cli("chat", "student", "--prompt", "1+2=", "--seed", str(s)).out for s in (1, 1, 2)]
    assert once[0] == once[1] != once[2]
    lines = iter(["1+2=", "c34", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli("chat", "student").code == 0
    assert next(lines, None) is None
    wrong = cli("chat", "sums", "--prompt", "x")
    assert wrong.code == 2
    assert "of kind domain, not a model" in wrong.err
    long = cli("chat", "student", "--prompt", "1" * 99)
    assert long.code == 2
    assert "positions" in long.err


@pytest.mark.parametrize(
    ("created", "text"),
    [
        ("2020-01-01T00:00:00+00:00", " d"),
        ("2999-01-01T00:00:00+00:00", "0 s"),
    ],
)
def test_age(created: str, text: str) -> None:
    assert age(created).endswith(text)
