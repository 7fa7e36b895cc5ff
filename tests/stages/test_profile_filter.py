"""profile and filter: how hard problems are for a model, and which of them stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config
from posttrain.stages.curation import across_modes, choose
from posttrain.stages.settings.data import Filter

PROFILE: dict[str, Any] = {"n": 4, "max_new_tokens": 6, "num_prompts": 70}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def profile(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    def run(model: str = "one", **changes: Any) -> Any:
        return run_stage("profile", PROFILE | changes, {"model": models[model], **domains})

    return run


def test_rates_are_the_mean_rewards_of_samples(
    profile: Callable[..., Any],
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    """The same draws as those of `sample` with as many responses."""
    ran = profile()
    rows = rows_of(ran.out / "profile.jsonl")
    settings = {"k": 4, "max_new_tokens": 6, "num_prompts": 70}
    settings |= {"routes": {"short": ["one"], "words": ["one"]}}
    sampled = run_stage("sample", settings, {"models.one": models["one"], **domains})
    rewards: dict[tuple[str, str], list[float]] = {}
    for row in rows_of(sampled.out / "rollouts.jsonl"):
        rewards.setdefault((row["domain"], row["id"]), []).append(row["reward"])
    assert {(r["domain"], r["id"]): r["rate"] for r in rows} == {
        key: sum(found) / 4 for key, found in rewards.items()
    }
    assert {row["samples"] for row in rows} == {4}
    assert ran.metrics["rows"] == 140
    assert ran.metrics["rate"] == pytest.approx(sum(r["rate"] for r in rows) / 140)
    assert ran.metrics["unsolved_share"] == sum(r["rate"] == 0 for r in rows) / 140
    assert ran.metrics["solved_share"] == sum(r["rate"] == 1 for r in rows) / 140
    assert 0 < ran.metrics["rate"] < 1


def test_every_setting_changes_the_profile(profile: Callable[..., Any]) -> None:
    changes = [{}, {"seed": 1}, {"n": 3}, {"num_prompts": 60}, {"first_prompt": 5}]
    changes += [{"max_new_tokens": 4}, {"temperature": 0.3}, {"model": "two"}]
    texts = {(profile(**change).out / "profile.jsonl").read_text() for change in changes}
    assert len(texts) == len(changes)


RATES = {("d", str(i), None): rate for i, rate in enumerate([0.0, 0.25, 0.5, 0.75, 1.0, 0.0])}
OTHERS = dict(zip(RATES, [1.0, 0.25, 0.0, 0.5, 1.0, 0.0], strict=True))
PROBLEMS = [{"domain": "d", "id": str(i)} for i in range(6)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "012345"),
        ({"low": 0.25, "high": 0.75}, "123"),
        ({"high": 0.625}, "0125"),
        ({"low": 0.25, "keep_unsolved": 1.0}, "012345"),
        ({"keep_unsolved": 0.0}, "1234"),
        ({"low": 1.0, "at_least": 2}, "34"),
        ({"low": 0.9, "high": 0.9, "at_least": 3}, "234"),
        ({"high": 0.0, "at_least": 1}, "05"),
        ({"against_high": 0.0}, "25"),
        ({"against_low": 0.5}, "034"),
        ({"low": 0.25, "against_high": 0.25}, "12"),
        ({"min_gain": 0.25}, "23"),
        ({"min_gain": -1.0}, "012345"),
        ({"min_gain": 0.5, "at_least": 2}, "23"),
    ],
)
def test_bands_by_hand(settings: dict[str, Any], expected: str) -> None:
    """Rates 0, 1/4, 1/2, 3/4, 1, 0 against 1, 1/4, 0, 1/2, 1, 0: gains -1, 0, 1/2, 1/4, 0, 0."""
    kept = choose(Filter(**settings), PROBLEMS, RATES, OTHERS)
    assert "".join(problem["id"] for problem in kept) == expected


def test_a_share_of_the_unsolved_stays() -> None:
    """A tenth of 2000, give or take five standard deviations of 13.4; the same ones every time,
    others under another seed."""
    problems = [{"domain": "d", "id": str(i)} for i in range(2000)]
    rates = {("d", str(i), None): 0.0 for i in range(2000)}
    first, again, other = (
        choose(Filter(keep_unsolved=0.1, seed=seed), problems, rates, {}) for seed in (0, 0, 1)
    )
    assert abs(len(first) - 200) < 67 and abs(len(other) - 200) < 67
    assert first == again != other


@pytest.fixture
def filtered(
    run_stage: Callable[..., Any], domains: Mapping[str, str], tmp_path: Path
) -> Callable[..., Any]:
    def run(rates: Mapping[str, float] | None = None, **settings: Any) -> Any:
        folder = tmp_path / f"profile-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        rows = []
        for edge, path in domains.items():
            for i, problem in enumerate(rows_of(Path(path) / "train.jsonl")[:60]):
                rate = (i % 5) / 4
                rows.append({"domain": edge.removeprefix("domains."), "id": problem["id"]})
                rows[-1] |= {"rate": rate, "samples": 4}
        (folder / "profile.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return run_stage("filter", settings, {"profile": str(folder), **domains})

    return run


def test_whole_problem_rows_of_profiled_problems_stay(
    filtered: Callable[..., Any], domains: Mapping[str, str]
) -> None:
    ran = filtered(low=0.5, high=0.75)
    rows = rows_of(ran.out / "prompts.jsonl")
    short = rows_of(Path(domains["domains.short"]) / "train.jsonl")
    total = sum(len(rows_of(Path(path) / "train.jsonl")) for path in domains.values())
    kept = [row for row in rows if row["domain"] == "short"]
    assert kept == [row for i, row in enumerate(short[:60]) if i % 5 in (2, 3)]
    assert ran.metrics == {
        "rows": 48,
        "kept_share": pytest.approx(48 / total),
        "profiled_share": pytest.approx(120 / total),
        "rate": pytest.approx(0.625),
    }


def test_modes_are_profiled_apart(filtered: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no profile has a problem of domain 'short' among"):
        filtered(modes=["think"])


def test_a_profile_of_one_mode_stands_for_the_other() -> None:
    problems = [{"domain": "d", "id": i, "mode": "think"} for i in "ab"]
    one = {("d", "a", "no_think"): 0.25}
    assert across_modes(one, problems) == one | {("d", "a", "think"): 0.25}
    both = one | {("d", "b", "think"): 1.0}
    assert across_modes(both, problems) == both
    assert across_modes({("d", "a", None): 0.5}, problems) == {("d", "a", None): 0.5}


def test_filtered_prompts_are_what_a_stage_draws(
    filtered: Callable[..., Any],
    run_stage: Callable[..., Any],
    models: Mapping[str, str],
    domains: Mapping[str, str],
) -> None:
    """sample, profile, rl and a second filter see the chosen problems alone."""
    (chosen := filtered(low=0.5, high=0.75).out / "record.json").write_text(
        '{"format": 1, "name": "filtered", "kind": "filter", "fingerprint": "2222"}'
    )
    inputs = {"prompts": str(chosen.parent), **domains}
    ids = {row["id"] for row in rows_of(chosen.parent / "prompts.jsonl")}
    settings = {"k": 1, "max_new_tokens": 3, "routes": {"short": ["one"], "words": ["one"]}}
    sampled = run_stage("sample", settings, inputs | {"models.one": models["one"]})
    assert {row["id"] for row in rows_of(sampled.out / "rollouts.jsonl")} == ids
    again = run_stage("profile", PROFILE | {"n": 2}, inputs | {"model": models["one"]})
    assert {row["id"] for row in rows_of(again.out / "profile.jsonl")} == ids
    (again.out / "record.json").write_text("{}")
    twice = run_stage("filter", {"at_least": 3}, inputs | {"profile": str(again.out)})
    assert {row["id"] for row in rows_of(twice.out / "prompts.jsonl")} <= ids
    reinforced = run_stage(
        "rl",
        {"steps": 3, "prompts_per_step": 8, "group_size": 2, "max_new_tokens": 3},
        inputs | {"start": models["one"]},
    )
    assert {row["id"] for row in rows_of(reinforced.out / "rollouts.jsonl")} <= ids


def test_a_filter_that_keeps_nothing_says_so(filtered: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"none of 60 prompts of domain 'short' is kept; .* 0 to 1; widen"
    ):
        filtered(low=0.8, high=0.9)
    assert filtered(low=0.8, high=0.9, at_least=1).metrics["rows"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.6, "high": 0.5}, "low = 0.6 is above high = 0.5"),
        ({"against_low": 0.6, "against_high": 0.5}, "against_low = 0.6 is above against_high"),
        ({"high": 1.5}, "field 'high': 1.5 is not allowed"),
        ({"keep_unsolved": -1}, "field 'keep_unsolved': -1 is not allowed"),
    ],
)
def test_bad_bands_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("filter", "mine", settings)
