"""Checkpoints to the Hub, against a server on this machine that speaks its interface."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tests.cli.hub_server import Hub

from posttrain.engine.store import Store

NAME = "me/my-student"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_TOKEN", server.token)
    # Read when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, name.endswith("XET"))
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    yield server
    server.close()


def test_a_push_is_an_export_in_one_commit(hub: Hub, cli: Callable[..., Any], done: Path) -> None:
    found = cli("push", "student", f"hub:{NAME}", "--json").json
    student = Store(done / "posttrain-store").resolve("student")
    there = hub.repositories[NAME]
    assert found["pushed"] and found["repository"] == NAME and found["commit"] == there.commit
    assert found["url"] == f"{hub.url}/{NAME}"
    assert found["files"] == {name: len(content) for name, content in sorted(there.files.items())}
    assert there.private and there.messages == [f"{student.label}, made by posttrain"]
    assert "samples.jsonl" in student.files and "samples.jsonl" not in there.files
    for name, entry in student.files.items():
        if name not in ("README.md", "samples.jsonl"):
            assert hashlib.sha256(there.files[name]).hexdigest() == entry["sha256"], name
    card = there.files["README.md"].decode()
    assert f'path = "{NAME}"' in card and "## Its history" in card and "## Scores" in card
    assert f"posttrain adopt hub:{NAME}" in card and "model-index" in card
    # Another store checks the history and has it.
    adopted = cli("adopt", f"hub:{NAME}", "--name", "theirs", "--store", "other", "--json").json
    assert set(adopted["history"]) >= {"student", "sums_teacher", "copies_teacher", "sft", "base"}
    origin = Store(Path("other")).resolve("theirs").provenance["origin"]
    assert (origin["hub"], origin["commit"]) == (NAME, there.commit)
    assert cli("verify", "--store", "other", "--json").json["ok"]


def test_a_second_push_is_a_further_commit(hub: Hub, cli: Callable[..., Any], done: Path) -> None:
    assert cli("push", "sft", f"hub:{NAME}", "--public").code == 0
    assert not hub.repositories[NAME].private
    again = cli("push", "student", f"hub:{NAME}", "--dtype", "bfloat16", "--json").json
    assert again["rounded"] and again["records"] == []
    assert len(hub.repositories[NAME].messages) == 2
    assert "## Rounded" in hub.repositories[NAME].files["README.md"].decode()
    # A history of the bytes that were there before would not be that of these.
    assert "history.json" not in hub.repositories[NAME].files


def test_a_dry_run_asks_nobody(hub: Hub, cli: Callable[..., Any], done: Path) -> None:
    said = cli("push", "student", f"hub:{NAME}", "--dry-run").out
    assert "nothing was uploaded" in said and "model.safetensors" in said and "records of" in said
    found = cli("push", "student", f"hub:{NAME}", "--dry-run", "--json").json
    assert not found["pushed"] and "url" not in found and "history.json" in found["files"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("me/model", "did you mean hub:me/model?"),
        ("somewhere", "`posttrain export` writes a directory"),
        ("hub:model", "hub:OWNER/NAME"),
        ("hub:me/a--b", "hub:OWNER/NAME"),
        ("hub:me/a.git", "hub:OWNER/NAME"),
        ("hub:../x", "hub:OWNER/NAME"),
        ("hub:me/" + "a" * 100, "96 characters"),
    ],
)
def test_other_targets(target: str, said: str, cli: Callable[..., Any], done: Path) -> None:
    found = cli("push", "student", target)
    assert (found.code, found.out) == (2, "") and said in found.err


def test_what_is_no_model(cli: Callable[..., Any], done: Path) -> None:
    found = cli("push", "evaluation", f"hub:{NAME}")
    assert found.code == 2 and "only models are pushed" in found.err


def test_refusals_say_what_to_do(
    hub: Hub, cli: Callable[..., Any], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = cli("push", "student", "hub:others/model")
    assert foreign.code == 2 and "may write for 'others'" in foreign.err
    branch = cli("push", "student", f"hub:{NAME}", "--revision", "mine")
    assert branch.code == 2 and "no branch 'mine'" in branch.err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wrong = cli("push", "student", f"hub:{NAME}")
    assert wrong.code == 2 and "hf auth login" in wrong.err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    nobody = cli("push", "student", f"hub:{NAME}")
    assert nobody.code == 2 and "cannot be reached" in nobody.err
    assert all("Traceback" not in one.err for one in (foreign, branch, wrong, nobody))


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "student", "hub:me/model"),
        ("ls", "--store", "hub:me/model"),
        ("run", "mini.py", "--report", "hub:me/model"),
    ],
)
def test_the_hub_is_never_a_directory(
    arguments: tuple[str, ...], cli: Callable[..., Any], done: Path
) -> None:
    found = cli(*arguments)
    assert found.code == 2 and "posttrain push" in found.err
    assert not Path("hub:me").exists()


def test_a_directory_of_that_name_does_not_count(
    hub: Hub, cli: Callable[..., Any], done: Path
) -> None:
    assert cli("export", "base", NAME).code == 0
    assert cli("push", "student", f"hub:{NAME}").code == 0
    here = cli("adopt", NAME, "--name", "here", "--store", "other", "--json").json
    there = cli("adopt", f"hub:{NAME}", "--name", "there", "--store", "other", "--json").json
    assert here["history"][-1] == "base" and there["history"][-1] == "student"


def test_help_does_without_the_library() -> None:
    code = "import sys, posttrain.cli as c; c.main(['push', '--help']); "
    code += "sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
