"""The engine stands alone: nothing but the standard library, no word of what stages compute."""

import re
import subprocess
import sys
from pathlib import Path

import posttrain.engine

ENGINE = Path(posttrain.engine.__file__).parent


def test_the_engine_imports_the_standard_library_only() -> None:
    modules = sorted(f"posttrain.engine.{path.stem}" for path in ENGINE.glob("*.py"))
    # The parent package stands in as an empty one, so that only the engine is looked at.
    code = (
        "import sys, types\n"
        "package = types.ModuleType('posttrain')\n"
        f"package.__path__ = [{str(ENGINE.parent)!r}]\n"
        "sys.modules['posttrain'] = package\n"
        "before = set(sys.modules)\n"
        f"for name in {modules}: __import__(name)\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    # Without -S, files in site-packages could load modules into every interpreter at its start.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"posttrain", "multiprocessing", "fcntl"} <= loaded
    # multiprocessing adds __mp_main__, another name of __main__.
    assert loaded - sys.stdlib_module_names <= {"posttrain", "__mp_main__"}


def test_the_engine_does_not_know_what_stages_compute() -> None:
    pattern = re.compile(r"\b(model|token|teacher|gpu)\b", re.IGNORECASE)
    found = [
        f"{path.name}:{number}: {line}"
        for path in sorted(ENGINE.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
