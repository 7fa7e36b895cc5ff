"""Writing report.html on behalf of `run` and `report`."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.engine.atomic import guarded
from posttrain.engine.errors import ConfigError
from posttrain.engine.record import Artifact
from posttrain.engine.store import Store
from posttrain.loading import Loaded


def check_report_path(report: Path) -> None:
    """Raise ConfigError, before any work is done, for a path that no report can be written to."""
    folder = report.absolute().parent
    if report.is_dir():
        problem = f"that is a directory; name a file, such as {report / 'report.html'}"
    elif not folder.is_dir():
        problem = f"the directory {folder} does not exist; make it"
    elif not os.access(folder, os.W_OK):
        problem = f"the directory {folder} cannot be written to; name another one"
    else:
        return
    raise ConfigError(f"--report {report}: {problem}")


def write_report_of(
    path: Path,
    *,
    store: Store,
    artifact: Artifact,
    loaded: Loaded | None = None,
    seconds: float | None = None,
    anew: bool = False,
) -> bool:
    """Write the page about `artifact`; returns False where it was there already (unless `anew`).

    `loaded` is the recipe that asked for it, None where only the artifact is known. `seconds` is
    how long the run took that made it. Raises StoreError for a full disk.
    """
    # Templates and plots take a while to import, and most commands do without.
    from posttrain.report.html import report_is_current, write_report

    if not anew and report_is_current(path, artifact.fingerprint):
        return False
    if loaded is None:
        recipe, source = artifact.name, ""
        seed = int(artifact.config.get("seed", 0))
    else:
        recipe, seed = loaded.name, loaded.seed
        source = loaded.path.read_text(encoding="utf-8")
    with guarded(path.absolute().parent, "writing the report"):
        write_report(
            path,
            store=store,
            artifact=artifact,
            recipe=recipe,
            seed=seed,
            seconds=seconds,
            source=source,
        )
    return True
