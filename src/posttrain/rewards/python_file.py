"""The verifier `python:<file.py>:<function>`: a user's own function `(response, problem) -> float`.

The bytes of the file are part of the domain's identity and a copy of it goes into the domain's
artifact, so the file has to stand alone: it may import installed packages, not its neighbours. The
files that it reads it names in a list at its top level, `DATA_FILES = ["table.json"]`; they are
part of the identity and copied with it. All this is read from the source text: a plan runs no user
code.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from posttrain.engine.errors import ConfigError, StageError, choices_text, said_by
from posttrain.engine.fingerprint import file_digest

DATA_FILES = "DATA_FILES"
"""The list in which a file names what it reads."""


def check_file(path: Path, function: str, *, where: str, arguments: int = 0) -> None:
    """Checks a file with a function of the user's own without running it.

    Raises:
        ConfigError: the file is missing, does not parse, does not define `function` at top level,
            imports a file that lies beside it, or its function does not take so many `arguments`
            by position (0: not looked at).
    """
    if not path.is_file():
        raise ConfigError(
            f"{where}: file {path} does not exist; paths are relative to the file that names them"
        )
    tree = _parsed(path, where)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in functions:
        raise ConfigError(
            f"{where}: {path} defines no function {function!r}; "
            f"{choices_text(function, functions, label='functions there')}"
        )
    if arguments and not _takes(functions[function].args, arguments):
        raise ConfigError(
            f"{where}: {path}, line {functions[function].lineno}: {function}() has to take "
            f"{arguments} values; it is called as {function}(response, problem)"
        )
    for node in ast.walk(tree):
        for name in _imported(node):
            beside = path.parent / name
            if (
                name == ""
                or beside.with_suffix(".py").is_file()
                or (beside / "__init__.py").is_file()
            ):
                raise ConfigError(
                    f"{where}: {path}, line {getattr(node, 'lineno', 0)}: a file of your own must "
                    "stand alone, because its text is part of the identity, but it imports "
                    f"{name or 'its own package'!r} from beside it; move that code into "
                    f"{path.name} or install it as a package"
                )


def data_files(path: Path, *, where: str) -> dict[str, Path]:
    """Name -> place of the files that a checked file declares in `DATA_FILES`, beside it or below.

    Raises ConfigError for a declaration that is no plain list of texts, or for a file that is not
    there.
    """
    for node in _parsed(path, where).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == DATA_FILES for target in targets):
            break
    else:
        return {}
    at = f"{where}: {path}, line {node.lineno}: {DATA_FILES}"
    try:
        names = ast.literal_eval(getattr(node, "value", None))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        names = None
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(f'{at} has to be a plain list of texts, such as ["table.json"]')
    found = {}
    for name in names:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or name == path.name:
            raise ConfigError(
                f"{at}: {name!r} has to lie beside {path.name} or below, and be named from there"
            )
        # Unlike Path.is_file, false also for a name that the system does not take.
        if not os.path.isfile(path.parent / place):
            raise ConfigError(f"{at}: there is no file {path.parent / place}")
        found[place.as_posix()] = path.parent / place
    return found


def _parsed(path: Path, where: str) -> ast.Module:
    """The source of a user's file as a tree. Raises ConfigError where Python cannot read it."""
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ConfigError(f"{where}: {path}{line}: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError, OSError) as error:
        raise ConfigError(f"{where}: {path} cannot be read as Python ({said_by(error)})") from error


def _takes(found: ast.arguments, count: int) -> bool:
    """Whether a function can be called with so many values by position, and nothing else."""
    placed = len(found.posonlyargs) + len(found.args)
    needed = placed - len(found.defaults)
    named = any(default is None for default in found.kw_defaults)
    return needed <= count and (count <= placed or found.vararg is not None) and not named


def _imported(node: ast.AST) -> list[str]:
    """Top-level names that an import statement asks for; "" for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [""] if node.level else [(node.module or "").split(".")[0]]
    return []


@dataclass(frozen=True, kw_only=True)
class PythonVerifier:
    """Calls the user's function; build it with `python_verifier`."""

    file: str
    """The file that is run: a copy, where it stands in a domain's artifact."""
    shown: str
    """What messages call it: the user's own file."""
    function_name: str
    function: Callable[..., Any]

    names: tuple[str, ...] = ()
    """What it is given by name besides."""

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """The function's value: a bool, or a number in [0, 1]. Raises StageError as `number`."""
        return self.number(response, problem, {}, lambda n: 0 <= n <= 1, "a number from 0 to 1")

    def number(
        self,
        response: str,
        problem: Mapping[str, Any],
        given: Mapping[str, Any],
        fits: Callable[[float], bool],
        wanted: str,
    ) -> float:
        """What the function returns; `given` has the values for its `names`.

        Raises:
            StageError: the function raises, or returns anything but a bool or a number that
                `fits`; it names the file, the function and the problem.
        """
        subject = f"{self.shown}: {self.function_name}() on problem {problem['id']}"
        try:
            value = self.function(response, dict(problem), **{n: given[n] for n in self.names})
        except (Exception, SystemExit) as error:
            line = line_in(error, self.file)
            raise StageError(
                f"{subject} raised {type(error).__name__}: {error}{line}; response was "
                f"{response[:200]!r}. {advice_on(error) or BY_ITSELF}"
            ) from error
        number = _as_number(value)
        if number is None or not fits(number):
            raise StageError(
                f"{subject} returned {value!r:.200} ({type(value).__name__}); "
                f"it has to return a bool or {wanted}"
            )
        return number

    def check(self, problem: Mapping[str, Any]) -> None:
        """Nothing to check: only the function itself knows which problems it can judge."""


def _as_number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


BY_ITSELF = "Return 0.0 for a response that cannot be read"


def advice_on(error: BaseException) -> str:
    """What to do where a user's file does not find another one: its copy runs elsewhere."""
    if not isinstance(error, FileNotFoundError) or not error.filename:
        return ""
    name = Path(os.fsdecode(error.filename)).name
    return (
        f"A copy of the file runs, in another directory: name {name!r} in DATA_FILES at the top "
        f'level (DATA_FILES = ["{name}"]) and open it as Path(__file__).parent / "{name}"'
    )


def line_in(error: BaseException, file: str) -> str:
    """` (line 12)`: the deepest frame of the traceback that lies in the user's file."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f" (line {line})" if line else ""


def load_file(path: Path, *, name: str, what: str, shown: str | None = None) -> ModuleType:
    """Runs a user's file as a module called `name`.

    In messages it is the `what` (suite, verifier) of the file that is called `shown` there.

    Raises:
        ConfigError: the file fails while it is being loaded, or raises one itself.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name while the file is being executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ConfigError, KeyboardInterrupt):
        del sys.modules[name]
        raise
    except BaseException as error:
        del sys.modules[name]
        # A suite runs where it lies.
        advice = "" if what == "suite" else advice_on(error)
        raise ConfigError(
            f"{shown or path}: loading the {what} failed: {said_by(error)}"
            f"{line_in(error, str(path))}{advice and f'. {advice}'}"
        ) from error
    return module


def python_verifier(
    path: Path, function: str, *, shown: str | None = None, names: tuple[str, ...] = ()
) -> PythonVerifier:
    """Loads the file and takes `function` from it; `shown` is what messages call the file, `names`
    what the function is given by name.

    Raises:
        ConfigError: as `check_file`, or the file fails while it is being loaded.
    """
    arguments = 0 if names else 2
    check_file(path, function, where=f"python:{path.name}:{function}", arguments=arguments)
    name = f"posttrain_verifier_{file_digest(path)[:16]}"
    module = load_file(path, name=name, what="verifier", shown=shown)
    return PythonVerifier(
        file=str(path),
        shown=shown or str(path),
        function_name=function,
        function=getattr(module, function),
        names=names,
    )
