"""The live view: what it knows, what it draws, what it prints where there is no terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from rich.console import Console

from posttrain.engine.graph import Graph, Node
from posttrain.engine.planner import plan
from posttrain.engine.runner import Event
from posttrain.engine.store import Store
from posttrain.report import live
from posttrain.report.live import LiveView
from posttrain.report.progress import Progress, tree

MakeView = Callable[..., LiveView]


@pytest.fixture
def graph() -> Graph:
    nodes = [
        Node(name="add", kind="domain"),
        Node(name="spiral", kind="domain"),
        Node(name="base", kind="pretrain", inputs={"domains.add": "add"}),
        Node(name="sft", kind="sft", inputs={"start": "base"}),
        Node(name="add_teacher", kind="rl", inputs={"domains.add": "add", "start": "sft"}),
        Node(name="spiral_teacher", kind="rl", inputs={"domains.spiral": "spiral", "start": "sft"}),
        Node(
            name="student",
            kind="distill",
            inputs={"teachers.a": "add_teacher", "teachers.s": "spiral_teacher", "start": "sft"},
        ),
        Node(name="evaluation", kind="evaluate", inputs={"init": "sft", "student": "student"}),
    ]
    return Graph(nodes={node.name: node for node in nodes}, target="evaluation")


@pytest.fixture
def view(graph: Graph, empty_store: Store) -> MakeView:
    def make(events: Iterable[Event] = (), **options: Any) -> LiveView:
        settings = {"width": 120, "height": 40, "color_system": None, "file": io.StringIO()}
        console = Console(**{**settings, **options})
        found = LiveView(plan(graph, empty_store), graph, console)
        for one in events:
            found.update(one)
        return found

    return make


def event(kind: Any, name: str, seconds: float = 0.0, /, **payload: Any) -> Event:
    return Event(kind=kind, name=name, seconds=seconds, payload=payload)


def step(name: str, number: int, *, total: int = 100, **metrics: float) -> Event:
    """One step a second, 500 tokens each."""
    line = {"step": number, "total": total, "tokens": 500 * number, "seconds": number} | metrics
    return event("progress", name, float(number), **line)


def drawn(view: LiveView, width: int = 120, height: int = 40) -> list[str]:
    console = Console(width=width, height=height, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(view)
    return [line.rstrip() for line in capture.get().splitlines()]


RUN = [
    event("cached", "add", path="x", reason=""),
    event("cached", "spiral", path="x", reason=""),
    event("started", "base", reason="new", threads=1, log="x"),
    step("base", 100, loss=0.5),
    event("finished", "base", 101.0, metrics={"loss": 0.25, "tokens": 50000}, path="x"),
    event("started", "sft", reason="steps: 80 -> 100", threads=1, log="x"),
    step("sft", 50, loss=0.75),
]


def test_tree_hangs_stages_under_what_they_start_from(graph: Graph, empty_store: Store):
    found = tree(plan(graph, empty_store), graph)
    assert [prefix + name for name, prefix in found.items()] == [
        "base",
        "└ sft",
        "  ├ add_teacher",
        "  ├ spiral_teacher",
        "  └ student",
        "    └ evaluation",
    ]


def test_rate_and_time_left_by_hand():
    """500 tokens a second; from step 40 of 100 at one step a second, 60 seconds are left."""
    stage = Progress(name="rl", kind="rl")
    stage.update(event("started", "rl", reason="new"))
    for number in range(1, 41):
        stage.update(step("rl", number))
    assert stage.rate == pytest.approx(500)
    assert stage.share == pytest.approx(0.4)
    # The clock of this test has not moved while 40 seconds were told.
    assert stage.left == pytest.approx(60 + 40, abs=1)


def test_rate_follows_a_change_within_seconds():
    """After 100 slow seconds, the last ten decide: 10 steps a second leave 9 seconds for 90."""
    stage = Progress(name="rl", kind="rl")
    stage.update(event("started", "rl", reason="new"))
    seconds = [*range(1, 101), *(100 + 0.1 * i for i in range(1, 201))]
    for number, second in enumerate(seconds, start=1):
        line = {"step": number, "total": 390, "tokens": number, "seconds": second}
        stage.update(event("progress", "rl", **line))
    assert stage.rate == pytest.approx(10, rel=0.02)
    assert stage.left == pytest.approx(9, rel=0.03)


def test_a_resumed_stage_has_its_own_rate():
    """The stage's clock goes on from its checkpoint, and so do its counts."""
    stage = Progress(name="rl", kind="rl")
    stage.update(event("started", "rl", reason="resumes at step 90"))
    stage.update(step("rl", 91))
    assert stage.rate == pytest.approx(500)


@pytest.mark.parametrize(
    ("kind", "metrics", "text"),
    [
        ("pretrain", {"loss": 0.512345, "lr": 1.0}, "loss 0.512"),
        ("rl", {"reward": 0.62, "loss": 3.0, "kl": 1.0}, "reward 0.62"),
        ("distill", {"reward": 0.62, "loss": 3.0, "kl": 0.01}, "KL 0.01"),
        ("evaluate", {}, "3 of 6 models"),
        ("of_a_user", {"reward": 0.5}, "reward 0.5"),
        ("of_a_user", {"accuracy": 0.5}, ""),
    ],
)
def test_key_metric_of_a_kind(kind: str, metrics: dict[str, float], text: str):
    stage = Progress(name="x", kind=kind)
    stage.update(event("started", "x", reason="new"))
    stage.update(step("x", 3, total=6, **metrics))
    assert stage.headline == text


def test_evaluation_ends_with_its_norm():
    stage = Progress(name="x", kind="evaluate")
    stage.update(event("finished", "x", 3.0, metrics={"norm": 0.9123}, path="p"))
    assert stage.headline == "Norm 0.912"


def test_terminal_shows_every_stage_in_its_state(view: MakeView):
    lines = drawn(view(RUN))
    by_name = {name: next(x for x in lines if name in x) for name in ("domains", "base", "sft")}
    assert by_name["domains"].startswith("✓")
    assert "2/2" in by_name["domains"]
    assert "cached" in by_name["domains"]
    assert by_name["base"].startswith("✓")
    assert "100/100" in by_name["base"]
    assert "loss 0.25" in by_name["base"]
    assert "1:41" in by_name["base"]
    assert by_name["sft"].startswith("●  └ sft")
    for text in ("50/100", "500 tok/s", "loss 0.75", "ETA", "━"):
        assert text in by_name["sft"]
    assert sum(line.startswith("·") for line in lines) == 4
    assert "add " not in "\n".join(lines)


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120])
def test_terminal_view_fits_the_width(view: MakeView, width: int):
    lines = drawn(view(RUN), width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 7
    assert all("…" not in line for line in lines)
    assert any("spiral_teacher" in line for line in lines)


def test_low_terminal_shows_what_goes_on_and_counts_the_rest(view: MakeView):
    lines = drawn(view(RUN), height=8)
    assert len(lines) <= 8
    text = "\n".join(lines)
    assert "sft" in text
    assert "base" not in text
    assert "1 more finished, 2 to come" in text


def test_last_picture_has_all_stages_whatever_the_height(view: MakeView):
    finished = view(RUN, height=8, force_terminal=True)
    with finished:
        pass
    assert len(drawn(finished, height=8)) == 7


def test_failed_and_blocked_stages(view: MakeView):
    events = [
        event("started", "sft", reason="new"),
        event("failed", "sft", 2.0, error="no space left", log="x"),
        event("blocked", "student", reason="input start failed (sft)"),
        event("needs input", "add_teacher", reason="fill in people.csv"),
    ]
    lines = drawn(view(events))
    assert any(x.startswith("?") and "add_teacher" in x and "needs input" in x for x in lines)
    assert any(line.startswith("✗") and "sft" in line and "failed" in line for line in lines)
    blocked = next(line for line in lines if "student" in line)
    assert "blocked" in blocked


def test_a_failed_domain_is_named(view: MakeView):
    lines = drawn(view([event("failed", "spiral", 1.0, error="column missing", log="x")]))
    assert "spiral failed" in next(line for line in lines if "domains" in line)


def printed(view: LiveView) -> list[str]:
    assert isinstance(view.console.file, io.StringIO)
    return view.console.file.getvalue().splitlines()


def test_plain_output_has_one_line_per_start_and_end(view: MakeView):
    assert printed(view(RUN)) == [
        "cached      add",
        "cached      spiral",
        "started     base (pretrain): new",
        "done        base: 100/100, loss 0.25, 500 tokens/s, 1:41",
        "started     sft (sft): steps: 80 -> 100",
    ]


def test_plain_output_tells_of_progress_now_and_then(
    view: MakeView, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)
    lines = [line for line in printed(view(RUN)) if line.startswith("running")]
    assert len(lines) == 2
    assert lines[1].startswith("running     sft: 50/100, loss 0.75, 500 tokens/s")
    assert "ETA" in lines[1]


def test_plain_output_of_failures_and_other_runs(view: MakeView):
    waiting = event("progress", "sft", waiting="another run is working on this stage")
    events = [
        waiting,
        waiting,
        event("failed", "base", 2.0, error="[Errno 28] no space left", log="x"),
        event("blocked", "student", reason="input start failed (base)"),
        event("needs input", "add_teacher", reason="fill in people.csv"),
    ]
    assert printed(view(events, width=30)) == [
        "pending     sft: another run is working on this stage",
        "failed      base: [Errno 28] no space left",
        "blocked     student: input start failed (base)",
        "needs input add_teacher: fill in people.csv",
    ]


def test_warnings_are_printed_as_they_come_and_those_of_cached_stages_are_not(view: MakeView):
    told = event("warning", "base", 1.0, text="no row is kept of 12")
    cached = event("warning", "add", text="the verifier says 0 of everything")
    shown = view([event("cached", "add", path="a"), cached, RUN[2], told, told])
    assert printed(shown)[1:] == [
        "started     base (pretrain): new",
        *["warning     base: no row is kept of 12"] * 2,
    ]
    assert shown.stages["base"].warnings == ["no row is kept of 12"]
    assert shown.stages["add"].warnings == ["the verifier says 0 of everything"]


def test_a_warning_stays_above_the_live_table(view: MakeView):
    shown = view(force_terminal=True)
    with shown:
        shown.update(RUN[2])
        shown.update(event("warning", "base", 1.0, text="no row is kept of 12"))
    lines = [line for line in printed(shown) if "no row is kept of 12" in line]
    assert lines and "warning" in lines[0]


def test_terminal_output_prints_no_plain_lines(view: MakeView):
    shown = view(force_terminal=True)
    with shown:
        for one in RUN:
            shown.update(one)
    assert "started" not in "\n".join(printed(shown))
    assert "sft" in "\n".join(printed(shown))
