"""What a run says when it ends without its target: stages failed, wait for a file, or were
stopped."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from posttrain.engine.errors import Interrupted, StageError, Waiting
from posttrain.engine.running import Failure, Running, Wait
from posttrain.engine.work import read_step


def interrupted(root: Path, running: Iterable[Running]) -> Interrupted:
    """Stopped by the user; `running` are the stages that were at work, `root` is the store."""
    steps = ((stage.job.name, read_step(stage.work.path)) for stage in running)
    where = ", ".join(
        name if step is None else f"{name} (resumes at step {step})" for name, step in steps
    )
    unfinished = f" Not finished: {where}." if where else ""
    return Interrupted(
        f"stopped. What was finished is kept in {root}.{unfinished} "
        f"To go on, run the same command again."
    )


def failed(
    failures: Mapping[str, Failure], waits: Mapping[str, Wait], blocked: Mapping[str, str]
) -> StageError:
    """At least one stage failed. The exit code is the first failure's."""
    lines = [failure.describe(name) for name, failure in failures.items()]
    lines += _waiting(waits) + _blocked(blocked)
    lines.append("What finished is kept; once the cause is mended, run the same command again.")
    first = next(iter(failures.values()))
    return StageError("\n".join(lines), exit_code=first.exit_code)


def unfilled(waits: Mapping[str, Wait], blocked: Mapping[str, str]) -> Waiting:
    """No stage failed, and at least one waits for a file to be filled in."""
    last = "What finished is kept. Once this is filled in, run the same command again."
    return Waiting("\n".join([*_waiting(waits), *_blocked(blocked), last]))


def _waiting(waits: Mapping[str, Wait]) -> list[str]:
    return [f"stage {name} waits: {wait.reason}" for name, wait in waits.items()]


def _blocked(blocked: Mapping[str, str]) -> list[str]:
    return [f"blocked: {name}: {reason}" for name, reason in blocked.items()]
