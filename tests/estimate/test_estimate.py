"""Estimates of small graphs: what was run before counts more than a calibration, and what does not
fit is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.estimate.building import GIB, SIZES, estimated, know, line, stage
from tests.estimate.conftest import Commit

from posttrain.engine.graph import Node
from posttrain.engine.store import Store
from posttrain.estimate.about import Estimate, Machine, StageEstimate
from posttrain.estimate.costs import LEARNING, ROW_SECONDS, RUN_SECONDS, STAGE_SECONDS
from posttrain.estimate.fits import what_does_not_fit
from posttrain.estimate.lengths import Characters, Checkpoint
from posttrain.estimate.rates import read_rates

WEIGHTS = b"x" * 40_000


def by_name(found: Estimate) -> dict[str, StageEstimate]:
    return {one.name: one for one in found.stages}


def sft(steps: int, **settings: Any) -> Any:
    inputs = {"start": "base", "domains.add": "add"}
    return stage("sft", "sft", inputs, steps=steps, batch_size=4, **settings)


def test_without_rates_and_runs_seconds_are_not_known(store: Store, machine: Machine) -> None:
    found = by_name(estimated(line(sft(5)), store, machine))
    assert found["base"].seconds is None and found["sft"].seconds is None
    assert "not measured" in found["sft"].found[-1]
    # All else is.
    assert found["sft"].parameters and found["sft"].learned > 0 and found["sft"].disk.kept > 0
    # A domain has no model that would have to be measured.
    assert found["add"].seconds == pytest.approx(RUN_SECONDS + STAGE_SECONDS + 130 * ROW_SECONDS)


def test_rates_make_seconds(store: Store, machine: Machine) -> None:
    know(machine, learn_token=1e-3, head_learn=1e-2)
    graph = line(sft(5))
    found = by_name(estimated(graph, store, machine))
    one = found["sft"]
    assert one.found[0] == "calibrated" and one.seconds is not None
    # Lengths that are not known yet are 64 and 64 tokens; one layer.
    assert one.learned == 5 * 4 * 64
    least = LEARNING * 5 * 4 * (128 * 1e-3 + 64 * 1e-2)
    assert least < one.seconds < least + 2 * STAGE_SECONDS
    twice = by_name(estimated(line(sft(10)), store, machine))["sft"]
    assert twice.seconds is not None
    assert twice.seconds - one.seconds == pytest.approx(least)


def test_problems_are_made_where_that_may_take_time(store: Store, machine: Machine) -> None:
    know(machine)
    found = by_name(estimated(line(sft(5)), store, machine, measure=lambda settings: {}))
    each = found["sft"].learned / 20
    # Such as "1+5=6" or "0-4=-4-8=-12", and the end.
    assert 5 < each < 14
    assert not any("unknown" in text for text in found["sft"].found)
    # What was counted is remembered: without making problems the same lengths come back.
    again = by_name(estimated(line(sft(5)), store, machine))
    assert again["sft"].learned == found["sft"].learned


def run_before(commit: Commit, graph: Any, *, steps: int, each: float) -> None:
    """`add`, `base` and an sft of so many steps are in the store."""
    commit(graph, "add", seconds=1.0)
    files = {"model.safetensors": WEIGHTS}
    commit(graph, "base", seconds=3.0, files=files)
    lines = [
        {"step": n, "total": steps, "tokens": 100 * n, "seconds": 1 + each * n}
        for n in range(1, steps + 1)
    ]
    facts = {"tokens": 100 * steps, "peak_memory": 700_000_000, "threads": 1}
    seconds = 2 + each * steps
    commit(graph, "sft", seconds=seconds, files=files, lines=lines, **facts)


def test_an_earlier_run_counts_more_than_a_calibration(
    store: Store, machine: Machine, commit: Commit
) -> None:
    know(machine, learn_token=100.0)
    run_before(commit, line(sft(10)), steps=10, each=0.5)
    (one,) = estimated(line(sft(30)), store, machine).stages
    assert one.name == "sft" and one.found[0] == "from 1 earlier run"
    # Two seconds beside the steps, and half a second for each.
    assert one.seconds == pytest.approx(2 + 0.5 * 30)
    assert one.tokens == 3000 and one.peak == 700_000_000


def test_a_run_with_other_settings_tells_by_its_tokens(
    store: Store, machine: Machine, commit: Commit
) -> None:
    know(machine, learn_token=100.0)
    run_before(commit, line(sft(10)), steps=10, each=0.5)
    (one,) = estimated(line(sft(10, loss_on="last")), store, machine).stages
    assert one.found[0] == "from 1 earlier run with other settings"
    # 5 seconds for 1,000 tokens, for as many as there are now.
    assert one.seconds == pytest.approx(2 + 5 * one.tokens / 1000)


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"device": "cuda (H100)"}])
def test_runs_on_another_machine_tell_nothing(
    store: Store, machine: Machine, commit: Commit, other: dict[str, str]
) -> None:
    graph = line(sft(10))
    commit(graph, "add", seconds=1.0)
    commit(graph, "base", seconds=3.0, files={"model.safetensors": WEIGHTS})
    commit(graph, "sft", seconds=9.0, files={"model.safetensors": WEIGHTS}, **other)
    (one,) = estimated(line(sft(30)), store, machine).stages
    assert one.seconds is None


def test_responses_are_bounds_until_something_tells_their_length(
    store: Store, machine: Machine, commit: Commit
) -> None:
    inputs = {"start": "base", "domains.add": "add"}

    def rl(steps: int) -> Any:
        sizes = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 30}
        return stage("rl", "rl", inputs, steps=steps, **sizes)

    graph = line(rl(5))
    first = by_name(estimated(graph, store, machine))["rl"]
    # The base has learned demonstrations, but nobody knows how long: 64 tokens are above the bound.
    assert first.sampled == 5 * 4 * 30
    assert "upper bound: all responses at max_new_tokens = 30" in first.found
    commit(graph, "add", seconds=1.0)
    commit(graph, "base", seconds=3.0, files={"model.safetensors": WEIGHTS})
    lines = [
        {"step": n, "tokens": 12 * n, "seconds": n, "response_length": 3.0, "train_fraction": 0.5}
        for n in range(1, 6)
    ]
    files = {"model.safetensors": WEIGHTS}
    commit(graph, "rl", seconds=6.0, files=files, lines=lines, tokens=60)
    (after,) = estimated(line(rl(10)), store, machine).stages
    assert after.sampled == 10 * 4 * 3 and after.learned == 10 * 2 * 3
    assert any("responses of 3 tokens from 1 earlier run" in text for text in after.found)


def test_a_stopped_stage_has_its_last_steps_left(store: Store, machine: Machine) -> None:
    from posttrain.engine.work import write_step

    know(machine, learn_token=1e-3)
    graph = line()
    work = store.begin(graph.fingerprints()["base"])
    assert work is not None
    whole = by_name(estimated(line(steps=10), store, machine))["base"]
    write_step(work.path, 8)
    rest = by_name(estimated(graph, store, machine))["base"]
    work.release()
    assert rest.learned == pytest.approx(0.2 * whole.learned)
    assert "the 2 steps that are left" in rest.found


def test_what_does_not_fit_is_told_with_what_helps(store: Store) -> None:
    small = Machine(jobs=2, cores=2, total=900 << 20, memory=450 << 20, given=True)
    wide = {**SIZES, "hidden_size": 2048, "num_layers": 4, "intermediate_size": 4096}
    big = stage("pretrain", "big", {"domains.add": "add"}, steps=2, batch_size=4, **wide)
    told = what_does_not_fit(estimated(line(big), store, small))
    text = next(one for one in told if one.startswith("big"))
    assert "and --memory is 450M (472 MB)" in text and 'optimizer.states = "int8"' in text
    assert "most of it for the model that learns" in text
    assert "a smaller model or more memory" in text


def test_an_adapter_from_outside_has_the_size_of_its_base(
    store: Store, machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    runtime = {"directory": str(tmp_path), "files": ["adapter_config.json"]}
    taken = Node(name="taken", kind="model", config={}, inputs={"base": "base"}, runtime=runtime)
    more = stage("sft", "more", {"start": "taken", "domains.add": "add"}, steps=5, batch_size=4)
    found = by_name(estimated(line(taken, more), store, machine))
    assert found["more"].parameters == found["base"].parameters
    assert found["more"].peak > 400 << 20


def test_the_disk_has_to_hold_everything(store: Store, machine: Machine) -> None:
    assert what_does_not_fit(estimated(line(sft(5)), store, machine)) == []
    (text,) = what_does_not_fit(estimated(line(sft(5)), store, machine, free=1000))
    assert text.startswith("disk: ") and "1 kB are free" in text and "posttrain gc" in text


def test_stages_at_once_share_the_memory(store: Store) -> None:
    tight = Machine(jobs=2, cores=2, total=800 << 20, memory=700 << 20)
    know(tight, learn_token=1e-3)
    inputs = {"start": "base", "domains.add": "add"}
    other = stage("sft", "other", inputs, steps=5, batch_size=4, lr=0.5)
    both = stage("merge", "both", {"models.a": "sft", "models.b": "other"})
    told = what_does_not_fit(estimated(line(sft(5), other, both), store, tight))
    assert any("sft, other at once" in text and "--jobs 1" in text for text in told)


def test_damaged_caches_are_done_without(own_cache: Any, machine: Machine) -> None:
    know(machine)
    (path,) = (own_cache / "posttrain").glob("rates-*.json")
    assert len(read_rates()) == 1
    path.write_text('{"format": 1, "entries": {"x": {"learn_token": "fast"}}}')
    assert read_rates() == {}
    path.write_text("[")
    assert read_rates() == {}


def test_tokens_are_counted_with_the_template(models: dict[str, str]) -> None:
    directory = Path(models["one"])
    assert Characters().prompt("1+1=") == 6 and Characters().response("2") == 2
    from posttrain.backends.checkpoint import read_chat

    chat, counter = read_chat(directory), Checkpoint(directory)
    for text in ("77", "lamp"):
        assert counter.prompt(text) == len(chat.prompt(text))
        assert counter.response(text) == len(chat.response("1+1=", text))


def test_needed_memory_follows_the_largest_teacher(store: Store, machine: Machine) -> None:
    inputs = {"start": "base", "domains.add": "add", "teachers.a": "sft", "teachers.b": "base"}
    one = {"start": "base", "domains.add": "add", "teachers.a": "sft"}
    peaks = []
    for edges, routes in ((inputs, {"add": ("a", "b")}), (one, {"add": "a"})):
        student = stage("distill", "student", edges, steps=2, routes=routes)
        found = by_name(estimated(line(sft(5), student), store, machine))["student"]
        peaks.append(found.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    assert GIB > peaks[0] > 400 << 20
