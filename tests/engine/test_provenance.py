"""Facts about a run; none of them can fail it."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from posttrain.engine import provenance
from posttrain.engine.provenance import capture


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path.resolve() / "repository"
    (root / "src").mkdir(parents=True)
    (root / "src" / "code.py").write_text("x = 1\n")
    git(root, "init", "-q", "-b", "trunk")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "start")
    return root


def test_a_clean_repository(repository: Path) -> None:
    found = capture([repository / "src", repository / "src" / "code.py"])
    assert found.facts["git"] == [
        {
            "root": str(repository),
            "commit": git(repository, "rev-parse", "HEAD"),
            "branch": "trunk",
            "dirty": False,
            "diff_sha256": None,
        }
    ]
    assert found.diff == ""


def test_a_dirty_repository_gives_its_changes(repository: Path) -> None:
    (repository / "src" / "code.py").write_text("x = 2\n")
    (repository / "new.txt").write_text("new")
    (repository / "store").mkdir()
    (repository / "store" / "weights.bin").write_text("big")
    found = capture([repository], exclude=[repository / "store"])
    assert "-x = 1\n+x = 2\n" in found.diff
    assert f"# untracked new.txt sha256 {hashlib.sha256(b'new').hexdigest()}\n" in found.diff
    assert "weights.bin" not in found.diff
    [facts] = found.facts["git"]
    text = found.diff.split("\n", 1)[1]
    assert facts["dirty"]
    assert facts["diff_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert facts["commit"] in found.diff.split("\n", 1)[0]


def test_big_untracked_files_are_not_hashed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_HASHED_BYTES", 2)
    (repository / "new.txt").write_text("new")
    assert "# untracked new.txt 3 bytes\n" in capture([repository]).diff


def test_a_repository_without_commits(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("a")
    [facts] = capture([tmp_path]).facts["git"]
    assert facts["commit"] is None
    assert facts["dirty"]


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture([tmp_path, tmp_path / "nowhere" / "x"]).facts["git"] == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert capture([Path(__file__)]).facts["git"] == []


def test_other_facts() -> None:
    facts = capture([], packages=["pytest", "no-such-distribution"]).facts
    assert facts["packages"] == {"pytest": pytest.__version__}
    assert {"started", "host", "platform", "python", "cpu_count", "argv", "git"} < facts.keys()


def test_texts_of_files_are_kept_without_logins_and_up_to_a_size(tmp_path: Path) -> None:
    short, long = tmp_path / "short.py", tmp_path / "long.py"
    short.write_text('url = "https://me:secret@host/v1?x=a@b"\n')
    long.write_text("x" * 200_001)
    gone = tmp_path / "gone.py"
    facts = capture([], texts={"short": short, "long": long, "gone": gone}).facts["texts"]
    assert facts["short"]["text"] == 'url = "https://host/v1?x=a@b"\n'
    assert facts["short"]["path"] == str(short) and len(facts["short"]["sha256"]) == 64
    assert facts["long"]["text"] is None and len(facts["long"]["sha256"]) == 64
    assert facts["gone"]["text"] is None
    assert "texts" not in capture([]).facts


PROGRAMS = (
    *("core.fsmonitor", "diff.external", "diff.own.textconv", "diff.own.command"),
    *("filter.own.clean", "filter.own.smudge", "filter.own.process", "filter.a=b.clean"),
    *("core.pager", "pager.diff", "core.sshCommand", "core.editor", "alias.diff"),
)


@pytest.mark.parametrize("key", PROGRAMS)
def test_nothing_that_a_repository_names_is_executed(repository: Path, key: str) -> None:
    marker = repository.parent / "executed"
    driver = "a=b" if "a=b" in key else "own"
    (repository / ".gitattributes").write_text(f"*.py filter={driver} diff={driver}\n")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "attributes")
    shell = "!" if key.startswith("alias") else ""
    git(repository, "config", key, f"{shell}touch {marker}; cat")
    git(repository, "config", "filter.own.required", "true")
    (repository / "src" / "code.py").write_text("x = 2\n")
    marker.unlink(missing_ok=True)
    found = capture([repository / "src"])
    assert not marker.exists()
    assert "-x = 1\n+x = 2\n" in found.diff


def test_no_program_of_a_submodule_or_a_hook_is_executed(repository: Path) -> None:
    marker = repository.parent / "executed"
    inner = repository / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "a.txt").write_text("a")
    (inner / ".gitattributes").write_text("*.txt filter=inner\n")
    git(inner, "add", ".")
    git(inner, "commit", "-q", "-m", "inner")
    git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "inner")
    git(repository, "commit", "-q", "-m", "with inner")
    git(inner, "config", "core.fsmonitor", f"touch {marker}; false")
    git(inner, "config", "filter.inner.clean", f"touch {marker}; cat")
    (inner / "a.txt").write_text("b")
    hooks = repository / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (hooks / name).chmod(0o755)
    (repository / "src" / "code.py").write_text("x = 2\n")
    found = capture([repository])
    assert not marker.exists()
    assert "+x = 2" in found.diff


def test_the_environment_of_a_hook_does_not_lead_to_another_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    marker = tmp_path / "executed"
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", f"touch {marker}")
    [facts] = capture([repository]).facts["git"]
    assert facts["root"] == str(repository) and facts["branch"] == "trunk"
    assert not marker.exists()


def test_a_work_tree_elsewhere_is_not_looked_at(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("private")
    git(repository, "config", "core.worktree", str(tmp_path.resolve()))
    assert capture([repository / "src"]).facts["git"] == []


SECRETS = (".env", "deploy/.env.local", "Server.PEM", "a.key", "id_ed25519", "my_secrets.yaml")


def test_the_text_of_private_files_is_kept_out(repository: Path) -> None:
    for name in SECRETS:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("KEY=before\n")
    git(repository, "add", "-f", ".")
    git(repository, "commit", "-q", "-m", "keys")
    clean = capture([repository])
    assert clean.diff == ""
    for name in SECRETS:
        (repository / name).write_text("KEY=sk-123\n")
    (repository / SECRETS[-1]).unlink()
    (repository / "src" / "code.py").write_text("x = 2\n")
    found = capture([repository])
    assert "+x = 2" in found.diff and "KEY=" not in found.diff
    digest = hashlib.sha256(b"KEY=sk-123\n").hexdigest()
    for name in SECRETS[:-1]:
        assert f"# kept out {name} sha256 {digest}\n" in found.diff
    assert f"# kept out {SECRETS[-1]} removed\n" in found.diff
    # That one of them changed again is seen.
    before = found.facts["git"][0]["diff_sha256"]
    (repository / ".env").write_text("KEY=sk-124\n")
    assert capture([repository]).facts["git"][0]["diff_sha256"] != before


@pytest.mark.parametrize(
    ("patterns", "kept_out"),
    [(None, False), ("", False), ("*.py", True), ("src/*, notes", True), ("code.py", True)],
)
def test_which_files_are_private_is_set(
    repository: Path, monkeypatch: pytest.MonkeyPatch, patterns: str | None, kept_out: bool
) -> None:
    if patterns is not None:
        monkeypatch.setenv(provenance.PRIVATE, patterns)
    (repository / "src" / "code.py").write_text("x = 2\n")
    found = capture([repository]).diff
    assert ("+x = 2" not in found) is kept_out
    assert ("# kept out src/code.py sha256 " in found) is kept_out


def test_a_name_of_two_lines_stays_on_one(repository: Path) -> None:
    (repository / "a\n# untracked b sha256 0").write_text("new")
    assert "# untracked 'a\\n# untracked b sha256 0' sha256" in capture([repository]).diff
