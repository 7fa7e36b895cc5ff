"""The shape of the package: imports point one way, third-party ones have their place, and files,
functions and class hierarchies stay small."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent

# Unit -> the units it may import. A unit is a package, or a module that stands for itself.
ALLOWED: dict[str, set[str]] = {
    "engine": set(),
    "losses": set(),
    "rl": {"losses"},
    "backends.prompting": {"engine"},
    "backends.outside": {"engine"},
    "backends.budget": {"engine", "backends.outside"},
    "backends.given_memory": {"engine"},
    "backends.turn_end": set(),
    "backends.vocabulary": {"engine"},
    "backends.template": {"engine", "backends.prompting"},
    "backends.checkpoint_source": {
        "engine", "backends.outside", "backends.template", "backends.turn_end",
        "backends.vocabulary",
    },
    "rewards": {"engine", "backends.prompting", "schedules"},
    "suites": {"engine", "rewards", "backends.prompting"},
    "stages.kinds": {"engine"},
    "report": {"engine", "stages.kinds"},
    "trackers": {"engine", "report"},
    "backends": {
        "engine", "losses", "rl", "backends.prompting", "backends.outside", "backends.template",
        "backends.budget", "backends.given_memory", "backends.turn_end",
        "backends.vocabulary",
    },
    "schedules": {"engine"},
    "values": {"engine", "schedules"},
    "algorithms": {"engine", "values", "rewards"},
    "judges": {"engine", "schedules", "rewards"},
    "stages.settings": {
        "engine", "schedules", "rewards", "backends.prompting", "algorithms", "values",
    },
    "stages.config": {"engine", "stages.kinds", "values"},
    "stages": {
        "engine", "losses", "rl", "rewards", "suites", "report", "backends", "schedules",
        "algorithms", "values", "stages.settings", "backends.prompting",
        "backends.budget", "backends.checkpoint_source", "backends.outside",
        "backends.vocabulary",
    },
    "stages.adopting": {
        "engine", "backends.checkpoint_source", "backends.outside", "stages", "stages.kinds",
    },
    "stages.step_checkpoint": {
        "engine", "backends.checkpoint_source", "backends.outside", "stages", "stages.adopting",
        "stages.config", "stages.kinds", "stages.worker",
    },
    "stages.worker": {
        "engine", "report", "backends", "backends.outside", "stages", "stages.config",
        "stages.kinds",
    },
    "language": {
        "engine", "rewards", "suites", "schedules", "judges", "values", "algorithms",
        "stages.config", "stages.kinds", "stages.step_checkpoint", "backends.prompting",
        "backends.template", "backends.checkpoint_source",
    },
    "recipe": {
        "engine", "suites", "language", "judges", "stages.kinds",
    },
    "package": {"recipe", "language", "suites", "schedules", "judges", "algorithms"},
    "recipes": {"package", "judges", "schedules", "algorithms"},
    "language.loader": {"engine", "recipe", "language", "suites"},
    "estimate": {
        "engine", "rewards", "suites", "stages.config", "stages.kinds", "backends.budget",
        "backends.given_memory", "backends.outside", "backends.prompting", "backends.template",
    },
    "estimate.calibration": {"estimate"},
    "commands": {
        "engine", "estimate", "report", "backends", "stages", "stages.kinds",
        "stages.step_checkpoint", "stages.worker", "stages.adopting", "recipe", "trackers",
        "language", "language.loader", "backends.budget", "backends.checkpoint_source", 
        "backends.given_memory", "backends.outside", "suites", "estimate.calibration",
    },
    "cli": {"engine", "commands", "package"},
    "__main__": {"cli"},
}  # fmt: skip
ALIASES = {"__init__": "package"}

THIRD_PARTY: dict[str, set[str]] = {
    "engine": set(),
    "losses": {"torch"},
    "rl": {"torch", "numpy"},
    "rewards": {"reasoning_gym", "math_verify", "httpx2", "pydantic", "pydantic_core"},
    "suites": {"datasets", "pyarrow", "pydantic"},
    "algorithms": {"pydantic"},
    "report": {"jinja2", "markupsafe", "pydantic", "rich"},
    "trackers": {"trackio", "wandb", "tensorboard"},
    "backends.outside": {"huggingface_hub", "httpx2", "gguf"},
    "backends.budget": set(),
    "backends.given_memory": set(),
    "estimate": {"tokenizers"},
    "estimate.calibration": {"torch"},
    "backends.checkpoint_source": set(),
    "backends.turn_end": {"jinja2"},
    "backends.vocabulary": set(),
    "backends": {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "jinja2",
        "bitsandbytes",
        "peft",
    },
    "stages.settings": {"pydantic"},
    "stages.config": {"pydantic", "pydantic_core"},
    "stages.kinds": set(),
    "schedules": {"pydantic"},
    "values": {"pydantic"},
    "judges": {"pydantic"},
    "backends.prompting": set(),
    "backends.template": {"jinja2"},
    "stages": {"torch", "numpy", "safetensors", "transformers", "reasoning_gym", "lm_eval"},
    "language": set(),
    "recipe": set(),
    "package": set(),
    "recipes": set(),
    "language.loader": {"pydantic"},
    "stages.adopting": set(),
    "stages.step_checkpoint": {"safetensors"},
    "stages.worker": {"torch"},
    "commands": {"typer", "rich", "safetensors", "transformers", "torch", "tokenizers"},
    "cli": {"typer", "rich"},
    "__main__": set(),
}

FILES = sorted(ROOT.rglob("*.py"))
ids = [str(path.relative_to(ROOT)) for path in FILES]


def unit_of(module: str) -> str:
    """The unit of a module named from the package's root, such as `stages.config`."""
    parts = module.split(".")
    pair = ".".join(parts[:2])
    return pair if pair in ALLOWED else ALIASES.get(parts[0], parts[0])


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything a file imports, inside functions too: kind is own or other."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names = [node.module]
            if node.module == "posttrain":
                modules = [n.name for n in node.names if (ROOT / f"{n.name}.py").exists()]
                modules += [n.name for n in node.names if (ROOT / n.name).is_dir()]
                names = [f"posttrain.{name}" for name in modules] or ["posttrain.__init__"]
        else:
            continue
        for name in names:
            if name == "posttrain":
                # The bare name: to find the package's directory.
                continue
            if name.split(".")[0] == "posttrain":
                yield "own", name.removeprefix("posttrain.")
            elif name.split(".")[0] not in sys.stdlib_module_names:
                yield "other", name.split(".")[0]


def unit_of_file(path: Path) -> str:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return unit_of(module)


def test_the_allowed_directions_have_no_cycle() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED) == set(THIRD_PARTY)


@pytest.mark.parametrize("package", ["engine", "language"])
def test_the_files_of_a_package_import_each_other_without_a_circle(package: str) -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / package).glob("*.py")):
        found[f"{package}.{path.stem}"] = {
            name for kind, name in imports(path) if kind == "own" and name.startswith(package)
        }
    list(TopologicalSorter(found).static_order())


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    unit = unit_of_file(path)
    assert unit in ALLOWED, f"{path}: give the unit {unit!r} its place in ALLOWED"
    for kind, name in imports(path):
        if kind == "own":
            other = unit_of(name)
            assert other == unit or other in ALLOWED[unit], f"{unit} may not import {name}"
        else:
            assert name in THIRD_PARTY[unit], f"{unit} may not import {name}"


def named(pattern: str, *packages: str) -> list[str]:
    """`file: words` for every place in these packages that the pattern matches."""
    return [
        f"{path.relative_to(ROOT)}: {found}"
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        for found in re.findall(pattern, path.read_text(encoding="utf-8"))
    ]


def test_stages_and_commands_name_no_backend() -> None:
    """But for the one that is taken where a job names none."""
    found = named(r"\bLocal[A-Z]\w*|\bbackends\.local\b", "stages", "commands")
    assert found == ["stages/worker.py: backends.local", "stages/worker.py: LocalBackend"]


def test_stages_leave_rows_and_devices_to_batches_and_backends() -> None:
    assert named(r"\bflat_index\b|\bstart_B\b|\bindex_B\b|\.to\(device\b", "stages") == []


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_imports_from_tests(path: Path) -> None:
    assert not {name for _, name in imports(path)} & {"tests", "conftest", "pytest"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{node.name} has too many lines"


def test_classes_inherit_one_level_deep() -> None:
    """Errors apart: they form one small tree that users catch by its root."""
    bases: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]

    def depth(name: str) -> int:
        return 1 + max(map(depth, own)) if (own := [b for b in bases[name] if b in bases]) else 0

    errors = {name for name in bases if name.endswith(("Error", "Interrupted"))}
    deep = {name: depth(name) for name in bases.keys() - errors if depth(name) > 1}
    assert deep == {}
    assert all(depth(name) <= 2 for name in errors)


def test_modules_and_public_names_are_documented() -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            bare.append(str(path.relative_to(ROOT)))
        if path.parent.name == "recipes":
            # Their module docstring says what recipe() is; the file is to be read as a whole.
            continue
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            # The docstring of a command is its help text, and not every command has a text.
            or (isinstance(node, ast.FunctionDef) and not node.decorator_list)
        ]
        bare += [
            f"{path.relative_to(ROOT)}: {node.name}"
            for node in public
            if not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert bare == []
