"""The guide docs/own-data.md: its commands work, one after the other, on a smaller model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from posttrain.cli import main

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "own_data"

SMALL = {
    "general.py": ["sft_steps=60"],
    "colleague.py": ["steps=2"],
    "own.py": [
        *("sft_steps=60", "steps=2", "selection.how=all", "*.prompts_per_step=4", "rollouts.k=1"),
        *("evaluation.num_problems=4", "evaluation.samples=1", "evaluation.bootstrap=100"),
    ],
}
"""What a command of the guide is given in addition, so that a test has the time for it."""


def commands() -> list[list[str]]:
    """What the guide tells to type, in its order."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_guide_shows_the_files_of_the_example() -> None:
    for name in ("suite.toml", "own.py"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") in GUIDE, name


def make(folder: Path) -> None:
    """The data and the checkpoint, in a smaller size."""
    spec = spec_from_file_location("make", EXAMPLE / "make.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_data(folder / "data", rows=300)
    module.write_base(folder / "base", hidden_size=24, layers=1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_STORE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_its_commands_run(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for words in commands():
        if words[:2] == ["python", "make.py"]:
            make(place)
            continue
        if words[0] == "cd":
            continue
        assert words[0] == "posttrain", words
        recipe = words[2] if len(words) > 2 else ""
        small = SMALL.get(recipe, [])
        if "beside=false" in words:
            small = [text for text in small if not text.startswith(("selection", "rollouts"))]
        extra = [part for text in small for part in ("--set", text)]
        code = main([*words[1:], *extra])
        said = capfd.readouterr()
        assert code == 0, (words, said.err)
        ran.append(words[1])
    assert {"plan", "run", "export", "sweep", "compare", "chat", "show"} == set(ran)
    written = (place / "posttrain-store" / "artifacts" / "evaluate").glob("*/evaluation.json")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in written]
    # One of the run, and one of each of the sweep's three settings by two seeds.
    assert len(found) == 7
    (evaluation,) = (one for one in found if len(one["students"]) > 1)
    assert set(evaluation["students"]) == {"mopd", "merged", "traces"}
    assert list(evaluation["along"]) == ["round1", "round2"]
    assert list(evaluation["unverified"]) == ["chat"]
    assert "mopd" in (place / "report.html").read_text(encoding="utf-8")
