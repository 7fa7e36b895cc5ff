"""Scores of a model on tasks of lm-eval, answered by posttrain's own sampler and scorer.

What was answered is kept in the stage's directory as it comes, so that a stage that was stopped
goes on where it was. lm-eval is imported when it is needed: `pip install 'posttrain[eval]'`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError, StageError, choices_text
from posttrain.engine.fingerprint import digest, file_digest
from posttrain.engine.jsonl import write_jsonl
from posttrain.stages.context import Context
from posttrain.stages.settings.models import Harness

SCORES, SAMPLES = "harness.json", "samples.jsonl"
ANSWERS = "answers.jsonl"
EXTRA = "needs lm-eval; pip install 'posttrain[eval]'"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that were asked for, as they are now."""

    names: tuple[str, ...]
    include: str
    """The directory of the user's own tasks; empty for none."""
    digest: str
    """Of their definitions, of the local files they read, and of lm-eval's version."""
    version: str
    """Of lm-eval."""


def find_tasks(asked: Sequence[str], include: Path | None = None) -> Tasks:
    """The tasks of these names, of lm-eval's own and of the .yaml files in `include`.

    A path to a .yaml file stands for the task in it. Loads what the tasks read. Raises ConfigError
    without lm-eval, for a name that it does not know, and for tasks that run code of the model.
    """
    lm_eval = harness_library()
    names = list(asked)
    for place, name in enumerate(names):
        if name.endswith((".yaml", ".yml")):
            path = Path(name)
            if not path.is_file():
                raise ConfigError(f"--tasks {name}: no such file")
            if include is not None and include.resolve() != path.resolve().parent:
                raise ConfigError(f"--tasks {name}: it is not in --include {include}")
            include = path.resolve().parent
            names[place] = _task_in(path)
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include {include}: no such directory")
    manager = _manager(include, names)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--tasks {name}: lm-eval {lm_eval.__version__} has no such task; "
                f"{choices_text(name, known)}"
            )
    definitions = {}
    for name, task in _loaded(manager, names).items():
        config = task.dump_config()
        if config.get("unsafe_code"):
            raise ConfigError(f"--tasks {name}: it runs code that the model writes; leave it out")
        definitions[name] = _stable(config)
    return Tasks(
        names=tuple(names),
        include="" if include is None else str(include.resolve()),
        digest=digest([lm_eval.__version__, definitions, _files(include)]),
        version=lm_eval.__version__,
    )


def harness_library() -> Any:
    """The module lm_eval. Raises ConfigError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(f"posttrain eval {EXTRA} ({error})") from None
    return lm_eval


def run(settings: Harness, ctx: Context) -> dict[str, float]:
    """Write harness.json, the scores by task, and samples.jsonl, what was asked and answered."""
    lm_eval = harness_library()
    # Its class derives from one of lm-eval.
    from posttrain.stages.harness_model import Answers, HarnessModel

    include = ctx.runtime.get("include") or None
    manager = _manager(None if include is None else Path(include), settings.tasks)
    model = HarnessModel(
        lambda: ctx.sampler("model", precision=settings.precision),
        ctx.scorer("model", precision=settings.precision),
        settings,
        answers=Answers(ctx.work / ANSWERS),
        ctx=ctx,
    )
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(settings.tasks),
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            system_instruction=settings.system or None,
            bootstrap_iters=settings.bootstrap,
            task_manager=manager,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise StageError(f"lm-eval could not score {', '.join(settings.tasks)}: {error}") from error
    tasks = dict(task_scores(found))
    scores = {"lm_eval": lm_eval.__version__, "tasks": tasks}
    (ctx.out / SCORES).write_text(json.dumps(scores, indent=1), encoding="utf-8")
    write_jsonl(ctx.out / SAMPLES, samples_of(found))
    first = {
        f"{name}/{metric}": row["value"]
        for name, task in tasks.items()
        for metric, row in list(task["metrics"].items())[:1]
    }
    return {"tasks": len(tasks), **first}


def task_scores(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Task or group -> its `metrics` ({name: value, stderr (None where unknown)}), `problems`,
    `fewshot` and `version`, from what lm-eval returns."""
    problems = found.get("n-samples", {})
    results = {**found["results"], **(found.get("groups") or {})}
    for name, row in results.items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not filtered or not number or metric.endswith("_stderr"):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            title = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[title] = {"value": float(value), "stderr": float(stderr) if known else None}
        if metrics:
            yield (
                name,
                {
                    "metrics": metrics,
                    "problems": (problems.get(name) or {}).get("effective"),
                    "fewshot": (found.get("n-shot") or {}).get(name),
                    "version": (found.get("versions") or {}).get(name),
                },
            )


def samples_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each question: task, number, what was asked and answered, target and metrics."""
    rows = []
    for task, samples in (found.get("samples") or {}).items():
        for sample in samples:
            names = [name for name in sample.get("metrics", []) if name in sample]
            rows.append(
                {
                    "task": task,
                    "number": sample["doc_id"],
                    "asked": [list(map(str, one)) for one in _arguments(sample)],
                    "answered": json.loads(json.dumps(sample["filtered_resps"], default=str)),
                    "target": str(sample["target"]),
                    "metrics": {
                        name: json.loads(json.dumps(sample[name], default=str)) for name in names
                    },
                }
            )
    return rows


def _arguments(sample: Mapping[str, Any]) -> list[Sequence[Any]]:
    arguments = sample["arguments"]
    if isinstance(arguments, Mapping):
        return [list(one.values()) for one in arguments.values()]
    return list(arguments)


def _manager(include: Path | None, names: Sequence[str]) -> Any:
    """What knows the tasks; those of lm-eval, which take seconds to list, only where they are
    asked for."""
    harness_library()
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def _loaded(manager: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """The tasks themselves, those of groups one by one. Raises ConfigError for what a task reads
    and cannot be had."""
    try:
        tasks: Mapping[str, Any] = manager.load(list(names))["tasks"]
    # A stranger's code and data: there is nothing that could not be raised over them.
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--tasks {','.join(names)}: lm-eval cannot load what they read ({said}); check the "
            "names, the files of the tasks, and the connection to the Hub"
        ) from error
    return tasks


def _task_in(path: Path) -> str:
    """The name of the task that a .yaml file describes."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == "task" and value.strip():
            return value.strip().strip("'\"")
    raise ConfigError(f"--tasks {path}: it names no task (a line `task: NAME`)")


def _stable(config: Any) -> Any:
    """A definition without what differs between processes: functions by their names."""
    if isinstance(config, Mapping):
        return {str(key): _stable(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_stable(value) for value in config]
    if callable(config):
        return getattr(config, "__qualname__", type(config).__name__)
    return config if isinstance(config, str | int | float | bool | None) else str(config)


def _files(include: Path | None) -> dict[str, str]:
    """The files beside the user's own tasks: their code and their data."""
    if include is None:
        return {}
    return {
        str(path.relative_to(include)): file_digest(path)
        for path in sorted(include.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
