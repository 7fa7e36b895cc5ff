"""The documentation against the code: what it shows exists, and what exists is in it."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from posttrain import algorithms
from posttrain.algorithms import Custom
from posttrain.cli import app
from posttrain.engine.store import Store
from posttrain.judges import Judge
from posttrain.language.loader import load_recipe, shipped_recipes
from posttrain.report.curves import COUNTERS, METRICS
from posttrain.rewards.spec import OPTIONS
from posttrain.stages.kinds import KINDS, Kind, kind_of
from posttrain.suites.load import load_suite
from posttrain.values import Settings, changing_fields, default_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \|( yes)? \| ", re.MULTILINE)
CHOICE_ROW = re.compile(r"^\| (`[A-Z][\w`, ]+) \| `(\w+)` \| ([^|]+) \|( yes)? \| ", re.MULTILINE)
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
    marked = page("README.md").partition("<!-- RECIPE: src/posttrain/recipes/mopd.py -->\n")[2]
    kind, body = FENCE.findall(marked)[0]
    assert kind == "python" and body.strip() == code


SHOWN = [
    body
    for path in (ROOT / "README.md", ROOT / "docs/language.md")
    for kind, body in FENCE.findall(path.read_text(encoding="utf-8"))
    if kind == "python" and "def recipe(r: Recipe):" in body and "custom(" not in body
]


@pytest.mark.parametrize("body", SHOWN, ids=range(len(SHOWN)))
def test_the_recipes_that_are_shown_plan(body: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.py"
    path.write_text("from posttrain import Recipe\n" + body, encoding="utf-8")
    assert load_recipe(str(path), store=Store(tmp_path / "store")).graph.order()


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
    for name in ("sampled_token", "top_k", "reverse_kl"):
        section = text.partition(f"### `{name}`")[2].partition("\n### ")[0]
        assert "Source" in section and TEST.search(section), name


def chapter(title: str) -> str:
    return page("docs/language.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def shown(field: FieldInfo) -> str:
    """A default as the tables write it: a choice by its kind, everything else as JSON."""
    if field.is_required():
        return "needed"
    default = default_of(field)
    if isinstance(default, Judge):
        return f"`judges.{default.judge}()`"
    if isinstance(default, Settings) and "kind" not in type(default).model_fields:
        return f"`{type(default).__name__}()`"
    return f"`{json.dumps(getattr(default, 'kind', default))}`"


def check_rows(found: Mapping[str, tuple[str, str]], cls: type[BaseModel]) -> None:
    """Name to default and schedule, as documented, against a class of settings."""
    assert sorted(found) == sorted(cls.model_fields)
    changing = changing_fields(cls) if issubclass(cls, Settings) else []
    for name, field in cls.model_fields.items():
        default, schedule = found[name]
        assert default in ("differs", shown(field)), name
        assert schedule.strip() == ("yes" if name in changing else ""), name


def check_settings(kind: Kind, settings: str) -> None:
    """A table of settings belongs to the kinds that its heading names."""
    found: dict[str, tuple[str, str]] = {}
    for section in settings.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        if f"`{kind}`" in heading:
            found |= {name: (default, yes) for name, default, yes in ROW.findall(body)}
    check_rows(found, kind.settings_class())


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if not k.from_outside], ids=str)
def test_every_setting_is_documented_with_its_default(kind: Kind) -> None:
    check_settings(kind, chapter("Settings"))


CHOICES = [
    cls
    for name, cls in vars(algorithms).items()
    if isinstance(cls, type) and issubclass(cls, Settings) and cls not in (Settings, Custom)
]


@pytest.mark.parametrize("cls", CHOICES, ids=lambda cls: cls.__name__)
def test_every_choice_is_documented_with_its_settings(cls: type[Settings]) -> None:
    rows = CHOICE_ROW.findall(chapter("Choices"))
    own = [row for row in rows if f"`{cls.__name__}`" in row[0].split(", ")]
    check_rows({name: (default, yes) for _, name, default, yes in own}, cls)


def test_the_choices_name_nothing_else() -> None:
    named = {n for row in CHOICE_ROW.findall(chapter("Choices")) for n in row[0].split(", ")}
    assert named == {f"`{cls.__name__}`" for cls in CHOICES}


def test_the_settings_of_a_kind_of_ones_own_can_be_checked_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/cli")
    kind = kind_of("own_kind.ECHO")
    text = "\n### `own_kind.ECHO`\n\n| `calls` | `3` | | |\n| `loss` | `0.5` | | |\n"
    check_settings(kind, text)
    changes = {
        "| `loss` | `0.5` | | |": "",
        "`own_kind.ECHO`": "echo",
        "`3`": "`4`",
        "`3` | |": "`3` | yes |",
    }
    for old, new in changes.items():
        with pytest.raises(AssertionError):
            check_settings(kind, text.replace(old, new))
    # Other tests have a copy of that module, which is to be found in its place.
    del sys.modules["own_kind"]


def test_a_default_that_differs_is_told() -> None:
    fields = {k: KINDS[k].settings_class().model_fields for k in ("rl", "distill")}
    defaults = {k: found["aggregation"].default.kind for k, found in fields.items()}
    told = '`aggregation` is `"{rl}"` in `rl` and `"{distill}"` in `distill`.'
    assert told.format(**defaults) in chapter("Settings")


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
