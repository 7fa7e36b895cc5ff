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
