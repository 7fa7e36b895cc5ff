"""Where a run was made and from which code: facts that never enter a fingerprint.

Captured once per run. When the code has changes that are not committed, their text goes into every
artifact of the run as code.diff, so the state can be rebuilt; of files that may hold keys only that
they changed. Nothing here fails a run: what cannot be found out is left out. A repository may have
come with data of strangers: nothing that its configuration names is executed.
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
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from posttrain.engine.fingerprint import file_digest

_HASHED_BYTES: Final = 10_000_000
"""Untracked files above this size are listed with their size instead of their hash."""

_TEXT_BYTES: Final = 200_000
"""Of a longer file the text is not kept: it would be in the record of every stage."""


PRIVATE: Final = "POSTTRAIN_PRIVATE_FILES"
"""Environment variable: comma-separated patterns in place of `_PRIVATE`; empty for none."""

_PRIVATE: Final = (
    *(".env", ".env.*", "*.env", ".netrc", ".npmrc", ".pypirc", ".htpasswd"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*"),
    *("id_ed25519*", "*credential*", "*secret*", "*password*"),
)
"""Names of files that often hold keys: their text is kept out of code.diff."""

_CONFIG: Final = ("config", "--list", "--show-scope", "--name-only", "-z")
_LOCAL: Final = ("local", "worktree")
_OF_GIT: Final = (
    *("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_EXEC_PATH"),
    *("GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM"),
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts about a run as JSON data, and the text of its uncommitted changes ("" without any)."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    diff: str = ""
    of_stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further facts about single stages, by fingerprint."""


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
    found = _git(folder, "rev-parse", "--show-toplevel") if folder.is_dir() else None
    root = Path(found.strip()) if found else None
    # A configuration may name any directory, whose files are none of ours.
    return root if root is not None and (root / ".git").exists() else None


def _describe(root: Path, exclude: Sequence[Path]) -> tuple[dict[str, Any], str]:
    # An empty repository has no HEAD, so nothing to compare with: its files all count as untracked.
    commit = _git(root, "rev-parse", "HEAD")
    text = "".join((*(_changes(root) if commit else ()), *_untracked(root, exclude)))
    facts = {
        "root": str(root),
        "commit": commit.strip() if commit else None,
        "branch": (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None,
        "dirty": bool(text),
        "diff_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None,
    }
    return facts, f"# repository {root} at {facts['commit']}\n{text}" if text else ""


def _changes(root: Path) -> Iterator[str]:
    """The text of the changes of tracked files; of private ones that they changed, and to what."""
    # No programs, and nothing from inside submodules, whose own configuration git would follow.
    safe = ("--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty", "--no-color")
    names = _git(root, "diff", *safe, "--no-renames", "--name-only", "-z", "HEAD") or ""
    private = [name for name in filter(None, names.split("\0")) if is_private(name)]
    without = [f":(top,exclude,literal){name}" for name in private]
    yield _git(root, "diff", *safe, "HEAD", "--", ":(top)", *without) or ""
    for name in private:
        yield f"# kept out {_on_a_line(name)} {_state_of(root / name)}\n"


def is_private(name: str) -> bool:
    """Whether a tracked file is one whose text is kept out of code.diff, by its path in the
    repository. `PRIVATE` has patterns of names or paths in place of the usual ones."""
    given = os.environ.get(PRIVATE)
    patterns = _PRIVATE if given is None else [part.strip() for part in given.split(",")]
    path = name.lower()
    return any(
        fnmatchcase(text, pattern.lower())
        for pattern in filter(None, patterns)
        for text in (path, path.rpartition("/")[2])
    )


def _state_of(path: Path) -> str:
    """What tells one state of a file from another."""
    if not path.is_file():
        return "removed"
    size = path.stat().st_size
    return f"sha256 {file_digest(path)}" if size <= _HASHED_BYTES else f"{size} bytes"


def _untracked(root: Path, exclude: Sequence[Path]) -> Iterator[str]:
    names = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    for name in filter(None, names.split("\0")):
        path = root / name
        if any(path.is_relative_to(folder) for folder in exclude) or not path.is_file():
            continue
        try:
            yield f"# untracked {_on_a_line(name)} {_state_of(path)}\n"
        except OSError:
            yield f"# untracked {_on_a_line(name)} (cannot be read)\n"


def _on_a_line(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints, None when there is no git, no repository, or no answer in time.

    The repository may be a stranger's: nothing that its configuration names is executed.
    """
    safe = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-pager")
    # Of the user's own settings only where the configuration is; others may be meant for another
    # repository, such as that of a hook which started this.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    kept |= {key: os.environ[key] for key in _OF_GIT if key in os.environ}
    # Without locks on the index, which the user's own git may need at this moment, and without
    # fetching what a partial clone lacks.
    kept |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_ALLOW_PROTOCOL": "", "LC_ALL": "C"}
    listed = _output(["git", *safe, "-C", str(folder), *_CONFIG], kept)
    if listed is None:
        return None
    # Filters turn the files of a work tree into what is committed, and can be any program.
    off = [
        (f"filter.{name}.{key}", "false" if key == "required" else "")
        for name in _filters(listed)
        for key in ("clean", "smudge", "process", "required")
    ]
    for number, (key, value) in enumerate(off):
        kept |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    kept["GIT_CONFIG_COUNT"] = str(len(off))
    return _output(["git", *safe, "-C", str(folder), *arguments], kept)


def _filters(listed: str) -> set[str]:
    """The filters that the repository itself configures: `scope NUL key NUL` repeated."""
    fields = listed.split("\0")
    keys = [key for scope, key in zip(fields[::2], fields[1::2], strict=False) if scope in _LOCAL]
    parts = [key.split(".", 1)[1] for key in keys if key.startswith("filter.")]
    return {part.rpartition(".")[0] for part in parts}


def _output(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=20,
            check=False,
            env=environment,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
