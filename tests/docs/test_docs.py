"""The documentation against the code: what it shows exists, and what exists is in it."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import typer

from posttrain.cli import app
from posttrain.language.loader import shipped_recipes
from posttrain.report.curves import COUNTERS, METRICS
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.spec import OPTIONS
from posttrain.stages.kinds import KINDS, Kind, kind_of
from posttrain.suites.load import load_suite

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| ", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
DERIVED = {"clip_share"}
"""Drawn in the report, computed from logged metrics."""
OTHERS = {"adopt": {"--set"}}
"""Options of another command, in an example."""


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_shows_the_recipe_as_it_is() -> None:
    source = shipped_recipes()["mopd"].read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    code = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    shown = [body.strip() for kind, body in FENCE.findall(page("README.md")) if kind == "python"]
    assert shown[0] == code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_tests_exist(path: Path) -> None:
    for file, function in TEST.findall(path.read_text(encoding="utf-8")):
        assert f"def {function}(" in page(file), f"{file}::{function}"


def test_every_loss_names_its_proof() -> None:
    text = page("docs/losses.md")
    assert len(TEST.findall(text)) > 30
    for name in ("sampled_token", "top_k", "full_vocabulary"):
        section = text.partition(f"### `{name}`")[2].partition("\n### ")[0]
        assert "Source" in section and TEST.search(section), name


def check_settings(kind: Kind, text: str) -> None:
    """A table of settings belongs to the kinds that its heading names."""
    found: dict[str, str] = {}
    settings = text.partition("## Settings")[2].partition("\n## ")[0]
    for section in settings.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        if f"`{kind}`" in heading:
            found |= dict(ROW.findall(body))
    fields = kind.settings_class().model_fields
    assert set(found) == set(fields)
    for name, field in fields.items():
        if field.is_required():
            assert found[name] == "needed", name
        elif found[name] != "differs":
            default = field.get_default(call_default_factory=True)
            if isinstance(default, Judge):
                default = default.to_json()
            assert found[name] == f"`{json.dumps(default)}`", name


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if not k.from_outside], ids=str)
def test_every_setting_is_documented_with_its_default(kind: Kind) -> None:
    check_settings(kind, page("docs/language.md"))


def test_the_settings_of_a_kind_of_ones_own_can_be_checked_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/cli")
    kind = kind_of("own_kind.ECHO")
    text = "## Settings\n\n### `own_kind.ECHO`\n\n| `calls` | `3` | |\n| `loss` | `0.5` | |\n"
    check_settings(kind, text)
    for old, new in {"| `loss` | `0.5` | |": "", "`own_kind.ECHO`": "echo", "`3`": "`4`"}.items():
        with pytest.raises(AssertionError):
            check_settings(kind, text.replace(old, new))
    # Other tests have a copy of that module, which is to be found in its place.
    del sys.modules["own_kind"]


@pytest.mark.parametrize(
    "kind", [k.name for k in KINDS.values() if hasattr(k.settings_class(), "SCHEDULABLE")]
)
def test_every_setting_that_may_have_a_schedule_is_documented(kind: str) -> None:
    found: set[str] = set()
    settings = page("docs/language.md").partition("## Settings")[2].partition("\n## ")[0]
    for section in settings.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        if f"`{kind}`" in heading:
            for names in re.findall(r"May have a schedule: ([^.]*)\.", body):
                found |= set(re.findall(r"`(\w+)`", names))
    assert found == KINDS[kind].settings_class().schedulable()


def test_a_default_that_differs_is_told() -> None:
    fields = {k: KINDS[k].settings_class().model_fields for k in ("rl", "distill")}
    defaults = {k: found["aggregation"].default for k, found in fields.items()}
    told = '`aggregation` is `"{rl}"` in `rl` and `"{distill}"` in `distill`.'
    assert told.format(**defaults) in page("docs/language.md")


def test_every_metric_is_documented() -> None:
    text = page("docs/metrics.md")
    for name in (set(METRICS) | COUNTERS) - DERIVED:
        assert re.search(rf"`{name}(/<\w+>)?`", text), name


@pytest.mark.parametrize("command", typer.main.get_command(app).commands.values())  # type: ignore[attr-defined]
def test_every_option_is_documented(command: typer.core.TyperCommand) -> None:
    text = page("docs/cli.md")
    assert f"\n## {command.name}\n" in text
    section = text.partition(f"\n## {command.name}\n")[2].partition("\n## ")[0]
    known = {name for p in command.params for name in p.opts if name.startswith("--")}
    shown = set(re.findall(r"--[a-z][a-z-]+", section))
    assert shown - OTHERS.get(command.name or "", set()) == known - {"--help"}


def test_every_verifier_is_documented() -> None:
    text = page("docs/suites.md")
    for kind, options in OPTIONS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{kind}"))
        assert all(f"`{name}" in line for name in options), kind


@pytest.mark.parametrize("name", ["README.md", "docs/suites.md"])
def test_the_suite_file_that_is_shown_loads(name: str, tmp_path: Path) -> None:
    shown = next(body for kind, body in FENCE.findall(page(name)) if kind == "toml")
    path = tmp_path / "my_suite.toml"
    path.write_text(shown, encoding="utf-8")
    suite, _ = load_suite(str(path))
    assert len(suite.domains) == 3
