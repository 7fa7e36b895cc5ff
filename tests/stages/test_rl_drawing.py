"""Which problems an rl stage draws: each setting does what it says, and stopped stages go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain import judges, schedules
from posttrain.algorithms import Band, Gaussian, InTurn, Reprofile
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config

BASE: dict[str, Any] = {
    "steps": 6,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
}
FEW = 8
"""Problems per domain of the inputs `few`: several passes in one stage."""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"format": 1, "name": path.parent.name, "kind": path.stem, "fingerprint": "1" * 64}
    (path.parent / "record.json").write_text(json.dumps(record))
    return str(path.parent)


@pytest.fixture
def few(tmp_path: Path, domains: Mapping[str, str]) -> dict[str, str]:
    """Inputs of rl: a few problems of each domain, and a profile of them.

    The n-th problem of a domain has the pass rate n / 8.
    """
    rows = [row for path in domains.values() for row in read(Path(path) / "train.jsonl")[:FEW]]
    profile = [
        {"id": row["id"], "domain": row["domain"], "rate": number % FEW / FEW, "samples": 8}
        for number, row in enumerate(rows)
    ]
    return {
        **domains,
        "prompts": write(tmp_path / "few" / "prompts.jsonl", rows),
        "profile": write(tmp_path / "profile" / "profile.jsonl", profile),
    }


def needs_profile(changes: Mapping[str, Any]) -> bool:
    return not isinstance(changes.get("draw", InTurn()), InTurn)


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], few: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(work: Path | None = None, **changes: Any) -> Any:
        edges = {k: v for k, v in few.items() if k != "profile" or needs_profile(changes)}
        return run_stage("rl", BASE | changes, {"start": models["start"], **edges}, work)

    return run


@pytest.fixture
def rates(few: Mapping[str, str]) -> dict[str, float]:
    """The pass rate of every problem in the profile."""
    return {row["id"]: row["rate"] for row in read(Path(few["profile"]) / "profile.jsonl")}


def groups(ran: Any, size: int = 4) -> list[list[dict[str, Any]]]:
    """By step, what was drawn: id, domain and mean reward of each group."""
    rows = read(ran.out / "rollouts.jsonl")
    steps: list[list[dict[str, Any]]] = [[] for _ in ran.lines]
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        assert len({row["id"] for row in group}) == 1
        rewards = [row["reward"] for row in group]
        steps[group[0]["step"]].append(
            {k: group[0][k] for k in ("id", "domain")}
            | {"rate": sum(rewards) / size, "flat": len(set(rewards)) == 1}
        )
    return steps


def drawn(ran: Any, step: int) -> dict[str, int]:
    return dict(Counter(group["domain"] for group in groups(ran)[step]))


def test_domains_have_their_shares_and_one_comes_late(rl: Callable[..., Any]) -> None:
    """R1's last stage: general prompts join in the last part only."""
    mix = schedules.steps({0: {"short": 1, "words": 0}, 4: {"short": 1, "words": 2}})
    ran = rl(domain_shares=mix)
    assert [drawn(ran, step) for step in range(6)] == [{"short": 6}] * 4 + [
        {"short": 2, "words": 4}
    ] * 2
    assert [line["setting/domain_shares/words"] for line in ran.lines] == [0] * 4 + [2] * 2
    assert "reward/words" not in ran.lines[0] and "reward/words" in ran.lines[5]


def test_even_shares_are_the_default(rl: Callable[..., Any], same: Any) -> None:
    assert same(rl(), rl(domain_shares={"short": 2, "words": 2}))
    assert not same(rl(), rl(domain_shares={"short": 1, "words": 2}))


def test_draws_go_on_until_every_group_has_contrast(rl: Callable[..., Any]) -> None:
    plain, ran = rl(steps=4), rl(steps=4, draw=InTurn(dynamic_sampling=3))
    assert "draws" not in plain.lines[0]
    assert max(line["draws"] for line in ran.lines) > 1
    for line, found in zip(ran.lines, groups(ran), strict=True):
        wanted, got = {"short": 3, "words": 3}, Counter[str]()
        place, draws = 0, 0
        # The draws of a step as they must have been: each asks for what is missing by then.
        while place < len(found):
            size = sum(wanted.values()) - sum(got.values())
            part, place, draws = found[place : place + size], place + size, draws + 1
            missing = {d: n - got[d] for d, n in wanted.items() if n > got[d]}
            assert Counter(group["domain"] for group in part) == missing
            got.update(group["domain"] for group in part if not group["flat"])
        assert line["draws"] == draws
        assert draws == 4 or got == wanted
        contrast = [not group["flat"] for group in found]
        assert line["train_fraction"] == pytest.approx(sum(contrast) / len(found), rel=1e-5)
        mean = sum(group["rate"] for group in found) / len(found)
        assert line["reward"] == pytest.approx(mean, abs=1e-5)
    assert sum(r["num_tokens"] for r in read(ran.out / "rollouts.jsonl")) == ran.lines[-1]["tokens"]


def test_the_first_draw_is_that_of_a_stage_without_more(rl: Callable[..., Any]) -> None:
    one, more = rl(steps=1), rl(steps=1, draw=InTurn(dynamic_sampling=3))
    first = read(one.out / "rollouts.jsonl")
    assert read(more.out / "rollouts.jsonl")[: len(first)] == first


def test_solved_problems_are_retired_and_come_back(rl: Callable[..., Any]) -> None:
    """Sixteen problems, six per step; `words` is solved by chance so often that it is used up."""
    limit = 0.5
    ran = rl(steps=12, draw=InTurn(retire_above=limit))
    retired: dict[str, set[str]] = {"short": set(), "words": set()}
    back = 0
    for line, found in zip(ran.lines, groups(ran), strict=True):
        assert not any(group["id"] in retired[group["domain"]] for group in found)
        for group in found:
            known = retired[group["domain"]]
            (known.add if group["rate"] >= limit else known.discard)(group["id"])
        for known in retired.values():
            if len(known) == FEW:
                known.clear()
                back += 1
        share = sum(map(len, retired.values())) / (2 * FEW)
        assert line["retired_share"] == pytest.approx(share, abs=1e-5)
    assert back > 0, "the test means something only where a domain was used up"


def test_a_band_moves_from_moderate_to_hard(
    rl: Callable[..., Any], rates: Mapping[str, float]
) -> None:
    """GLM-4.5's two steps of difficulty (arXiv 2508.06471, 3.2)."""
    ran = rl(
        draw=Band(schedules.steps({0: 0.25, 3: 0.0}), schedules.steps({0: 0.75, 3: 0.125})),
    )
    seen = [{rates[group["id"]] for group in found} for found in groups(ran)]
    assert all(min(found) >= 0.25 and max(found) <= 0.75 for found in seen[:3])
    assert seen[3:] == [{0.0, 0.125}] * 3
    assert [line["open_share"] for line in ran.lines] == [0.625] * 3 + [0.25] * 3
    assert ran.lines[4]["known_rate"] == pytest.approx(0.0625)


def test_the_gaussian_follows_its_target(
    rl: Callable[..., Any], rates: Mapping[str, float]
) -> None:
    ran = rl(
        draw=Gaussian(schedules.linear(0.875, 0.0), spread=0.05),
        prompts_per_step=2,
    )
    means = [sum(rates[group["id"]] for group in found) / 2 for found in groups(ran)]
    assert means == pytest.approx([line["known_rate"] for line in ran.lines])
    assert means == pytest.approx([0.875 * (1 - step / 5) for step in range(6)], abs=0.13)
    assert all(drawn(ran, step) == {"short": 1, "words": 1} for step in range(6))


def test_rates_are_updated_by_what_is_sampled(
    rl: Callable[..., Any], rates: Mapping[str, float]
) -> None:
    """A problem leaves the band once its group is outside."""
    fixed, updated = rl(draw=Band(high=0.5)), rl(draw=Band(high=0.5, update_rates=True))
    known, outside = dict(rates), 0
    for line, found in zip(updated.lines, groups(updated), strict=True):
        assert line["open_share"] == sum(rate <= 0.5 for rate in known.values()) / len(known)
        if line["open_share"] > 0.5:
            assert all(known[group["id"]] <= 0.5 for group in found)
        known |= {group["id"]: group["rate"] for group in found}
        outside += sum(group["rate"] > 0.5 for group in found)
    assert outside > 0
    assert {line["open_share"] for line in fixed.lines} == {0.625}


def test_the_policy_is_profiled_anew(rl: Callable[..., Any], rates: Mapping[str, float]) -> None:
    ran = rl(draw=Gaussian(reprofile=Reprofile(every=2, samples=4, prompts=5)))
    assert sorted(path.name for path in ran.out.glob("profile-*")) == [
        "profile-2.jsonl",
        "profile-4.jsonl",
    ]
    known = dict(rates)
    sampled = Counter[int]()
    for step in (2, 4):
        rows = read(ran.out / f"profile-{step}.jsonl")
        assert Counter(row["domain"] for row in rows) == {"short": 5, "words": 5}
        assert {row["samples"] for row in rows} == {4}
        assert {row["rate"] for row in rows} <= {0, 0.25, 0.5, 0.75, 1}
        known |= {row["id"]: row["rate"] for row in rows}
        found = groups(ran)[step]
        mean = sum(known[group["id"]] for group in found) / len(found)
        assert ran.lines[step]["known_rate"] == pytest.approx(mean, abs=1e-5)
    for row in read(ran.out / "rollouts.jsonl"):
        sampled[row["step"]] += row["num_tokens"]
    before = [0, *(line["tokens"] for line in ran.lines)]
    more = [before[step + 1] - before[step] - sampled[step] for step in range(6)]
    assert [tokens > 0 for tokens in more] == [False, False, True, False, True, False]
    assert [line["profiled"] for line in ran.lines] == [0, 0, 10, 0, 10, 0]


def test_a_profile_holds_pass_rates_whatever_the_reward_is(rl: Callable[..., Any]) -> None:
    """With a reward that is 1 for everything the profile has what the verifiers say."""
    reward = judges.constant(1.0).to_json()
    draw = Band(reprofile=Reprofile(every=1))
    ran = rl(draw=draw, reward=reward, steps=2, drop_zero_variance=False)
    rates = {row["rate"] for row in read(ran.out / "profile-1.jsonl")}
    assert [line["reward"] for line in ran.lines] == [1, 1]
    assert min(rates) < 1


def test_a_plateau_makes_a_profile(rl: Callable[..., Any]) -> None:
    ran = rl(draw=Band(reprofile=Reprofile(on_plateau=1, samples=2)))
    reward = [line["reward"] for line in ran.lines]
    expected, begin = [], 0
    for step in range(2, 6):
        if step - begin >= 2 and reward[step - 1] - reward[step - 2] < 0.01:
            expected.append(step)
            begin = step
    assert expected, "the test means something only where the reward falls"
    assert [step for step in range(6) if (ran.out / f"profile-{step}.jsonl").exists()] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"domain_shares": {"short": 1, "words": 2}, "prompts_per_step": 5},
        {
            "draw": InTurn(dynamic_sampling=3),
            "prompts_per_step": schedules.steps({0: 3, 2: 7}),
        },
        {
            "draw": InTurn(retire_above=0.5),
            "group_size": schedules.steps({0: 2, 2: 4}),
            "steps": 8,
        },
        {
            "draw": Gaussian(
                schedules.on_plateau(0.8, 0.2, change=-0.2, patience=1, gain=9.0),
                update_rates=True,
            )
        },
        {
            "draw": Band(
                high=0.5,
                update_rates=True,
                reprofile=Reprofile(every=2, on_plateau=1, prompts=5),
            )
        },
        {"draw": InTurn(dynamic_sampling=1, retire_above=0.5), "top_p": 0.8},
    ],
    ids=["shares", "dynamic", "retire", "gaussian", "reprofile", "top_p"],
)
def test_a_stopped_stage_goes_on_to_the_same_bits(
    changes: dict[str, Any], rl: Callable[..., Any], goes_on: Callable[..., Any]
) -> None:
    """Saved after four steps, killed after the fifth: that one is made twice."""
    calm, stopped = goes_on(lambda work: rl(work, **changes), saved=4, killed=5)
    # How often samples are kept depends on the time that they take.
    names = {path.name for path in calm.out.glob("*.jsonl")} - {"samples.jsonl"}
    assert names == {path.name for path in stopped.out.glob("*.jsonl")} - {"samples.jsonl"}
    for name in names:
        assert (calm.out / name).read_bytes() == (stopped.out / name).read_bytes()


def test_a_profile_of_other_problems_is_told(
    run_stage: Callable[..., Any], models: Mapping[str, str], few: dict[str, str], tmp_path: Path
) -> None:
    rows = [row for row in read(Path(few["profile"]) / "profile.jsonl") if row["domain"] == "short"]
    inputs = few | {"profile": write(tmp_path / "half" / "profile.jsonl", rows)}
    with pytest.raises(ConfigError, match="no pass rate for any problem of domain 'words'"):
        run_stage("rl", BASE | {"draw": Band()}, {"start": models["start"], **inputs})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_shares": {"short": -1}}, "greater than or equal to 0"),
        ({"domain_shares": {"short": 0}}, "nothing to draw"),
        (
            {"domain_shares": schedules.steps({0: {"short": 1}, 3: {"short": 0}})},
            "nothing to draw",
        ),
        (
            {
                "domain_shares": {
                    "schedule": "linear",
                    "first": {"short": 1},
                    "last": {"short": 2},
                    "until": None,
                }
            },
            "it calculates with numbers",
        ),
        ({"draw": {"kind": "in_turn", "retire_above": 0}}, r"'draw\.retire_above': 0 is not allow"),
        ({"draw": "hard"}, "there is no 'hard'; choices: band, gaussian, in_turn"),
        ({"draw": {"kind": "in_turn", "low": 0.2}}, r"'draw\.low': unknown option"),
        ({"draw": {"kind": "in_turn", "update_rates": True}}, r"'draw\.update_rates': unknown"),
        ({"draw": {"kind": "band", "spread": 0.1}}, r"'draw\.spread': unknown option"),
        ({"draw": {"kind": "gaussian", "high": 0.5}}, r"'draw\.high': unknown option"),
        ({"draw": {"kind": "band", "low": 0.6, "high": 0.5}}, "low = 0.6 is above high = 0.5: no"),
        (
            {"draw": {"kind": "band", "low": schedules.steps({0: 0, 3: 1.0}), "high": 0.5}},
            "at step 3: low = 1 is above high = 0.5",
        ),
        (
            {
                "draw": {
                    "kind": "band",
                    "low": schedules.on_plateau(0.1, 0.6, change=0.1),
                    "high": 0.5,
                }
            },
            "low = 0.6 .*no pass rate",
        ),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config("rl", "mine", BASE | changes)
