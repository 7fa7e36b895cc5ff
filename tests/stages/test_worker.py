"""The worker: whose models a stage computes with, and with how many threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.stages.worker import BACKEND, new_backend

OWN = """
from posttrain.backends.local import LocalBackend

made = []

class OwnBackend(LocalBackend):
    def __init__(self, *, device, compile, workers):
        super().__init__(device=device, compile=compile, workers=workers)
        made.append({"device": device, "compile": compile, "workers": workers})
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with a backend of its own, `own_backend:OwnBackend`, which notes how it was made."""
    (tmp_path / "own_backend.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_backend  # type: ignore[import-not-found]

    own_backend.made.clear()
    return own_backend


def test_a_job_names_its_backend(
    run_stage: Callable[..., Any],
    same: Callable[[Any, Any], bool],
    models: Mapping[str, str],
    domains: Mapping[str, str],
    own: Any,
) -> None:
    settings = {"steps": 2, "batch_size": 8}
    inputs = {"start": models["start"], **domains}
    usual = run_stage("sft", settings, inputs)
    assert own.made == []
    named = run_stage(
        "sft", settings, inputs, environment={BACKEND: "own_backend:OwnBackend"}, threads=2
    )
    assert same(usual, named)
    (given,) = own.made
    assert (given["device"], given["compile"]) == ("cpu", False)
    assert given["workers"] is not None, "two cores and one thread of arithmetic leave one to spare"


def test_without_a_name_it_is_the_local_one() -> None:
    assert type(new_backend({})).__name__ == "LocalBackend"
    with pytest.raises(ModuleNotFoundError, match="no_backend"):
        new_backend({BACKEND: "no_backend:Backend"})


def test_stages_without_a_model_import_no_transformers() -> None:
    code = (
        "import sys\n"
        "import posttrain.stages.select, posttrain.stages.lengths\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
