"""From the words of a command to a graph: find the recipe, take in --set, run the function.

A recipe file is the user's program. It is compiled from its text every time (a compiled copy beside
it could be stale within the same second), and whatever goes wrong in it is told with its own file
and line, never with a traceback through this package.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from posttrain.engine.errors import (
    ConfigError,
    PosttrainError,
    choices_text,
    said_by,
    shortened,
)
from posttrain.engine.graph import Graph
from posttrain.engine.store import Store
from posttrain.language.calls import OTHER_VERBS, mistaken
from posttrain.language.handles import Stage, Warned
from posttrain.recipe import Recipe
from posttrain.suites.load import load_suite, suite_file

PACKAGE = Path(__file__).parents[1]

RECIPES = PACKAGE / "recipes"
"""Where the shipped recipes are, one file each."""

DEFAULT_SUITE = "core"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A recipe with its settings, and the graph that came of it."""

    name: str
    """Shipped name, or the name of the file without .py."""
    path: Path
    graph: Graph
    suite: str
    seed: int
    settings: Mapping[str, Any]
    """What --set said: parameters of the recipe and `stage.field` alike."""
    sources: tuple[Path, ...]
    """Directories of the code and the data description that made it, for the provenance."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The file of the recipe and that of the suite, for the same."""
    warnings: tuple[Warned, ...] = ()
    """What is to be told about the recipe, though it can be run."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a recipe file says about itself."""

    summary: str
    """First line of its docstring."""
    source: str
    """What follows "Source:" in it; empty without that line."""


def load_recipe(
    spec: str,
    *,
    store: Store,
    settings: Sequence[str] = (),
    suite: str | None = None,
    seed: int | None = None,
    of_kinds: Mapping[str, Mapping[str, Any]] | None = None,
) -> Loaded:
    """The graph of a recipe: a shipped name, or a path to a .py file with `recipe(r, ...)`.

    `settings` are texts `key=value`, a later one overrides an earlier one. The value is JSON, or
    else a string. A key with a dot is `stage.field` (the stage may be a glob), another one is a
    parameter of the recipe function, `suite` or `seed`. `of_kinds` has settings of all stages of a
    kind, which go before what the recipe says and after what `settings` say.

    Raises:
        ConfigError: no such recipe, a mistake in its file, an unknown or ill-typed setting.
        GraphError: a cycle, two stages of one name.
    """
    path = find_recipe(spec)
    name = path.stem
    given = dict(_split(text) for text in settings)
    suite = _agree("suite", suite, given.pop("suite", None)) or DEFAULT_SUITE
    seed_text = given.pop("seed", None)
    seed_set = None if seed_text is None else _convert(seed_text, int, "--set seed")
    seed = _agree("seed", seed, seed_set) or 0
    with _importable(path.parent):
        function = _function(path)
        overrides = {key: _parse(text) for key, text in given.items() if "." in key}
        texts = {key: text for key, text in given.items() if "." not in key}
        parameters = _parameters(function, name, texts)
        described, directory = load_suite(suite)
        recipe = Recipe(
            described, directory, seed=seed, overrides=overrides, of_kinds=of_kinds, store=store
        )
        with _blamed(path):
            target = function(recipe, **parameters)
    if not isinstance(target, Stage):
        raise ConfigError(
            f"{path}: recipe() returned {target!r}; it has to return the stage to be made, for "
            "example `return r.evaluate(...)`"
        )
    graph = recipe.graph(target)
    return Loaded(
        name=name,
        path=path,
        graph=graph,
        suite=suite,
        seed=seed,
        settings=parameters | overrides,
        files={"recipe": path, "suite": suite_file(suite)},
        sources=tuple(dict.fromkeys((path.parent, directory, PACKAGE))),
        warnings=recipe.warnings,
    )


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe in the package."""
    return {path.stem: path for path in sorted(RECIPES.glob("[!_]*.py"))}


def is_recipe(text: str) -> bool:
    """Whether `text` is a recipe's name or file, where an artifact could be meant too."""
    return text in shipped_recipes() or text.endswith(".py")


def find_recipe(spec: str) -> Path:
    """The file of a recipe. Raises ConfigError with the choices when there is none."""
    shipped = shipped_recipes()
    if spec in shipped:
        return shipped[spec]
    path = Path(spec).expanduser().absolute()
    if path.suffix == ".py" and path.is_file():
        return path
    if path.suffix == ".py" or "/" in spec:
        beside = [file.name for file in path.parent.glob("*.py")]
        problem = "is not a .py file" if path.exists() else "does not exist"
        raise ConfigError(
            f"recipe: {path} {problem}; "
            f"{choices_text(path.name, beside, label='.py files in that directory')}"
        )
    raise ConfigError(
        f"recipe: unknown recipe {spec!r}; {choices_text(spec, shipped)}, or a path to a .py file"
    )


def describe(path: Path) -> Description:
    """Summary and source of a recipe file, read without running it."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [line.strip() for line in docstring.splitlines()]
    source = next((line for line in lines if line.startswith("Source:")), "")
    return Description(
        summary=lines[0] if lines else "", source=source.removeprefix("Source:").strip()
    )


# -- the user's file -------------------------------------------------------------------------------


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Let a recipe import the modules beside it, as a script could."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Turn what the code of a recipe file raises into an error that names its line."""
    try:
        yield
    except SyntaxError as error:
        text = f"\n    {error.text.strip()}" if error.text else ""
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}{text}") from error
    except PosttrainError as error:
        if path.parent != RECIPES and (line := _line(path, error)):
            error.add_note(f"in {path}, {line}")
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = f"{path}, {_line(path, error)}"
        said = _misspelt(error) or (mistaken(path, error) if isinstance(error, Exception) else "")
        if said:
            raise ConfigError(f"{where}: {said}") from None
        raise ConfigError(f"{where}: {said_by(error)}") from error


def _misspelt(error: BaseException) -> str:
    """What a name that this package does not have is told: the nearest one; "" for other errors."""
    if isinstance(error, AttributeError):
        owner, name = error.obj, error.name
    elif isinstance(error, ImportError) and error.name in sys.modules:
        owner = sys.modules[error.name]
        found = re.search(r"cannot import name '(\w+)'", str(error))
        name = found and found[1]
    else:
        return ""
    module = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
    if name is None or module.partition(".")[0] != "posttrain":
        return ""
    what = repr(owner) if isinstance(owner, Stage) else module
    what = "r" if isinstance(owner, Recipe) else what
    shown = [n for n in dir(owner) if n[0] != "_"]
    if isinstance(owner, ModuleType):
        # It shows what it imported as well, and typing's names are of no use to a recipe.
        made = {n: str(getattr(getattr(owner, n), "__module__", "")) for n in shown}
        shown = [n for n in shown if made[n].startswith("posttrain")]
    if what == "r":
        shown = [n for n in shown if n != "graph"]
        if name in OTHER_VERBS:
            return f"there is no r.{name}; here it is r.{OTHER_VERBS[name]}"
    return f"there is no {what}.{name}; {choices_text(name, shown)}"


def _line(path: Path, error: BaseException) -> str:
    """The last line of `path` that an error came through, with its number; "" if none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"line {frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""


def _function(path: Path) -> Callable[..., Any]:
    module = ModuleType(f"posttrain_recipe_{path.stem}")
    module.__file__ = str(path)
    with _blamed(path):
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    function = getattr(module, "recipe", None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{path}: it defines no function `recipe(r, ...)`; "
            f"{choices_text('recipe', names, label='functions in it')}"
        )
    found: Callable[..., Any] = function
    return found


# -- settings --------------------------------------------------------------------------------------


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip(". "):
        raise ConfigError(
            f"--set {shortened(text)}: write --set PARAMETER=VALUE or --set STAGE.FIELD=VALUE, for "
            "example --set student.steps=80"
        )
    return key.strip(), value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _agree(name: str, option: Any, setting: Any) -> Any:
    if option is not None and setting is not None and option != setting:
        raise ConfigError(
            f"--{name} {option} and --set {name}={setting} contradict each other; give one of them"
        )
    return setting if option is None else option


def _parameters(
    function: Callable[..., Any], recipe: str, texts: Mapping[str, str]
) -> dict[str, Any]:
    """Values for the recipe's own parameters, checked against their annotations."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ConfigError(
            f"recipe {recipe!r}: its function has to take the builder first: def recipe(r, ...)"
        )
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {p.name: p for p in parameters[1:] if p.kind not in starred}
    for key in texts:
        if key not in known:
            names = choices_text(key, [*known, "suite", "seed"], label="parameters")
            raise ConfigError(
                f"--set {key}={shortened(texts[key])}: recipe {recipe!r} has no parameter {key!r}; "
                f"{names}; a stage's setting is written STAGE.FIELD=VALUE"
            )
    for parameter in known.values():
        if parameter.default is inspect.Parameter.empty and parameter.name not in texts:
            raise ConfigError(
                f"recipe {recipe!r} needs a value for {parameter.name!r}; "
                f"give --set {parameter.name}=VALUE"
            )
    return {
        key: _convert(text, _annotation(function, known[key]), f"--set {key}")
        for key, text in texts.items()
    }


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type that a parameter is annotated with; Any when it has none that can be had now."""
    found = parameter.annotation
    if isinstance(found, str):
        try:
            found = eval(found, function.__globals__)
        except NameError:  # imported for type checkers only
            return Any
    return Any if found is inspect.Parameter.empty else found


def _convert(text: str, annotation: Any, where: str) -> Any:
    """`text` as a value of the annotated type. Raises ConfigError with type or choices."""
    parsed = _parse(text)
    try:
        adapter = TypeAdapter(annotation)
    except PydanticUserError:  # a class of which pydantic knows nothing
        return parsed
    whole = [int(parsed)] if isinstance(parsed, float) and parsed.is_integer() else []
    truth = [text.lower() == "true"] if text.lower() in ("true", "false") else []
    # Any text is a str, so that comes last.
    for value in (parsed, *whole, *truth, text):
        with suppress(ValidationError):
            return adapter.validate_json(json.dumps(value), strict=True)
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    choices = [str(c) for part in parts if get_origin(part) is Literal for c in get_args(part)]
    told = shortened(text)
    if choices:
        raise ConfigError(f"{where}={told}: {choices_text(text, choices)}")
    names = " or ".join(getattr(part, "__name__", str(part)) for part in parts)
    raise ConfigError(f"{where}={told}: {told!r} is not a value of type {names}")
