"""Runners in processes of their own: killed, interrupted, two at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.engine import ancestry
from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.runner import run
from posttrain.engine.store import Store

PATIENCE = 20.0

# Without an `if __name__` guard on purpose: stages do not import the program of the user.
PROGRAM = """
import json, sys
from posttrain.engine.errors import PosttrainError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.runner import run
from posttrain.engine.store import Store
nodes = {n["name"]: Node(**n) for n in json.loads(sys.argv[2])}
graph = Graph(nodes=nodes, target=list(nodes)[-1])
try:
    for event in run(graph, Store(sys.argv[1]), execute=sys.argv[3], jobs=2):
        print(event.kind, event.name, flush=True)
except PosttrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(store: Store, toys: str, tmp_path: Path) -> Iterator[Launch]:
    """Start a runner on the store, for a graph whose target is the last node."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def launch(*nodes: dict[str, object]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, str(program), str(store.root), json.dumps(nodes), toys],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(posttrain.__file__).parents[1])},
            # As a shell does: Ctrl-C reaches the group, not only the runner.
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def pid_of(path: Path) -> int:
    """Pid a toy stage has written, once it is there."""
    wait_for(lambda: path.exists() and path.read_text(), str(path))
    return int(path.read_text())


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def graph_of(*nodes: dict[str, object]) -> Graph:
    made = {str(node["name"]): Node(**node) for node in nodes}  # type: ignore[arg-type]
    return Graph(nodes=made, target=list(made)[-1])


COUNT: dict[str, object] = {"name": "count", "kind": "steps", "config": {"steps": 5}}
PAUSED: dict[str, object] = {**COUNT, "runtime": {"pause_at": 4}}


def check_resume(store: Store, toys: str) -> None:
    """No half artifact; the work goes on at its checkpoint, to the result of an undisturbed run."""
    graph = graph_of(COUNT)
    assert store.list() == []
    [row] = plan(graph, store)
    assert row.reason == "resumes at step 3"
    events = list(run(graph, store, execute=toys))
    # The threads of a killed stage end one by one: the lock may be held a moment longer.
    assert [e.payload["step"] for e in events if "step" in e.payload] == [4, 5]
    artifact = store.resolve("count")
    assert artifact.metrics == {"value": 15.0, "first_step": 4.0}
    assert set(artifact.files) == {"metrics.jsonl", "value.txt"}
    assert ancestry.verify(store, artifact) == []


def test_a_killed_stage_resumes(store: Store, launch: Launch, toys: str) -> None:
    runner = launch(PAUSED)
    os.kill(
        pid_of(store.work_path(graph_of(COUNT).fingerprints()["count"]) / "pid"), signal.SIGKILL
    )
    output, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 1
    assert "stage count failed: its process was ended by signal 9" in output
    check_resume(store, toys)


def test_a_killed_runner_takes_its_stages_along(store: Store, launch: Launch, toys: str) -> None:
    runner = launch(PAUSED)
    stage = pid_of(store.work_path(graph_of(COUNT).fingerprints()["count"]) / "pid")
    runner.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    runner.wait()
    wait_for(lambda: not alive(stage), "the end of the stage")
    assert time.monotonic() - killed < 5.0
    check_resume(store, toys)


def test_the_next_run_waits_for_the_stage_of_a_killed_one(
    store: Store, launch: Launch, toys: str
) -> None:
    """The stage shares the lock: while it lives, nobody else gets its work directory."""
    runner = launch(PAUSED)
    fingerprint = graph_of(COUNT).fingerprints()["count"]
    stage = pid_of(store.work_path(fingerprint) / "pid")
    os.kill(stage, signal.SIGSTOP)  # it cannot follow its runner now
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert store.begin(fingerprint, wait=False) is None
    os.kill(stage, signal.SIGCONT)
    wait_for(lambda: not alive(stage), "the end of the stage")
    check_resume(store, toys)


def test_a_stage_killed_without_a_checkpoint_starts_clean(
    store: Store, launch: Launch, toys: str
) -> None:
    node: dict[str, object] = {"name": "long", "kind": "pause"}
    runner = launch(node)
    work = store.work_path(graph_of(node).fingerprints()["long"])
    pid_of(work / "pid")
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert (work / "out" / "half.txt").exists()
    assert store.list() == []
    again = store.begin(graph_of(node).fingerprints()["long"])
    assert again is not None
    assert list(again.out.iterdir()) == []
    again.release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_a_stage_started_ends_with_it(
    store: Store, launch: Launch, number: signal.Signals
) -> None:
    node: dict[str, object] = {"name": "nest", "kind": "nest"}
    runner = launch(node)
    nested = pid_of(store.work_path(graph_of(node).fingerprints()["nest"]) / "pid")
    runner.send_signal(number)
    runner.communicate(timeout=PATIENCE)
    wait_for(lambda: not alive(nested), "the end of the nested process")


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_keeps_the_work(store: Store, launch: Launch, toys: str, whole_group: bool) -> None:
    runner = launch(PAUSED)
    stage = pid_of(store.work_path(graph_of(COUNT).fingerprints()["count"]) / "pid")
    if whole_group:
        os.killpg(runner.pid, signal.SIGINT)
    else:
        runner.send_signal(signal.SIGINT)
    output, _ = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 130
    assert "Traceback" not in output
    assert "Not finished: count (resumes at step 3)." in output
    assert "To go on, run the same command again." in output
    assert not alive(stage)
    check_resume(store, toys)


def test_two_runners_run_a_stage_once(store: Store, launch: Launch, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    nodes: list[dict[str, object]] = [
        {
            "name": f"n{i}",
            "kind": "add",
            "config": {"value": 1},
            "inputs": {"start": f"n{i - 1}"} if i else {},
            "runtime": {"ledger": str(ledger)},
        }
        for i in range(12)
    ]
    runners = [launch(*nodes) for _ in range(3)]
    outputs = [runner.communicate(timeout=60)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0, 0], outputs
    assert sorted(ledger.read_text().split()) == sorted(str(node["name"]) for node in nodes)
    for node in nodes:
        finished = sum(f"finished {node['name']}\n" in text for text in outputs)
        cached = sum(f"cached {node['name']}\n" in text for text in outputs)
        assert (finished, cached) == (1, 2)
    last = store.resolve("n11")
    assert last.metrics == {"value": 12.0}
    assert ancestry.verify(store, last) == []
    assert list((store.root / "work").iterdir()) == []


SLOW_IMPORT = """
import os, sys
with open(os.environ["IMPORT_LEDGER"], "a") as file:
    file.write("imported\\n")
def execute(job):
    return {}
"""


def test_preloaded_modules_are_imported_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT)
    ledger = tmp_path / "imports"
    program = PROGRAM.replace("jobs=2", "jobs=2, preload=['slow_import']")
    nodes = [{"name": name, "kind": "k", "config": {"n": name}} for name in ("a", "b", "c")]
    end = {"name": "end", "kind": "k", "inputs": {name: name for name in ("a", "b", "c")}}
    path = os.pathsep.join([str(Path(posttrain.__file__).parents[1]), str(tmp_path)])
    # Read from standard input: there is no file that a stage process could import as __main__.
    subprocess.run(
        [sys.executable, "-", str(store.root), json.dumps([*nodes, end]), "slow_import:execute"],
        input=program,
        text=True,
        check=True,
        capture_output=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": path, "IMPORT_LEDGER": str(ledger)},
    )
    assert len(store.list()) == 4
    assert ledger.read_text() == "imported\n"
