"""`watch` and `report --live`: stages at work, stopped and finished, from the files they write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from posttrain.commands import report as report_command
from posttrain.commands import watch as watch_command
from posttrain.engine.store import Store

Cli = Callable[..., Any]
XSS = "<script>alert(1)</script>\x1b[31m"
FINGERPRINT = "ab" * 32


def line(step: int, total: int = 40) -> dict[str, Any]:
    return {
        **{"step": step, "total": total, "tokens": 50 * step, "seconds": 0.5 * step},
        **{"reward": step / total, "entropy": 2.0 - step / total, "lr": 0.001},
    }


def sample(step: int, response: str = "12") -> dict[str, Any]:
    texts = {"prompt": "5+7=", "response": response}
    numbers = {"reward": 1.0, "advantage": 0.25, "finished": 0.0}
    return {"step": step, "domain": "sums", "texts": texts, "numbers": numbers}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def begun(store: Store, *, steps: int = 8, name: str = "teacher") -> Any:
    """A stage in the middle of its work, whose lock this process holds."""
    work = store.begin(FINGERPRINT)
    assert work is not None
    stage = {
        **{"name": name, "kind": "rl", "version": 2, "fingerprint": FINGERPRINT},
        **{"config": {}, "data": {}, "inputs": {}},
    }
    (work.path / "stage.json").write_text(json.dumps(stage))
    if steps:
        jsonl(work.path / "metrics.jsonl", [line(step) for step in range(1, steps + 1)])
        jsonl(work.out / "samples.jsonl", [sample(4), sample(8, XSS)])
    return work


@contextmanager
def running(store: Store, **options: Any) -> Iterator[Any]:
    """The same while a run uses the store."""
    with store.in_use():
        work = begun(store, **options)
        try:
            yield work
        finally:
            work.release()


def test_a_running_stage(cli: Cli, done: Path) -> None:
    store = Store(done / "posttrain-store")
    with running(store):
        shown = cli("watch")
        told = cli("watch", "--json").json
        named = cli("watch", "teacher", "--json").json
    assert shown.code == 0
    assert "● teacher (rl)  8/40, reward 0.2, 100 tokens/s" in shown.out and "ETA 0:" in shown.out
    assert "▁▂▃▄▅▆▇█  0.025 → 0.2" in shown.out and "█▇▆▅▄▃▂▁  1.98 → 1.8" in shown.out
    assert "after step 8, sums, reward 1, advantage 0.25, cut off" in shown.out
    # Text of a model steers no terminal.
    assert "\x1b[31m" not in shown.out and "<script>alert(1)</script>\\x1b[31m" in shown.out
    assert told["running"] and told["store"] == str(store.root)
    first = told["stages"][0]
    assert named["stages"] == [
        first | {k: named["stages"][0][k] for k in ("seconds", "eta_seconds")}
    ]
    assert (first["state"], first["step"], first["total"]) == ("running", 8, 40)
    assert first["tokens_per_second"] == 100 and 10 < first["eta_seconds"] <= 16
    assert first["curves"]["reward"] == [step / 40 for step in range(1, 9)]
    assert first["samples"] == [sample(8, XSS)]
    assert {stage["state"] for stage in told["stages"][1:]} == {"done"}


def test_stages_that_no_longer_run(cli: Cli, done: Path) -> None:
    store = Store(done / "posttrain-store")
    work = begun(store)
    work.release()
    assert "stopped" in cli("watch").out
    for result, state in (
        ({"error": "out of paper", "exit_code": 1}, "failed"),
        ({"waiting": "fill in pairs.csv", "file": None}, "needs input"),
    ):
        (work.path / "result.json").write_text(json.dumps(result))
        (found,) = cli("watch", "teacher", "--json").json["stages"]
        assert found["state"] == state
        assert found["reason"] in result.values()
        assert found["reason"] in cli("watch").out
    assert not cli("watch", "--json").json["running"]


def test_a_finished_store(cli: Cli, done: Path) -> None:
    shown = cli("watch")
    assert shown.code == 0 and "✓ student (distill)  done, 2/2, KL 0" in shown.out
    # Of such a short stage time decides whether there is one of the second step.
    assert re.search("after step [12]", shown.out)
    (found,) = cli("watch", "student", "--json").json["stages"]
    assert found["state"] == "done" and found["metrics"]["kl"] == pytest.approx(0, abs=1e-6)
    assert {one["domain"] for one in found["samples"]} == {"sums", "copies"}
    wrong = cli("watch", "studnt")
    assert wrong.code == 2 and "did you mean 'student'" in wrong.err


def test_an_empty_place(cli: Cli, place: Path) -> None:
    assert "there is nothing in" in cli("watch").out
    assert not (place / "posttrain-store").exists()


def test_following_ends_with_the_run(cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_command, "REFRESH_SECONDS", 0.05)
    store = Store(done / "posttrain-store")

    def run() -> None:
        with running(store) as work:
            time.sleep(0.6)
            jsonl(work.path / "metrics.jsonl", [line(step) for step in range(1, 13)])
            time.sleep(0.6)

    thread = threading.Thread(target=run)
    thread.start()
    result = cli("watch", "--follow", "--json")
    thread.join()
    assert result.code == 0
    moments = [json.loads(text) for text in result.out.splitlines()]
    steps = [m["stages"][0]["step"] for m in moments if m["stages"][0]["state"] == "running"]
    assert steps[-1] == 12 and len(moments) > 5
    assert not moments[-1]["running"]
    # Of one stage that has ended there is nothing to wait for.
    assert cli("watch", "student", "--follow").out.count("student (distill)") == 1


def test_it_starts_without_torch(done: Path) -> None:
    code = (
        "import sys; from posttrain.cli import main\n"
        "assert main(['watch']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=done, env=os.environ)


# -- report --live ---------------------------------------------------------------------------------


def live(cli: Cli, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The page as it is while a stage runs, and the command's end."""
    monkeypatch.setattr(report_command, "LIVE_SECONDS", 0.1)
    store = Store(Path("posttrain-store"))
    pages: list[str] = []

    def run() -> None:
        path = Path("live.html")
        with running(store):
            deadline = time.monotonic() + 30
            while not (path.exists() and "8/40" in path.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            pages.append(path.read_text())

    thread = threading.Thread(target=run)
    thread.start()
    result = cli("report", "--live", *arguments)
    thread.join()
    assert result.code == 0 and "live.html" in result.out
    return pages[0], Path("live.html").read_text()


def test_a_page_that_is_left_does_not_say_that_the_run_has_ended(done: Path) -> None:
    store = Store(done / "posttrain-store")
    path = Path("live.html")
    with running(store):
        report_command._Live(path, store, None).end()
        assert "not written any more while the run goes on" in path.read_text()
        assert "ended" not in path.read_text().partition("</header>")[0].partition("<body")[2]


def test_a_live_page_reloads_itself_until_the_run_ends(
    cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during, after = live(cli, monkeypatch)
    assert '<meta http-equiv="refresh"' in during and 'http-equiv="refresh"' not in after
    assert "● teacher" in during and "<progress" in during and "<svg" in during
    assert "ended, as of" in after
    # What a model wrote stays text.
    for page in (during, after):
        assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in during
    assert "after step 8" in during and "cut off" in during


def test_a_live_page_of_a_recipe_has_all_its_stages(
    cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_command, "LIVE_SECONDS", 0.1)
    store = Store(Path("posttrain-store"))
    with running(store):

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(report_command.time, "sleep", interrupt)
        options = ("mini.py", "--suite", "pairs.toml", "--set", "student.steps=3")
        assert cli("report", "--live", *options, "--report", "page.html").code == 0
    page = Path("page.html").read_text()
    assert "✓ sums_teacher" in page and "· student" in page
    # Ctrl-C: nobody writes it any more.
    assert 'http-equiv="refresh"' not in page


@pytest.mark.parametrize("arguments", [("student",), ("--seed", "1")])
def test_live_is_about_a_run(cli: Cli, done: Path, arguments: tuple[str, ...]) -> None:
    result = cli("report", "--live", *arguments)
    assert result.code == 2 and "--live is about a run: give the recipe" in result.err


def test_the_report_has_the_samples(cli: Cli, done: Path) -> None:
    page = (done / "report.html").read_text()
    section = page.partition('<section id="samples">')[2].partition("</section>")[0]
    assert section.count("<details") == 5 and '<details class="domain" open' not in section
    assert re.search("after step [12]", section) and "<script" not in section
