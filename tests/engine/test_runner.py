"""Running graphs of toy stages: what runs, in what order, how failures end."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine import ancestry
from posttrain.engine import store as store_module
from posttrain.engine.errors import ConfigError, GraphError, Interrupted, StageError
from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.provenance import Provenance
from posttrain.engine.runner import Event, run
from posttrain.engine.store import Store
from posttrain.engine.work import read_warnings, write_step

MakeGraph = Callable[..., Graph]
RunAll = Callable[..., list[Event]]


def collect(
    graph: Graph, store: Store, execute: str, **options: Any
) -> tuple[list[Event], str, int]:
    """Events of a run that fails, the message and the exit code."""
    events = []
    with pytest.raises(StageError) as caught:
        for event in run(graph, store, execute=execute, **options):
            events.append(event)
    return events, str(caught.value), caught.value.exit_code


def of_kind(events: list[Event], kind: str) -> list[str]:
    return [event.name for event in events if event.kind == kind]


def test_a_chain_runs_and_is_cached_afterwards(store: Store, chain: Graph, run_all: RunAll) -> None:
    events = run_all(chain)
    assert [(e.kind, e.name) for e in events] == [
        (kind, name) for name in ("first", "second", "third") for kind in ("started", "finished")
    ]
    third = store.resolve("third")
    assert third.metrics == {"value": 6.0}
    assert third.file("value.txt").read_text() == "6.0"
    assert events[-1].payload == {"metrics": {"value": 6.0}, "path": str(third.path)}
    assert ancestry.verify(store, third) == []
    assert list((store.root / "work").iterdir()) == []
    assert [e.kind for e in run_all(chain)] == ["cached"] * 3


def test_an_edit_reruns_exactly_the_stage_and_its_descendants(
    store: Store, make_graph: MakeGraph, run_all: RunAll
) -> None:
    def graph(value: int) -> Graph:
        return make_graph(
            Node(name="base", kind="add", config={"value": 1}),
            Node(name="left", kind="add", config={"value": value}, inputs={"start": "base"}),
            Node(name="right", kind="add", config={"value": 3}, inputs={"start": "base"}),
            Node(name="top", kind="add", inputs={"a": "left", "b": "right"}),
        )

    run_all(graph(2))
    rows = {row.name: row.reason for row in plan(graph(5), store) if row.action == "run"}
    assert rows == {"left": "value: 2 -> 5", "top": "input a reruns (left)"}
    events = run_all(graph(5))
    assert of_kind(events, "finished") == ["left", "top"]
    assert of_kind(events, "cached") == ["base", "right"]
    started = {e.name: e.payload["reason"] for e in events if e.kind == "started"}
    assert started == rows


@pytest.mark.parametrize(("jobs", "patience", "met"), [(2, 20, 1.0), (1, 0.2, 0.0)])
def test_jobs_is_how_many_run_at_once(
    store: Store,
    make_graph: MakeGraph,
    run_all: RunAll,
    tmp_path: Path,
    jobs: int,
    patience: float,
    met: float,
) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    stages = [
        Node(
            name=name,
            kind="meet",
            config={"patience": patience, "who": name},
            runtime={"meeting": str(meeting)},
        )
        for name in ("a", "b")
    ]
    run_all(
        make_graph(*stages, Node(name="end", kind="report", inputs={"a": "a", "b": "b"})), jobs=jobs
    )
    assert store.resolve("a").metrics == {"met": met}


def test_two_nodes_of_one_fingerprint_run_once(
    store: Store, make_graph: MakeGraph, run_all: RunAll, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    twin: dict[str, Any] = {
        "kind": "add",
        "config": {"value": 4},
        "runtime": {"ledger": str(ledger)},
    }
    graph = make_graph(
        Node(name="a", **twin),
        Node(name="b", **twin),
        Node(name="sum", kind="add", inputs={"x": "a", "y": "b"}),
    )
    events = run_all(graph, jobs=2)
    assert ledger.read_text() == "a\n"
    assert [(e.kind, e.payload.get("reason")) for e in events if e.name == "b"] == [
        ("cached", "same as a")
    ]
    assert store.resolve("sum").metrics == {"value": 8.0}


def test_progress_passes_through(store: Store, make_graph: MakeGraph, run_all: RunAll) -> None:
    events = run_all(make_graph(Node(name="count", kind="steps", config={"steps": 3})))
    progress = [e.payload for e in events if e.kind == "progress"]
    assert progress == [{"step": n, "total": 3} for n in (1, 2, 3)]
    artifact = store.resolve("count")
    lines = artifact.file("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == progress


WARNED = ["nothing is kept", "half is cut off"]


def test_warnings_are_told_as_they_come_and_kept(
    store: Store, make_graph: MakeGraph, run_all: RunAll
) -> None:
    graph = make_graph(Node(name="w", kind="warn", config={"steps": 1}))
    kinds = [(event.kind, event.payload.get("text")) for event in run_all(graph)]
    told = [("warning", text) for text in WARNED]
    assert kinds[0] == ("started", None) and kinds[-1] == ("finished", None)
    assert [one for one in kinds if one[0] == "warning"] == told
    artifact = store.resolve("w")
    assert artifact.warnings == artifact.record["warnings"] == WARNED
    assert ancestry.verify(store, artifact) == []
    cached = [(event.kind, event.payload.get("text")) for event in run_all(graph)]
    assert cached == [("cached", None), *told]


def test_warnings_outlive_a_stop_and_are_told_of_a_stage_that_fails(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    graph = make_graph(Node(name="w", kind="warn", config={"steps": 2, "by": 0}))
    for reason in ("new", "resumes at step 2"):
        events, _, _ = collect(graph, store, toys)
        assert events[0].payload["reason"] == reason
        assert [e.payload["text"] for e in events if e.kind == "warning"] == WARNED
        work = store.work_path(graph.fingerprints()["w"])
        assert read_warnings(work) == WARNED


def test_a_record_without_warnings_does_not_name_them(
    store: Store, chain: Graph, run_all: RunAll
) -> None:
    run_all(chain)
    artifact = store.resolve("third")
    assert "warnings" not in artifact.record and artifact.warnings == []


def test_a_stage_resumes_at_its_checkpoint(
    store: Store, make_graph: MakeGraph, run_all: RunAll
) -> None:
    graph = make_graph(Node(name="count", kind="steps", config={"steps": 4}))
    work = store.begin(graph.fingerprints()["count"])
    assert work is not None
    (work.path / "sum.txt").write_text("3")
    (work.path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "total": 4}}\n' for n in (1, 2, 3))
    )
    write_step(work.path, 2)
    work.release()
    events = run_all(graph)
    assert events[0].payload["reason"] == "resumes at step 2"
    assert [e.payload["step"] for e in events if e.kind == "progress"] == [3, 4]
    artifact = store.resolve("count")
    assert artifact.metrics == {"value": 10.0, "first_step": 3.0}
    assert artifact.provenance["resumed_at_step"] == 2
    lines = artifact.file("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_what_a_stage_is_told(store: Store, make_graph: MakeGraph, run_all: RunAll) -> None:
    graph = make_graph(
        Node(name="one", kind="report", config={"pair": (1, 2)}),
        Node(name="two", kind="report"),
        Node(name="end", kind="report", config={"last": True}, inputs={"a": "one", "b": "two"}),
    )
    provenance = Provenance(facts={"host": "here"}, diff="--- a\n")
    run_all(graph, jobs=2, cores=8, environment={"TOY_SETTING": "on"}, provenance=provenance)
    one, end = store.resolve("one"), store.resolve("end")
    seen = json.loads(one.file("job.json").read_text())
    assert seen["environment"] == "on"
    assert seen["config"] == {"pair": [1, 2]}
    # Two stages could run beside each other, the last one is alone.
    assert (one.metrics["threads"], end.metrics["threads"]) == (4, 8)
    assert one.provenance["threads"] == 4
    assert one.provenance["host"] == "here"
    assert one.provenance["seconds"] > 0
    assert one.file("code.diff").read_text() == "--- a\n"
    # A number that is not finite is no JSON, but no reason to lose the stage either.
    assert one.metrics["loss"] is None


def test_the_threads_do_not_depend_on_what_is_cached(
    store: Store, make_graph: MakeGraph, run_all: RunAll
) -> None:
    one, two = Node(name="one", kind="report"), Node(name="two", kind="report", config={"n": 2})
    run_all(make_graph(one), cores=8, jobs=2)
    graph = make_graph(one, two, Node(name="end", kind="report", inputs={"a": "one", "b": "two"}))
    events = run_all(graph, cores=8, jobs=2)
    assert of_kind(events, "cached") == ["one"]
    assert [store.resolve(name).metrics["threads"] for name in ("one", "two")] == [8, 4]


def failing(make_graph: MakeGraph, kind: str, **config: Any) -> Graph:
    return make_graph(
        Node(name="bad", kind=kind, config=config),
        Node(name="after", kind="add", inputs={"start": "bad"}),
        Node(name="good", kind="add", config={"value": 1}),
        Node(name="later", kind="add", config={"value": 1}, inputs={"start": "good"}),
        Node(name="end", kind="add", inputs={"a": "after", "b": "later"}),
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_blocks_only_its_descendants(
    store: Store, make_graph: MakeGraph, toys: str, jobs: int
) -> None:
    graph = failing(make_graph, "crash", by=0)
    events, message, exit_code = collect(graph, store, toys, jobs=jobs)
    assert exit_code == 1
    assert of_kind(events, "failed") == ["bad"]
    assert of_kind(events, "finished") == ["good", "later"]
    assert {e.name: e.payload["reason"] for e in events if e.kind == "blocked"} == {
        "after": "input start failed (bad)",
        "end": "input a is blocked (after)",
    }
    log = store.work_path(graph.fingerprints()["bad"]) / "log.txt"
    assert "about to divide" in log.read_text()
    assert "Traceback" in log.read_text()
    assert message == (
        f"stage bad failed: ZeroDivisionError: division by zero\n"
        f"  log: {log}\n"
        f"blocked: after: input start failed (bad)\n"
        f"blocked: end: input a is blocked (after)\n"
        f"What finished is kept; once the cause is mended, run the same command again."
    )
    assert [artifact.name for artifact in store.list()] == ["good", "later"]
    assert ancestry.verify(store, store.resolve("later")) == []
    # The cause is gone: the same store goes on with what is left.
    events = list(run(failing(make_graph, "add"), store, execute=toys))
    assert of_kind(events, "finished") == ["bad", "after", "end"]


def test_an_error_meant_for_the_user_comes_as_it_is(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    graph = make_graph(Node(name="bad", kind="refuse"))
    events, message, exit_code = collect(graph, store, toys)
    assert exit_code == 2
    assert message.splitlines()[0] == ("stage bad failed: steps: 0 is less than 1; give at least 1")
    assert "log:" not in message
    log = (store.work_path(graph.fingerprints()["bad"]) / "log.txt").read_text()
    assert "Traceback" not in log
    assert events[-1].payload == {
        "error": "steps: 0 is less than 1; give at least 1",
        "log": None,
    }


def test_death_by_a_signal_is_reported(store: Store, make_graph: MakeGraph, toys: str) -> None:
    _, message, exit_code = collect(make_graph(Node(name="bad", kind="die")), store, toys)
    assert exit_code == 1
    assert "stage bad failed: its process was ended by signal 9 (SIGKILL); if nobody" in message
    assert "ran out of memory" in message
    assert "last line: last words" in message


def test_a_disk_that_fills_while_a_stage_works(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    _, message, exit_code = collect(make_graph(Node(name="bad", kind="fill")), store, toys)
    assert exit_code == 2
    assert "stage bad failed: disk full while the stage was working: " in message
    assert "Free some space" in message and "log:" not in message
    assert store.list() == []


def test_a_disk_that_is_full_when_a_stage_tells_its_result(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    _, message, exit_code = collect(make_graph(Node(name="bad", kind="brim")), store, toys)
    assert exit_code == 2
    assert "stage bad failed: disk full while the stage was working: " in message
    assert "left no result" not in message


def test_a_run_that_waited_for_gc_plans_again(
    store: Store, chain: Graph, run_all: RunAll, toys: str
) -> None:
    """What it had found is gone when it gets the store."""
    run_all(Graph(nodes=chain.nodes, target="second"))
    waited = run(chain, store, execute=toys)
    with store.alone():
        ancestry.gc(store, [])
    events = list(waited)
    assert of_kind(events, "cached") == []
    assert of_kind(events, "finished") == ["first", "second", "third"]


def test_an_interrupt_right_after_a_commit(
    store: Store, chain: Graph, toys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is released with the commit; stopping must not close its number again."""
    real = Store.commit

    def commit(self: Store, *arguments: Any, **options: Any) -> Any:
        real(self, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "commit", commit)
    with pytest.raises(Interrupted, match="To go on, run the same command again"):
        list(run(chain, store, execute=toys))
    assert [artifact.name for artifact in store.list()] == ["first"]


def test_a_silent_end_is_reported(store: Store, make_graph: MakeGraph, toys: str) -> None:
    _, message, _ = collect(make_graph(Node(name="bad", kind="leave")), store, toys)
    assert "its process ended with status 3 and left no result" in message


def test_output_the_store_refuses_fails_the_stage(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    _, message, _ = collect(make_graph(Node(name="bad", kind="forge")), store, toys)
    assert "stage bad failed: the stage wrote record.json into its output" in message
    assert store.list() == []


def test_a_full_disk_at_the_commit_fails_the_stage(
    store: Store, chain: Graph, toys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "rename", full)
        _, message, _ = collect(chain, store, toys)
    assert "stage first failed: disk full while committing first" in message
    assert store.list() == []
    assert of_kind(list(run(chain, store, execute=toys)), "finished") == [
        "first",
        "second",
        "third",
    ]


@pytest.mark.parametrize(
    ("execute", "message"),
    [
        ("no colon", "execute: 'no colon' is not \"package.module:function\""),
        ("posttrain.engine.graph:nothing", "execute: posttrain.engine.graph has no function"),
        ("/nowhere/toys.py:execute", "execute: there is no file /nowhere/toys.py"),
        ("no_such_module:execute", "No module named 'no_such_module'"),
    ],
)
def test_a_wrong_execute(store: Store, chain: Graph, execute: str, message: str) -> None:
    _, found, _ = collect(chain, store, execute)
    assert message in found


def test_a_module_by_its_name(
    store: Store, chain: Graph, run_all: RunAll, toys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(toys.rpartition(":")[0]).parent))
    run_all(chain, execute="toy_stages:execute")
    assert store.resolve("third").metrics == {"value": 6.0}


def test_what_is_refused_before_anything_runs(
    store: Store, make_graph: MakeGraph, chain: Graph, toys: str
) -> None:
    with pytest.raises(ConfigError, match="jobs: 0 is less than 1"):
        run(chain, store, execute=toys, jobs=0)
    gone = Node(name="gone", kind="add", runtime={"missing": "there is no file prompts.jsonl"})
    graph = make_graph(gone, Node(name="end", kind="add", inputs={"start": "gone"}))
    with pytest.raises(ConfigError) as caught:
        run(graph, store, execute=toys)
    assert "end cannot be made; blocked:\n  gone: there is no file prompts.jsonl" in str(
        caught.value
    )
    with pytest.raises(GraphError, match="not a stage"):
        run(make_graph(Node(name="a", kind="add", inputs={"x": "b"})), store, execute=toys)
    assert not store.root.exists()


def test_closing_the_generator_stops_the_stages(
    store: Store, make_graph: MakeGraph, toys: str
) -> None:
    events = run(make_graph(Node(name="long", kind="pause")), store, execute=toys)
    assert next(events).kind == "started"
    events.close()
    work = store.begin(
        plan(make_graph(Node(name="long", kind="pause")), store)[0].fingerprint, wait=False
    )
    assert work is not None  # nobody holds it any more
    work.release()


def test_an_unreadable_progress_line_is_shown(
    store: Store, make_graph: MakeGraph, run_all: RunAll
) -> None:
    events = run_all(make_graph(Node(name="odd", kind="babble")))
    assert [e.payload for e in events if e.kind == "progress"] == [
        {"unreadable": "not json\n"},
        {"step": 1},
    ]
