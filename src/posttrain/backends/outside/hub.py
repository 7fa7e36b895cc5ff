"""Checkpoints from the Hugging Face Hub and to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.backends.outside.files import CARD, NEVER_READ, OTHER_FOLDERS
from posttrain.engine.errors import ConfigError, StoreError
from posttrain.engine.transfer import HISTORY
from posttrain.engine.work import CODE_DIFF

if TYPE_CHECKING:  # it takes a third of a second to import
    from huggingface_hub import HfApi

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`owner/name` with or without a revision."""
REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
"""`owner/name` as the Hub allows it, but for "--", ".." and ".git" at the end."""
LONGEST = 96
"""Characters of `owner/name` at most."""

BESIDE = (CARD, HISTORY)
"""What is fetched though it is no part of a checkpoint: the card has the licence, the history of an
export is adopted with it."""
REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", HISTORY, CODE_DIFF)
"""What an upload takes away of an earlier one, unless it brings it: the files of one model only."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What the Hub said of an upload."""

    url: str
    commit: str


def repository(target: str) -> str:
    """`owner/name` of `hub:owner/name`. Raises ConfigError for anything else."""
    name = target.removeprefix("hub:")
    if not target.startswith("hub:"):
        meant = f" (did you mean hub:{name}?)" if REPOSITORY.fullmatch(name) else ""
        raise ConfigError(
            f"push to {target!r}: give hub:OWNER/NAME{meant}; `posttrain export` writes a directory"
        )
    bad = "--" in name or ".." in name or name.endswith(".git") or len(name) > LONGEST
    if bad or not REPOSITORY.fullmatch(name):
        raise ConfigError(
            f"push to {target!r}: no name of a repository; it is hub:OWNER/NAME of letters, digits "
            f"and single - _ . within, {LONGEST} characters at most, such as hub:me/my-model"
        )
    return name


def upload(folder: Path, name: str, *, revision: str | None, public: bool, message: str) -> Pushed:
    """Put the files of a folder into the repository `name` as one commit; makes a repository that
    is not there. Raises StoreError, with what to do, where the Hub refuses or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _told(name, revision):
        api: HfApi = HfApi(library_name="posttrain")
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(REPLACED),
        )
    return Pushed(url=str(commit.repo_url), commit=str(commit.oid))


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub and the way to it raise into a StoreError with the fix."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        raise StoreError(
            f"push to hub:{name}: it has no branch {revision!r}; make it there, or leave "
            "--revision out"
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = getattr(error, "server_message", None) or str(error)
        said = (told.strip().splitlines() or [type(error).__name__])[0]
        fix = "try again"
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            fix = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        elif status == 403 or isinstance(error, RepositoryNotFoundError):
            owner = name.partition("/")[0]
            fix = f"take a token that may write for {owner!r}, or another owner"
        raise StoreError(f"push to hub:{name}: the Hub refused ({said}); {fix}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise StoreError(
            f"push to hub:{name}: the Hub cannot be reached ({error}); check the connection and "
            "HF_ENDPOINT, and run the same command again"
        ) from error


def download(source: str) -> Path:
    """The directory in the cache of a Hub id, with or without `@revision`; fetches what is not
    there. Raises ConfigError where it cannot be had."""
    # Only a Hub id needs it, and it takes a third of a second to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    name, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                ignore_patterns=[p for p in (*NEVER_READ, *OTHER_FOLDERS) if p not in BESIDE],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {source!r}: neither a directory nor to be had from the Hub "
            f"({str(error).splitlines()[0]}); check the id, the revision and the connection"
        ) from error
