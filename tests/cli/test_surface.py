"""The surface of the command line, and that it stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import posttrain
from posttrain.cli import app, main

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "reasoning_gym", "datasets", "pyarrow")
RECIPE = {"RECIPE", "--set", "--suite", "--store", "--seed"}
SURFACE = {
    "run": RECIPE
    | {"--jobs", "--device", "--compile", "--memory", "--report", "--no-report", "--log", "--json"},
    "plan": RECIPE | {"--json", "--estimate", "--jobs", "--device", "--memory"},
    "sweep": {"RECIPE", "--axis", "--seeds", "--set", "--suite", "--store", "--split", "--plan"}
    | {"--jobs", "--device", "--compile", "--memory", "--report", "--no-report", "--log", "--json"},
    "eval": {"ARTIFACT", "--tasks", "--include", "--fewshot", "--limit", "--plain", "--system"}
    | {"--max-new-tokens", "--precision", "--seed", "--device", "--memory", "--store", "--json"},
    "recipes": {"--json"},
    "ls": {"--store", "--json"},
    "show": {"ARTIFACT", "--store", "--json"},
    "lineage": {"ARTIFACT", "--store", "--json"},
    "diff": {"ARTIFACT", "--store", "--json"},
    "compare": {"ARTIFACT...", "--store", "--json"},
    "verify": {"ARTIFACT", "--all", "--store", "--json"},
    "watch": {"[STAGE]", "--store", "--follow", "--json"},
    "report": {"[RECIPE|ARTIFACT]", "--set", "--suite", "--store", "--seed", "--report", "--live"},
    "chat": {
        "ARTIFACT|DIR",
        "--prompt",
        "--system",
        "--temperature",
        "--max-new-tokens",
        "--seed",
        "--store",
    },
    "adopt": {"DIR", "--name", "--copy", "--store", "--json"},
    "export": {"ARTIFACT", "DIR", "--dtype", "--merged", "--store", "--json"},
    "push": {"ARTIFACT", "hub:OWNER/NAME", "--dtype", "--merged", "--revision", "--public"}
    | {"--dry-run", "--store", "--json"},
    "gc": {"--keep", "--only", "--unfinished", "--dry-run", "--yes", "--store", "--json"},
}


def names(parameter: Any) -> set[str]:
    options = {option for option in parameter.opts if option.startswith("-")}
    return options or {parameter.metavar}


def test_commands_and_options_are_these() -> None:
    group: Any = typer.main.get_command(app)
    found = {
        name: set().union(*map(names, command.params)) - {"--help"}
        for name, command in group.commands.items()
    }
    assert found == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: posttrain {command}" in text
    group: Any = typer.main.get_command(app)
    unexplained = [p.name for p in group.commands[command].params if not p.help]
    assert unexplained == []


def modules_after(place: Path, *arguments: str) -> set[str]:
    """Modules that a fresh process has loaded at the end of a command."""
    code = (
        "import sys; from posttrain.cli import main; code = main(sys.argv[1:]); "
        "print(); print('LOADED', *{name.split('.')[0] for name in sys.modules}); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("plan", "mopd"),
        ("plan", "mopd", "--json"),
        ("plan", "mini.py", "--suite", "pairs.toml"),
        ("sweep", "mini.py", "--suite", "pairs.toml", "--axis", "steps=1,2", "--plan"),
        ("recipes",),
        ("ls",),
        ("verify",),
    ],
)
def test_reading_loads_nothing_heavy(place: Path, arguments: tuple[str, ...]) -> None:
    loaded = modules_after(place, *arguments)
    assert "typer" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_help_does_without_pydantic_and_jinja(place: Path) -> None:
    assert modules_after(place, "--help").isdisjoint({"pydantic", "jinja2"})


def processor_seconds(command: list[str], place: Path) -> float:
    """Of a child process: other work on the machine adds little to it. The best of three."""
    used = []
    for _ in range(3):
        before = os.times()
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        children = after.children_user + after.children_system
        used.append(children - before.children_user - before.children_system)
    return min(used)


@pytest.mark.parametrize(("arguments", "times"), [(("--help",), 5.0), (("plan", "mopd"), 12.0)])
def test_start_is_quick(place: Path, arguments: tuple[str, ...], times: float) -> None:
    """In starts of Python with what such a command line imports at least: .09 s in quiet."""
    bare = processor_seconds([sys.executable, "-c", "import typer.main, rich.console"], place)
    started = processor_seconds([sys.executable, "-m", "posttrain", *arguments], place)
    assert started < times * bare


def test_without_a_command_there_is_the_help(cli: Callable[..., Any]) -> None:
    result = cli()
    assert result.code == 0
    assert "Usage: posttrain" in result.out


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"posttrain {posttrain.__version__}\n"


def test_the_package_gives_its_names_when_asked() -> None:
    from posttrain.recipe import Recipe

    assert posttrain.Recipe is Recipe
    assert set(posttrain.__all__) <= set(dir(posttrain))
    with pytest.raises(AttributeError, match="no attribute 'Recipes'"):
        _ = posttrain.Recipes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plna",), ["plna", "plan"]),
        (("run",), ["RECIPE"]),
        (("run", "mopd", "--jobs", "0"), ["--jobs"]),
        (("run", "mopd", "--job", "1"), ["--job", "--jobs"]),
        (("plan", "mopd", "--seed", "one"), ["--seed", "integer"]),
        (("adopt", "somewhere"), ["--name"]),
    ],
)
def test_usage_errors(
    cli: Callable[..., Any], arguments: tuple[str, ...], words: list[str]
) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert all(word in result.err for word in words)
    assert "Traceback" not in result.err
