"""Toy stages for the engine tests: `execute` runs in a stage process and looks at its kind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.engine import process
from posttrain.engine.errors import ConfigError, Waiting
from posttrain.engine.process import Job
from posttrain.engine.work import add_warning, read_step, write_step


def execute(job: Job) -> dict[str, float]:
    """Dispatch on the kind; every run leaves one line in the ledger, so a test can count runs."""
    if "ledger" in job.runtime:
        with open(job.runtime["ledger"], "a") as file:
            file.write(f"{job.name}\n")
    return KINDS[job.kind](job)


def add(job: Job) -> dict[str, float]:
    """Sum of `value` and of the inputs, into value.txt."""
    inputs = [float(Path(path, "value.txt").read_text()) for path in job.inputs.values()]
    value = float(job.config.get("value", 0)) + sum(inputs)
    Path(job.out, "value.txt").write_text(str(value))
    print(f"the value is {value}")
    return {"value": value}


def meet(job: Job) -> dict[str, float]:
    """Wait until a stage beside this one is alive, too: ends well only when both run at once."""
    here = Path(job.runtime["meeting"])
    (here / job.name).touch()
    deadline = time.monotonic() + job.config["patience"]
    while len(list(here.iterdir())) < 2:
        if time.monotonic() > deadline:
            return {"met": 0.0}
        time.sleep(0.01)
    return {"met": 1.0}


def steps(job: Job) -> dict[str, float]:
    """Count to `steps`, a checkpoint each; at `pause_at` (runtime) wait to be ended."""
    work = Path(job.work)
    done = read_step(work) or 0
    total = (work / "sum.txt").read_text() if done else "0"
    for step in range(done + 1, job.config["steps"] + 1):
        with (work / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "total": job.config["steps"]}) + "\n")
        if step == job.runtime.get("pause_at"):
            (work / "pid").write_text(str(os.getpid()))
            Path(job.out, "half.txt").write_text("half")
            time.sleep(60)
        total = str(int(total) + step)
        (work / "sum.txt").write_text(total)
        write_step(work, step)
    Path(job.out, "half.txt").unlink(missing_ok=True)
    Path(job.out, "value.txt").write_text(total)
    return {"value": float(total), "first_step": done + 1.0}


def pause(job: Job) -> dict[str, float]:
    """Write half an output, no checkpoint, and stay."""
    Path(job.out, "half.txt").write_text("half")
    Path(job.work, "pid").write_text(str(os.getpid()))
    if job.runtime.get("stay", True):
        time.sleep(60)
    return {"files_at_start": 0.0}


def nest(job: Job) -> dict[str, float]:
    """Stay, beside a process of its own that stays as well."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(job.work, "pid").write_text(str(child.pid))
    child.wait()
    return {}


def crash(job: Job) -> dict[str, float]:
    print("about to divide")
    return {"value": 1 / job.config["by"]}


def refuse(job: Job) -> dict[str, float]:
    raise ConfigError("steps: 0 is less than 1; give at least 1")


def die(job: Job) -> dict[str, float]:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave(job: Job) -> dict[str, float]:
    """End the process without a word, as a crashed library does."""
    os._exit(3)


def fill(job: Job) -> dict[str, float]:
    """Find the disk full, as a library does that wraps the system's error in one of its own."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RuntimeError("cannot write the file") from error


def brim(job: Job) -> dict[str, float]:
    """Leave no room for the result."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    process.write_whole = full
    return {"value": 1.0}


def report(job: Job) -> dict[str, float]:
    """What a stage sees of its job."""
    Path(job.out, "job.json").write_text(
        json.dumps(
            {
                "threads": job.threads,
                "environment": os.environ.get("TOY_SETTING"),
                "config": job.config,
                "main": sys.modules["__main__"].__dict__.get("__file__"),
            }
        )
    )
    return {"loss": float("nan"), "threads": float(job.threads)}


def forge(job: Job) -> dict[str, float]:
    Path(job.out, "record.json").write_text("{}")
    return {}


def babble(job: Job) -> dict[str, float]:
    """Progress lines, one no JSON, the last one without its end."""
    Path(job.work, "metrics.jsonl").write_text('not json\n{"step": 1}\n{"step"')
    return {}


def wait(job: Job) -> dict[str, float]:
    """Ask for a number in a file, and wait until it is there."""
    path = Path(job.runtime["file"])
    if not path.exists():
        path.touch()
    text = path.read_text()
    if not text:
        raise Waiting(f"write a number into {path}", file=path)
    Path(job.out, "value.txt").write_text(text)
    return {"value": float(text)}


def warn(job: Job) -> dict[str, float]:
    """Two warnings, one of them twice, before the steps of `steps`; then fail if told so."""
    for text in ("nothing is kept", "half is cut off", "nothing is kept"):
        add_warning(Path(job.work), text)
    steps(job)
    return crash(job) if job.config.get("by") == 0 else {}


def chatter(job: Job) -> dict[str, float]:
    """Print 60 MB of lines that count up, then fail."""
    line, count = "x" * 990, 0
    for _ in range(60):
        for _ in range(1000):
            count += 1
            os.write(1, f"{count:8} {line}\n".encode())
    raise RuntimeError("the end")


KINDS = {
    "chatter": chatter,
    "warn": warn,
    "wait": wait,
    "babble": babble,
    "add": add,
    "meet": meet,
    "steps": steps,
    "pause": pause,
    "nest": nest,
    "crash": crash,
    "refuse": refuse,
    "die": die,
    "leave": leave,
    "report": report,
    "fill": fill,
    "brim": brim,
    "forge": forge,
}
