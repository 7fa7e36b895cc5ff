"""Where a run was made and from which code: facts that never enter a fingerprint.

Captured once per run. When the code has changes that are not committed, their text goes into every
artifact of the run as code.diff, so the state can be rebuilt. Nothing here fails a run: what cannot
be found out is left out.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from posttrain.engine.fingerprint import file_digest

_HASHED_BYTES: Final = 10_000_000
"""Untracked files above this size are listed with their size instead of their hash."""

_TEXT_BYTES: Final = 200_000
"""Of a longer file the text is not kept: it would be in the record of every stage."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts about a run as JSON data, and the text of its uncommitted changes ("" without any)."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    diff: str = ""


def capture(
    paths: Sequence[Path],
    *,
    packages: Sequence[str] = (),
    exclude: Sequence[Path] = (),
    texts: Mapping[str, Path] | None = None,
) -> Provenance:
    """Facts about this process, and about the git repositories that hold `paths`.

    Of the files in `texts` the text is kept, under the name that each has there.

    `packages` are names of distributions whose versions matter; those not installed are left out.
    Untracked files below `exclude` (the store, say) are not looked at.
    """
    repositories = []
    changes = []
    for root in dict.fromkeys(filter(None, map(_root_of, paths))):
        facts, text = _describe(root, [path.resolve() for path in exclude])
        repositories.append(facts)
        changes.append(text)
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "argv": [without_logins(argument) for argument in sys.argv],
        "packages": dict(_versions(packages)),
        "git": repositories,
        **({"texts": {name: _text(path) for name, path in texts.items()}} if texts else {}),
    }
    return Provenance(facts=facts, diff="".join(changes))


def without_logins(text: str) -> str:
    """The text without the `user:password@` of its URLs."""
    return re.sub(r"(?<=://)[^\s/@]+@", "", text)


def _text(path: Path) -> dict[str, Any]:
    """Path and text of a file, None in its place above `_TEXT_BYTES`."""
    try:
        content = path.read_bytes()
    except OSError:
        return {"path": str(path), "text": None}
    found = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest(), "text": None}
    if len(content) <= _TEXT_BYTES:
        found["text"] = without_logins(content.decode("utf-8", "replace"))
    return found


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in packages:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _root_of(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent
    root = _git(folder, "rev-parse", "--show-toplevel") if folder.is_dir() else None
    return Path(root.strip()) if root else None


def _describe(root: Path, exclude: Sequence[Path]) -> tuple[dict[str, Any], str]:
    # An empty repository has no HEAD, so nothing to compare with: its files all count as untracked.
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD") if commit else None
    text = (diff or "") + "".join(_untracked(root, exclude))
    facts = {
        "root": str(root),
        "commit": commit.strip() if commit else None,
        "branch": (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None,
        "dirty": bool(text),
        "diff_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None,
    }
    return facts, f"# repository {root} at {facts['commit']}\n{text}" if text else ""


def _untracked(root: Path, exclude: Sequence[Path]) -> Iterator[str]:
    names = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    for name in filter(None, names.split("\0")):
        path = root / name
        if any(path.is_relative_to(folder) for folder in exclude) or not path.is_file():
            continue
        size = path.stat().st_size
        what = f"sha256 {file_digest(path)}" if size <= _HASHED_BYTES else f"{size} bytes"
        yield f"# untracked {name} {what}\n"


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints, None when there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=20,
            check=False,
            # Without locks on the index, which the user's own git may need at this moment.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
