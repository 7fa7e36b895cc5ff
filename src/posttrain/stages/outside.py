"""What a recipe takes from outside the store: the domains of its suite, and checkpoints.

Files of a checkpoint are linked, not copied, and hashed. A large file that the plan hashed, and
that the file system calls unchanged since, is not read again for that (`engine/hashes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.backends.checkpoint import load
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, files_digest
from posttrain.engine.hashes import FileHashes, HashFile
from posttrain.engine.process import Job
from posttrain.stages.context import Context
from posttrain.suites.build import build_domain


def run_domain(job: Job, ctx: Context) -> dict[str, Any]:
    """Write the problems of a domain; returns what `build_domain` counts."""
    return build_domain(job.config, job.runtime, ctx.out, job.data)


def run_model(job: Job, ctx: Context) -> dict[str, Any]:
    """Take in the checkpoint that the job's `runtime` names; returns its number of parameters."""
    directory, files = Path(job.runtime["directory"]), job.runtime["files"]
    return link_model(directory, files, job.data["files"], ctx, FileHashes(Path(job.hashes)).digest)


def link_model(
    directory: Path,
    files: Sequence[str],
    sha256: str,
    ctx: Context,
    hash_file: HashFile = file_digest,
) -> dict[str, float]:
    """Link `files` of `directory` into the artifact and check that they load as a model.

    Raises ConfigError if they are no longer the files whose digest `sha256` the plan has seen.
    """
    if files_digest(directory, files, hash_file) != sha256:
        raise ConfigError(f"{directory}: its files changed since this run was planned; run again")
    for name in files:
        target = ctx.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to((directory / name).resolve())
    language_model = load(ctx.out)
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    return {"parameters": parameters}
