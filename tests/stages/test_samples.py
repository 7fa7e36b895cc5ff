"""Samples of every training stage: there, readable, and without effect on what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.report.samples import EVERY, SAMPLES, given_every, parse_samples, snapshots
from posttrain.stages import samples as module
from posttrain.stages.samples import TEXT, Sample, SampleLog, shortened, spread

SHORT: dict[str, Any] = {"lr": 0.01, "warmup_steps": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "pretrain": {
        **SHORT,
        **{"steps": 3, "batch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
        **{"head_dim": 8, "intermediate_size": 32, "max_positions": 32},
    },
    "sft": {**SHORT, "steps": 3, "batch_size": 4},
    "dpo": {**SHORT, "steps": 3, "batch_size": 4},
    "reward_model": {**SHORT, "steps": 3, "batch_size": 4},
    "rl": {
        **SHORT,
        **{"steps": 3, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6},
        "kl": {"coef": 0.1},
    },
    "distill": {
        **SHORT,
        **{"steps": 3, "prompts_per_step": 4, "max_new_tokens": 6},
        "routes": {"short": "t", "words": "t"},
    },
}
TEXTS = {
    "pretrain": ["prompt", "response", "demonstration"],
    "sft": ["prompt", "response", "demonstration"],
    "dpo": ["prompt", "response", "chosen", "rejected"],
    "reward_model": ["prompt", "chosen", "rejected"],
    "rl": ["prompt", "response"],
    "distill": ["prompt", "response"],
}
NUMBERS = {
    "pretrain": {"loss"},
    "sft": {"loss"},
    "dpo": {"logp_chosen", "logp_rejected"},
    "reward_model": {"reward_chosen", "reward_rejected", "margin"},
    "rl": {"reward", "advantage", "kl"},
    "distill": {"kl"},
}


def read(out: Path) -> list[Sample]:
    return parse_samples((out / SAMPLES).read_bytes())


@pytest.mark.parametrize("kind", SETTINGS)
def test_samples_change_no_bit_and_no_number(
    kind: str, run_stage: Callable[..., Any], edges: Callable[..., Any], same: Any
) -> None:
    off, on = (
        run_stage(kind, SETTINGS[kind], edges(kind), environment={EVERY: every})
        for every in ("0", "1")
    )
    assert same(off, on)
    assert not (off.out / SAMPLES).exists()
    assert [{**line, "seconds": 0} for line in off.lines] == [
        {**line, "seconds": 0} for line in on.lines
    ]
    found = read(on.out)
    assert [step for step, _ in snapshots(found, 9)] == [3, 2, 1]
    assert {sample.domain for sample in found} == {"short", "words"}
    for sample in found:
        assert list(sample.texts) == TEXTS[kind]
        assert sample.texts["prompt"] and NUMBERS[kind] <= set(sample.numbers)


def test_the_kl_of_a_sample_is_that_of_the_exact_divergence(
    run_stage: Callable[..., Any], edges: Callable[..., Any]
) -> None:
    """Teacher states through the teacher's head give what the teacher's scorer gives."""
    kinds = ("reverse_kl", "sampled_token")
    of_both = [
        read(
            run_stage(
                "distill",
                SETTINGS["distill"] | {"estimator": {"kind": kind}, "steps": 1},
                edges("distill"),
                environment={EVERY: "1"},
            ).out
        )
        for kind in kinds
    ]
    values = [{s.texts["prompt"]: s.numbers["kl"] for s in found} for found in of_both]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert any(abs(value) > 0.01 for value in values[0].values())


def test_a_loss_is_that_of_the_row(
    run_stage: Callable[..., Any], edges: Callable[..., Any]
) -> None:
    ran = run_stage("sft", SETTINGS["sft"] | {"steps": 60}, edges("sft"), environment={EVERY: "20"})
    steps = snapshots(read(ran.out), 9)
    assert [step for step, _ in steps] == [60, 40, 20]
    newest, oldest = steps[0][1], steps[-1][1]
    # The same prompts every time, so that one can compare.
    assert [s.texts["prompt"] for s in newest] == [s.texts["prompt"] for s in oldest]
    assert sum(s.numbers["loss"] for s in newest) < sum(s.numbers["loss"] for s in oldest)


def test_a_resumed_stage_has_every_sample_once(
    run_stage: Callable[..., Any], edges: Callable[..., Any], goes_on: Callable[..., Any]
) -> None:
    def run(work: Path | None) -> Any:
        return run_stage(
            "sft", SETTINGS["sft"] | {"steps": 6}, edges("sft"), work, environment={EVERY: "1"}
        )

    calm, stopped = goes_on(run, saved=3, killed=5)
    assert read(calm.out) == read(stopped.out)
    assert len(snapshots(read(calm.out), 99)) == 6


def test_without_a_number_time_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    log, taken = SampleLog(tmp_path), []
    for step in range(1, 101):
        now += 1.0
        if log.due(step, 100):
            now += 0.15
            log.write(step, [])
            taken.append(step)
    # Every tenth step, where that is not more than a hundredth of the time.
    assert taken[0] == 10 and 4 <= len(taken) <= 6
    assert len(taken) * 0.15 <= 0.011 * now
    cheap = SampleLog(tmp_path / "cheap")
    (tmp_path / "cheap").mkdir()
    steps = []
    for step in range(1, 24):
        if cheap.due(step, 23):
            cheap.write(step, [])
            steps.append(step)
    assert steps == [3, 6, 9, 12, 15, 18, 21, 23]


def test_given_every() -> None:
    assert given_every({}) is None and given_every({EVERY: ""}) is None
    assert given_every({EVERY: "0"}) == 0 and given_every({EVERY: "25"}) == 25
    for text in ("-1", "often", "1.5"):
        with pytest.raises(ConfigError, match=f"{EVERY}='{text}' is no number of steps"):
            given_every({EVERY: text})


def test_rows_of_all_domains_come_first() -> None:
    assert spread(["a", "a", "a", "b", "a", "c"], 4) == [0, 1, 3, 5]
    assert spread(["a"], 4) == [0] and spread([], 4) == []


def test_long_texts_lose_their_middle() -> None:
    text = "begin" + "x" * 9000 + "end"
    short = shortened(text)
    assert short.startswith("begin") and short.endswith("end") and len(short) < TEXT + 50
    assert f"[... {len(text) - TEXT} characters ...]" in short
    assert shortened("whole") == "whole"


def test_lines_that_are_no_samples_are_left_out() -> None:
    good: Mapping[str, Any] = {"step": 1, "domain": "d", "texts": {"a": "b"}, "numbers": {"c": 1}}
    bad = [
        *("[]", "{", '"text"', "[" * 5000),
        *(json.dumps(dict(good) | change) for change in ({"step": "1"}, {"texts": ["a"]})),
        *(
            json.dumps(dict(good) | change)
            for change in ({"texts": {"a": 1}}, {"numbers": {"a": "b"}})
        ),
        json.dumps(dict(good) | {"numbers": {"a": float("nan")}}),
    ]
    content = "\n".join([*bad, json.dumps(good), json.dumps(good)[:-3]])
    assert parse_samples(content.encode()) == [Sample(**good)]
    assert snapshots([], 3) == []
    many = [Sample(**dict(good) | {"step": step}) for step in range(10)]
    assert [step for step, _ in snapshots(many, 4)] == [9, 6, 3, 0]
    assert [step for step, _ in snapshots(many, 1)] == [9]


def test_a_prompt_that_leaves_no_room_is_not_asked() -> None:
    class Chat:
        max_positions = 40

        def prompt(self, shown: str, mode: str | None) -> str:
            return shown

    chat: Any = Chat()
    rows = [{"domain": "d", "prompt": "x" * length} for length in (31, 30, 30, 5)]
    asked = [module.Question(row=row, shown=row["prompt"], texts={}) for row in rows]
    # A quarter of few positions; one prompt once.
    assert module.new_tokens(chat) == 10
    assert [len(one.shown) for one in module.questions(asked, chat)] == [30, 5]
