"""Teachers that read beside the sampler: what they say is the same, and they do not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain.backends.sampler import LocalSampler
from posttrain.rl.types import Rollouts
from posttrain.stages.rollouts import gathered
from torch import Tensor

from posttrain.backends.checkpoint import load
from posttrain.backends.local import LocalScorer
from posttrain.stages import teachers as stage
from posttrain.stages.config import build_config
from posttrain.stages.settings.distill import Distill
from posttrain.stages.teachers import Targets, Teachers


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, though the batches of these tests are small."""
    monkeypatch.setattr(stage, "READ_TOKENS", 30)


PROMPTS = [[10 + n, 20, 30 + n % 3] for n in range(12)]
TEACHER_B = torch.tensor([n % 2 for n in range(12)]).repeat_interleave(2)


def settings(**changes: Any) -> Distill:
    values = {"steps": 1, "routes": {"a": "one"}, "samples_per_prompt": 2} | changes
    config = build_config("distill", "student", values)
    assert isinstance(config, Distill)
    return config


def read(
    models: Mapping[str, str], config: Distill, aside: ThreadPoolExecutor | None
) -> tuple[list[Targets], Rollouts]:
    student = load(models["start"])
    paths = {name: Path(models[name]) for name in ("one", "two")}
    reading = Teachers(paths, student, workers=aside).reading(config, TEACHER_B)
    sampling = LocalSampler(student, max_rows=8).stream(
        PROMPTS, group_size=2, max_new_tokens=8, temperature=1.0, seed=0
    )
    for row_B in gathered(sampling, 2):
        # Without a thread all is read at the end, in one piece.
        if aside is not None:
            reading.read(row_B, sampling)
    rollouts = sampling.rollouts()
    return reading.targets(rollouts), rollouts


@pytest.mark.parametrize(
    "changes",
    [{}, {"teacher_cache": "bfloat16"}, {"estimator": "top_k", "top_k": 5},
     {"estimator": "sampled_token"}],
    ids=str,
)  # fmt: skip
def test_beside_the_sampler_they_say_what_they_say_after_it(
    models: Mapping[str, str], changes: dict[str, Any]
) -> None:
    config = settings(**changes)
    with ThreadPoolExecutor(1) as aside:
        beside, rollouts = read(models, config, aside)
    after, same = read(models, config, None)
    assert rollouts.responses() == same.responses()
    for ours, theirs in zip(beside, after, strict=True):
        assert ours.start_B.lt(0).tolist() == theirs.start_B.lt(0).tolist()
        compared = 0
        for name in ("hidden_NE", "top_ids_NK", "top_logp_NK", "logp_N"):
            mine, expected = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (expected is None)
            for row in [] if mine is None else ours.start_B.ge(0).nonzero()[:, 0].tolist():
                length = int(rollouts.response_len_B[row])
                start, other = int(ours.start_B[row]), int(theirs.start_B[row])
                torch.testing.assert_close(
                    mine[start : start + length].double(),
                    expected[other : other + length].double(),
                    atol=2e-2 if "teacher_cache" in changes else 1e-5,
                    rtol=1e-4,
                )
                compared += 1
        assert compared >= 12


def test_they_begin_while_rows_are_still_being_sampled(
    models: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rows are given out only after a teacher has read some: this would wait for ever if
    teachers waited for the sampler."""
    began = threading.Event()
    threads: set[str] = set()
    hidden = LocalScorer.hidden

    def noted(self: LocalScorer, rollouts: Rollouts) -> Tensor:
        began.set()
        threads.add(threading.current_thread().name)
        return hidden(self, rollouts)

    monkeypatch.setattr(LocalScorer, "hidden", noted)

    class Slow:
        """A sampling whose rows end one by one."""

        def __init__(self) -> None:
            sampler = LocalSampler(load(models["start"]))
            self.drawn = sampler.stream(
                PROMPTS, group_size=2, max_new_tokens=8, temperature=1.0, seed=0
            )
            assert list(self.drawn)

        def __iter__(self) -> Iterator[Tensor]:
            for row in range(24):
                if row == 23:
                    assert began.wait(timeout=60), "no teacher has begun"
                yield torch.tensor([row])

        def rollouts(self, row_B: Tensor | None = None) -> Rollouts:
            return self.drawn.rollouts(row_B)

        def num_tokens(self, rows: list[int]) -> int:
            return self.drawn.num_tokens(rows)

    sampling: Any = Slow()
    with ThreadPoolExecutor(1, thread_name_prefix="aside") as aside:
        paths = {name: Path(models[name]) for name in ("one", "two")}
        teachers = Teachers(paths, load(models["start"]), workers=aside)
        reading = teachers.reading(settings(), TEACHER_B)
        for row_B in sampling:
            reading.read(row_B, sampling)
        targets = reading.targets(sampling.rollouts())
    assert threads == {"aside_0"}
    assert sum(int(t.start_B.ge(0).sum()) for t in targets) == 24


def test_an_error_of_a_teacher_reaches_the_stage(
    models: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LocalScorer, rollouts: Rollouts) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(LocalScorer, "hidden", broken)
    with ThreadPoolExecutor(1) as aside, pytest.raises(MemoryError, match="no room"):
        read(models, settings(), aside)


def test_rows_are_gathered_in_order_and_none_is_lost() -> None:
    rows = [torch.tensor(part) for part in ([5], [2, 9], [0], [7, 1, 3], [4])]
    assert [part.tolist() for part in gathered(rows, 3)] == [[2, 5, 9], [0, 1, 3, 7], [4]]
    assert list(gathered([], 3)) == []


@pytest.mark.parametrize("kind", ["sft", "rl", "distill"])
def test_a_second_core_changes_no_bit(
    kind: str,
    run_stage: Callable[..., Any],
    same: Callable[..., bool],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    """A tiny model computes on one thread; what a stage of two cores does beside each other is cut
    and added up as on one. The batches are large enough for two passes an update."""
    settings: dict[str, Any] = {"steps": 3, "lr": 0.01, "warmup_steps": 1}
    inputs = {"start": models["start"], **domains}
    if kind == "sft":
        settings |= {"batch_size": 120}
    else:
        settings |= {"prompts_per_step": 120, "max_new_tokens": 8}
    if kind == "rl":
        settings |= {"group_size": 2, "kl_coef": 0.1}
    if kind == "distill":
        settings |= {"routes": {"short": "first", "words": "second"}, "updates_per_batch": 2}
        inputs |= {"teachers.first": models["one"], "teachers.second": models["two"]}
    one, two = (run_stage(kind, settings, inputs, threads=threads) for threads in (1, 2))
    assert same(one, two)
    assert [line["tokens"] for line in one.lines] == [line["tokens"] for line in two.lines]
