"""Checkpoint and resume as files: whatever moment a stage is killed at, it finds a whole state."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain import schedules
from posttrain.algorithms import AdamW
from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_step, read_warnings
from posttrain.stages import context
from posttrain.stages.context import Context
from posttrain.stages.settings.offline import Sft


class Counter:
    """A learner whose state is one number: the sum of the steps it took."""

    def __init__(self) -> None:
        self.total = 0.0

    def step(self, number: int) -> None:
        self.total += number

    def state(self) -> dict[str, Tensor]:
        return {"total": torch.tensor([self.total], dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.total = float(tensors["total"])


class Killed(Exception):
    """Where the process ends."""


def new(work: Path) -> Context:
    return Context(name="mine", work=work, inputs={}, threads=1)


def work_on(work: Path, steps: int, *, stop_after: int | None = None) -> tuple[Counter, Context]:
    """A stage's loop with a checkpoint after every step."""
    ctx, learner = new(work), Counter()
    for step in range(ctx.resume(learner), steps):
        learner.step(step + 1)
        ctx.log(step + 1, steps, tokens=10, loss=1 / (step + 1))
        ctx.save(step + 1, learner)
        if step + 1 == stop_after:
            break
    return learner, ctx


class Optimised(Counter):
    """A counter that also is a learner, as far as its optimiser goes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def set_hyperparameters(self, *, weight_decay: float, max_grad_norm: float) -> None:
        self.seen.append((weight_decay, max_grad_norm))


class Passed:
    """What was drawn: it only knows how many steps it has passed over."""

    def __init__(self) -> None:
        self.done: tuple[int, int] | None = None

    def replay(self, settings: Any, done: int, total: int, history: Any) -> None:
        self.done = (done, total)


def test_steps_resume_resolve_schedules_and_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is left after its third step, of which the state is not saved."""
    monkeypatch.setattr(context, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    decay = AdamW(weight_decay=schedules.linear(0, 4))
    settings = Sft(steps=5, batch_size=schedules.steps({0: 2, 3: 6}), optimizer=decay)
    seen = []
    for stop in (2, None):
        learner, other, drawn, ctx = Optimised(), Counter(), Passed(), new(tmp_path)
        steps = ctx.steps(settings, 5, replayed=[drawn], policy=learner, other=other, none=None)
        for step, step_settings in steps:
            seen.append((step, step_settings.batch_size))
            learner.step(step + 1)
            other.step(10)
            ctx.log(step + 1, 5, tokens=1, loss=1.0)
            if step == stop:
                break
            ctx.finish()
        ctx.finish()
    assert seen == [(0, 2), (1, 2), (2, 2), (2, 2), (3, 6), (4, 6)]
    assert drawn.done == (2, 5)
    assert (learner.total, other.total) == (15, 50)
    assert learner.seen == [(2, 1), (3, 1), (4, 1)], "decay of the steps, the norm as it is"
    assert read_step(tmp_path) == 5


def test_a_schedule_of_a_metric_that_is_not_logged_is_told(tmp_path: Path) -> None:
    settings = Sft(steps=3, lr=schedules.on_plateau(0.01, 0.001, times=0.5, metric="los"))
    ctx = new(tmp_path)
    with pytest.raises(ConfigError, match="schedule of lr reads the metric 'los', which this"):
        for step, _ in ctx.steps(settings, 3, policy=Counter()):
            ctx.log(step + 1, 3, tokens=1, loss=1.0)
    assert len(lines(tmp_path)) == 1


def lines(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    work_on(tmp_path, 6, stop_after=4)
    # The engine reads the marker that the stage wrote: one name and form for both.
    assert read_step(tmp_path) == 4
    learner, ctx = work_on(tmp_path, 6)
    assert learner.total == 21
    assert ctx.tokens == 60
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50, 60]


def test_seconds_go_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(context.time, "monotonic", lambda: now)
    ctx, learner = new(tmp_path), Counter()
    now = 107.0
    ctx.log(1, 3, tokens=1)
    ctx.save(1, learner)
    now = 500.0
    again = new(tmp_path)
    again.resume(learner)
    now = 502.0
    again.log(2, 3, tokens=1)
    assert [line["seconds"] for line in lines(tmp_path)] == [7.0, 9.0]


def test_a_warning_is_told_once_and_outlives_a_stop(tmp_path: Path) -> None:
    for _ in range(2):
        ctx = new(tmp_path)
        ctx.warn("no row is kept")
        ctx.warn("no row is kept")
    ctx.warn("another one")
    assert read_warnings(tmp_path) == ["no row is kept", "another one"]


def test_lines_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    learner, ctx = work_on(tmp_path, 9, stop_after=3)
    ctx.log(4, 9, tokens=10, loss=0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')
    resumed = new(tmp_path)
    assert resumed.resume(learner) == 3
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert resumed.tokens == 30


def test_without_a_checkpoint_metrics_start_anew(tmp_path: Path) -> None:
    ctx = new(tmp_path)
    ctx.log(1, 9, tokens=10)
    assert new(tmp_path).resume(Counter()) == 0
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("moment", ["save_file", "replace", "fsync", "rmtree"])
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed while the state is written, before or at the marker's rename, or while the old state
    is removed: the stage goes on from the old or the new state, and ends with the same sum."""
    work_on(tmp_path, 6, stop_after=3)

    def die(*args: object, **kwargs: object) -> None:
        if moment == "rmtree" and str(args[0]).endswith("step-4"):
            return
        if moment == "save_file":
            Path(str(args[1])).write_bytes(b"half a sta")
        raise Killed

    target = {"save_file": context, "rmtree": context.shutil}.get(moment, context.os)
    with monkeypatch.context() as patch:
        patch.setattr(target, moment, die)
        with pytest.raises(Killed):
            work_on(tmp_path, 6)
    assert read_step(tmp_path) == (4 if moment == "rmtree" else 3)
    learner, ctx = work_on(tmp_path, 6)
    assert learner.total == 21
    assert ctx.tokens == 60
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-6"]


def test_after_the_last_step_its_metrics_are_still_known(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end: no step is left to compute them again."""
    work_on(tmp_path, 4)
    _, ctx = work_on(tmp_path, 4)
    assert ctx.metrics == {"loss": 0.25}
    assert ctx.tokens == 40


def test_checkpoints_are_as_far_apart_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(context.time, "monotonic", lambda: now)
    ctx, learner, saved = new(tmp_path), Counter(), []
    for step in range(1, 31):
        now = float(step)
        ctx.checkpoint(step, learner)
        ctx.finish()
        saved.append(read_step(tmp_path))
    assert context.SECONDS_BETWEEN_CHECKPOINTS == 10
    assert saved == [None] * 9 + [10] * 10 + [20] * 10 + [30]


def test_numbers_are_rounded_and_those_not_finite_are_kept(tmp_path: Path) -> None:
    ctx = new(tmp_path)
    ctx.log(1, 2, tokens=3, loss=1 / 3, kl=float("nan"))
    (line,) = lines(tmp_path)
    assert line["loss"] == 0.333333
    assert line["kl"] != line["kl"]


def test_domains_and_their_problems(tmp_path: Path) -> None:
    for name, rows in (("b", 2), ("a", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "größe"}\n' * rows)
    inputs = {f"domains.{n}": str(tmp_path / n) for n in "ba"} | {"start": str(tmp_path)}
    ctx = Context(name="mine", work=tmp_path, inputs=inputs, threads=1)
    assert ctx.domains == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert ctx.problems("b", "train") == [{"prompt": "größe"}] * 2
    with pytest.raises(ConfigError, match="domain 'a': its train split has no problems"):
        ctx.problems("a", "train")


def test_tensors_that_are_views_come_back_whole(tmp_path: Path) -> None:
    """safetensors takes no views: weights that are slices or transposed are saved as they are."""

    class Views:
        def __init__(self) -> None:
            self.tensors = {"slice": torch.arange(12.0).reshape(3, 4).T[1:]}

        def state(self) -> dict[str, Tensor]:
            return self.tensors

        def restore(self, tensors: dict[str, Tensor]) -> None:
            self.tensors = tensors

    ctx, learner = new(tmp_path), Views()
    expected = learner.tensors["slice"].clone()
    ctx.save(1, learner)
    learner.tensors = {}
    assert new(tmp_path).resume(learner) == 1
    assert torch.equal(learner.tensors["slice"], expected)


class Held:
    """`save_file` that waits in the middle until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.inside = 0
        write = context.save_file

        def held(*args: Any) -> None:
            self.inside += 1
            assert self.inside == 1, "two writers at once"
            self.begun.set()
            assert self.go_on.wait(20)
            if self.error is not None:
                raise self.error
            write(*args)
            self.inside -= 1

        monkeypatch.setattr(context, "save_file", held)
        monkeypatch.setattr(context, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)


def test_the_loop_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state, the counts and the length of the log at the step, whatever the
    loop does in the meantime; checkpoints that fall due while one is written are left out."""
    held, ctx = Held(monkeypatch), new(tmp_path)
    weights = torch.zeros(3)

    class InPlace:
        def state(self) -> dict[str, Tensor]:
            return {"weights": weights, "again": weights[:2]}

        def restore(self, tensors: dict[str, Tensor]) -> None:
            weights.copy_(tensors["weights"])

    learner = InPlace()
    for step in range(1, 4):
        weights += 1
        ctx.log(step, 9, tokens=10, loss=1 / step)
        ctx.checkpoint(step, learner)
        assert held.begun.wait(20)
    assert read_step(tmp_path) is None
    held.go_on.set()
    ctx.finish()
    assert read_step(tmp_path) == 1
    weights.fill_(-1)
    resumed = new(tmp_path)
    assert resumed.resume(learner) == 1
    assert weights.tolist() == [1, 1, 1]
    assert (resumed.tokens, resumed.metrics) == (10, {"loss": 1})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    weights += 1
    ctx.checkpoint(2, learner)
    ctx.finish()
    assert read_step(tmp_path) == 2


def test_an_error_of_the_writer_comes_out_of_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, (learner, ctx) = Held(monkeypatch), (Counter(), new(tmp_path))
    held.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    ctx.checkpoint(1, learner)
    held.go_on.set()
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 10_000):
            ctx.checkpoint(step, learner)
            time.sleep(0.001)
    ctx.finish()  # it is told once
    assert read_step(tmp_path) is None


def test_an_error_of_the_last_checkpoint_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, ctx = Held(monkeypatch), new(tmp_path)
    held.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    held.go_on.set()
    ctx.checkpoint(1, Counter())
    with pytest.raises(OSError, match="No space left"):
        ctx.finish()
