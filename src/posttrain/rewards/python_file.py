"""The verifier `python:<file.py>:<function>`: a user's own function `(response, problem) -> float`.

The bytes of the file are part of the domain's identity and a copy of it goes into the domain's
artifact, so the file has to stand alone: it may import installed packages, not its neighbours.
The function's name and the imports are read from the source text, so a plan runs no user code.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.engine.errors import ConfigError, StageError, choices_text, said_by
from posttrain.engine.fingerprint import file_digest


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
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise ConfigError(f"{where}: {path}, line {error.lineno}: {error.msg}") from error
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
    function: Callable[[str, dict[str, Any]], Any]

    def score(self, response: str, problem: Mapping[str, Any]) -> float:
        """The function's value: a bool, or a number in [0, 1].

        Raises:
            StageError: the function raises or returns anything else; it names the file, the
                function and the problem.
        """
        subject = f"{self.shown}: {self.function_name}() on problem {problem['id']}"
        try:
            value = self.function(response, dict(problem))
        except (Exception, SystemExit) as error:
            line = line_in(error, self.file)
            raise StageError(
                f"{subject} raised {type(error).__name__}: {error}{line}; response was "
                f"{response[:200]!r}. Return 0.0 for a response that cannot be read"
            ) from error
        number = _as_number(value)
        if number is None or not 0.0 <= number <= 1.0:
            raise StageError(
                f"{subject} returned {value!r} ({type(value).__name__}); "
                "it has to return a bool or a number from 0 to 1"
            )
        return number

    def check(self, problem: Mapping[str, Any]) -> None:
        """Nothing to check: only the function itself knows which problems it can judge."""


def _as_number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


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
        raise ConfigError(
            f"{shown or path}: loading the {what} failed: {said_by(error)}"
            f"{line_in(error, str(path))}"
        ) from error
    return module


def python_verifier(path: Path, function: str, *, shown: str | None = None) -> PythonVerifier:
    """Loads the file and takes `function` from it; `shown` is what messages call the file.

    Raises:
        ConfigError: as `check_file`, or the file fails while it is being loaded.
    """
    check_file(path, function, where=f"verifier python:{path.name}:{function}", arguments=2)
    name = f"posttrain_verifier_{file_digest(path)[:16]}"
    module = load_file(path, name=name, what="verifier", shown=shown)
    return PythonVerifier(
        file=str(path),
        shown=shown or str(path),
        function_name=function,
        function=getattr(module, function),
    )
