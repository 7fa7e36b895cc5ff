"""Schedules and shares of domains in every stage that has steps: they act, and they resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import schedules
from posttrain.algorithms import AdamW, BradleyTerry, Dpo, InTurn
from posttrain.engine.errors import ConfigError
from posttrain.stages.config import build_config
from posttrain.stages.data import Batches, Pool

STEPS = 6
COMMON: dict[str, Any] = {"lr": 0.01, "warmup_steps": 1, "steps": STEPS}
ROLLOUT: dict[str, Any] = {"prompts_per_step": 6, "max_new_tokens": 5}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"batch_size": 8, "hidden_size": 16, "num_layers": 1, "max_positions": 32},
    "sft": {"batch_size": 8},
    "dpo": {"batch_size": 8, "lr": 0.003},
    "reward_model": {"batch_size": 8},
    "rl": {**ROLLOUT, "group_size": 4},
    "distill": {**ROLLOUT, "routes": {"short": "t", "words": "t"}},
}
SIZE = {"rl": "prompts_per_step", "distill": "prompts_per_step"}
"""The setting that counts the rows of a step; `batch_size` of the others."""
MAX_GRAD_NORM = "optimizer.max_grad_norm"
GIVEN = ("pretrain", "sft", "dpo", "reward_model", "distill")
"""Stages whose rows are drawn by `Batches`."""
ALWAYS = schedules.on_plateau(8, 14, change=3, metric="loss", patience=1, gain=1e9)
"""A number of rows that a metric decides on: 8, 8, 11, 11, 14, 14."""


@pytest.fixture
def train(run_stage: Callable[..., Any], edges: Callable[..., Any]) -> Callable[..., Any]:
    """Run a stage of a kind; `more` are further edges."""

    def run(
        kind: str, more: Mapping[str, str] | None = None, work: Path | None = None, **changes: Any
    ) -> Any:
        return run_stage(kind, COMMON | STAGES[kind] | changes, edges(kind, more), work)

    return run


def check(kind: str, **changes: Any) -> Any:
    """The checked settings of a stage."""
    return build_config(kind, "mine", COMMON | STAGES[kind] | changes)


def placed(path: str, value: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as in `rest`, with a value at a dotted path: `loss.beta`."""
    name, _, inner = path.partition(".")
    if not inner:
        return {**rest, name: value}
    return {**rest, name: placed(inner, value, rest.get(name, {}))}


def setting(ran: Any, path: str) -> list[float]:
    """The logged values of a setting, by its dotted path."""
    return [line[f"setting/{path.replace('.', '/')}"] for line in ran.lines]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """How many rows of each domain the steps of a stage draw, step by step."""
    seen: list[Counter[str]] = []
    draw = Batches.draw

    def watched(self: Batches, step_settings: Any) -> list[dict[str, Any]]:
        before = dict(self.drawn)
        rows = draw(self, step_settings)
        seen.append(Counter({name: self.drawn[name] - before[name] for name in before}))
        assert len(rows) == seen[-1].total()
        return rows

    monkeypatch.setattr(Batches, "draw", watched)
    return seen


@pytest.mark.parametrize("kind", STAGES)
def test_a_constant_schedule_is_the_constant(
    train: Callable[..., Any], kind: str, same: Any
) -> None:
    size, decay, norm = SIZE.get(kind, "batch_size"), "optimizer.weight_decay", MAX_GRAD_NORM
    values: dict[str, Any] = {decay: 0.5, norm: 0.3, size: 5}
    plain: dict[str, Any] = {}
    changing: dict[str, Any] = {}
    for path, value in values.items():
        plain = placed(path, value, plain)
        changing = placed(path, schedules.steps({0: value}), changing)
    constant = train(kind, **changing)
    assert same(constant, train(kind, **plain))
    for path, value in values.items():
        assert setting(constant, path) == [value] * STEPS


@pytest.mark.parametrize("name", ["lr", "optimizer.weight_decay", MAX_GRAD_NORM])
@pytest.mark.parametrize("kind", STAGES)
def test_the_optimiser_takes_the_values_of_the_step(
    train: Callable[..., Any], kind: str, name: str, same: Any
) -> None:
    """Another value from step 3 on: the first three steps are as without, the end is not."""
    early = {"lr": 0.01, "optimizer.weight_decay": 0.0, MAX_GRAD_NORM: 1e3}[name]
    late = {"lr": 0.002, "optimizer.weight_decay": 5.0, MAX_GRAD_NORM: 0.01}[name]
    plain = train(kind, **placed(name, early, {}))
    changed = train(kind, **placed(name, schedules.steps({0: early, 3: late}), {}))
    assert [line["lr"] for line in changed.lines[:3]] == [line["lr"] for line in plain.lines[:3]]
    assert changed.lines[2]["tokens"] == plain.lines[2]["tokens"]
    assert setting(changed, name) == [early] * 3 + [late] * 3
    assert not same(plain, changed)
    if name == "lr":
        shares = [c["lr"] / p["lr"] for c, p in zip(changed.lines, plain.lines, strict=True)]
        assert shares == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2], rel=1e-4)


@pytest.mark.parametrize("kind", GIVEN)
def test_rows_and_shares_change_with_the_steps(
    train: Callable[..., Any], kind: str, drawn: list[Counter[str]]
) -> None:
    """Four rows and then eight, first of `short` alone, then a quarter of them of `short`."""
    size = SIZE.get(kind, "batch_size")
    shares = {"short": schedules.steps({0: 1, 4: 1}), "words": schedules.steps({0: 0, 3: 3})}
    ran = train(kind, **{size: schedules.steps({0: 4, 3: 8})}, domain_shares=shares)
    assert [dict(step) for step in drawn] == [{"short": 4, "words": 0}] * 3 + [
        {"short": 2, "words": 6}
    ] * 3
    assert setting(ran, size) == [4] * 3 + [8] * 3
    assert setting(ran, "domain_shares.words") == [0] * 3 + [3] * 3


def test_steps_that_draw_unlike_numbers_leave_nothing_out() -> None:
    """Rows come as from one `Pool`, none twice in a pass; without schedules exactly as from it."""
    rows = {name: [{"id": f"{name}{i}"} for i in range(7)] for name in ("a", "b")}
    changing = check("sft", batch_size=schedules.alternate(3, 4, every=1))
    batches = Batches(rows, changing, size="batch_size", stage="mine")
    found = [
        row["id"] for step in range(4) for row in batches.draw(changing.at(step, 6, lambda _: []))
    ]
    assert len(found) == len(set(found)) == 14
    for count in (1, 5, 8):
        plain = check("sft", batch_size=count)
        batches = Batches(rows, plain, size="batch_size", stage="mine")
        pool = Pool(rows, seed=0)
        for step in range(9):
            assert batches.draw(plain) == pool.draw(step, count)


RESUMED: list[tuple[str, dict[str, Any]]] = [
    ("pretrain", {"batch_size": ALWAYS}),
    ("sft", {"batch_size": ALWAYS, "domain_shares": {"short": 1, "words": 2}}),
    ("dpo", {"batch_size": ALWAYS, "loss": Dpo(beta=schedules.linear(0.1, 1.0))}),
    (
        "reward_model",
        {"batch_size": ALWAYS, "loss": BradleyTerry(centring=schedules.linear(0.0, 0.1))},
    ),
    (
        "rl",
        {
            "prompts_per_step": schedules.alternate(3, 5, every=1),
            "optimizer": AdamW(
                weight_decay=schedules.track(
                    "reward", target=2.0, first=0.0, change=0.5, low=0.0, high=9.0
                )
            ),
            "draw": InTurn(retire_above=schedules.steps({0: None, 2: 0.5})),
        },
    ),
    (
        "distill",
        {
            "prompts_per_step": ALWAYS,
            "domain_shares": {"short": schedules.linear(1, 0), "words": 1},
            "temperature": schedules.track(
                "entropy", target=99.0, first=1.0, change=0.1, low=0.5, high=1.4
            ),
        },
    ),
]


@pytest.mark.parametrize(("kind", "changes"), RESUMED, ids=[kind for kind, _ in RESUMED])
def test_a_stopped_stage_goes_on_to_the_same_bits(
    kind: str, changes: dict[str, Any], train: Callable[..., Any], goes_on: Callable[..., Any]
) -> None:
    """Saved after four steps, killed after the fifth: that one is made twice."""
    calm, _ = goes_on(lambda work: train(kind, work=work, **changes), saved=4, killed=5)
    if changes.get("batch_size", changes.get("prompts_per_step")) is ALWAYS:
        size = setting(calm, SIZE.get(kind, "batch_size"))
        assert size == [8, 8, 11, 11, 14, 14]


@pytest.mark.parametrize("kind", ["sft", "dpo", "rl", "distill"])
def test_the_weight_of_an_auxiliary_loss_has_a_schedule(
    train: Callable[..., Any], kind: str, data: str, same: Any
) -> None:
    """With weight 0 it is measured and not learned; from step 3 on it is."""
    edge = {"aux.ptx": data}
    off = train(kind, edge, aux={"ptx": 0.0})
    late = train(kind, edge, aux={"ptx": schedules.steps({0: 0.0, 3: 5.0})})
    assert setting(late, "aux.ptx.weight") == [0.0] * 3 + [5.0] * 3
    assert [line.get("aux/ptx") for line in late.lines[:4]] == [
        line.get("aux/ptx") for line in off.lines[:4]
    ]
    assert not same(off, late)


Case = tuple[str, dict[str, Any], Any, Any]
"""Path of a setting, the other settings, its value at first and from step 3 on."""
MINIBATCHES = {"num_minibatches": 4, "lr": 0.05}
SAMPLED = {"kind": "sampled_token"}
KNOBS: dict[str, list[Case]] = {
    "dpo": [
        ("loss.beta", {"loss": {"kind": "dpo"}}, 0.5, 2.0),
        ("loss.nll_weight", {"loss": {"kind": "dpo"}}, 0.0, 1.0),
        ("loss.label_smoothing", {"loss": {"kind": "dpo_norm"}}, 0.0, 0.4),
        ("loss.gamma", {"loss": {"kind": "simpo"}}, 0.1, 3.0),
        ("loss.beta", {"loss": {"kind": "ipo"}}, 0.5, 2.0),
        ("loss.desirable_weight", {"loss": {"kind": "kto"}}, 1.0, 4.0),
        ("loss.undesirable_weight", {"loss": {"kind": "kto"}}, 1.0, 4.0),
    ],
    "reward_model": [("loss.centring", {"loss": {"kind": "bradley_terry"}}, 0.0, 1.0)],
    "distill": [
        ("estimator.beta", {"estimator": {"kind": "jsd"}}, 0.2, 0.8),
        ("estimator.k", {"estimator": {"kind": "top_k"}}, 4, 40),
        ("estimator.clip", {"estimator": SAMPLED}, None, 0.1),
        ("temperature", {}, 1.0, 0.5),
        ("max_new_tokens", {}, 5, 2),
        ("samples_per_prompt", {}, 1, 3),
        ("reward_weight", {"samples_per_prompt": 4}, 0.0, 5.0),
        (
            "correction.high",
            {"estimator": SAMPLED, "correction": {"kind": "truncated"}, "num_minibatches": 2},
            5.0,
            1.0,
        ),
    ],
    "rl": [
        ("kl.coef", {"kl": {"coef": 0.0}}, 0.1, 5.0),
        ("kl.domains", {"kl": {"coef": 0.5}}, {"short": 1.0}, {"short": 0.0}),
        ("surrogate.clip_high", {"surrogate": {"kind": "cispo"}, **MINIBATCHES}, 5.0, 0.01),
        ("surrogate.tau", {"surrogate": {"kind": "kimi"}}, 1.0, 9.0),
        ("surrogate.dual_clip", {"surrogate": {"kind": "clip"}, **MINIBATCHES}, None, 1.01),
        ("off_policy_delta", MINIBATCHES, None, 0.0),
        ("advantage.lam", {"advantage": {"kind": "gae"}}, 0.95, 0.0),
        ("advantage.gamma", {"advantage": {"kind": "gae"}}, 1.0, 0.5),
        (
            "advantage.value_clip",
            {"advantage": {"kind": "gae"}, "num_minibatches": 2},
            None,
            1e-3,
        ),
        ("draw.dynamic_sampling", {"draw": {"kind": "in_turn"}}, 0, 3),
        (
            "correction.low",
            {"correction": {"kind": "icepop"}, "num_minibatches": 2, "lr": 0.05},
            0.0,
            1.0,
        ),
    ],
}


@pytest.mark.parametrize(
    ("kind", "path", "others", "early", "late"),
    [
        pytest.param(kind, *case, id=f"{kind}-{case[0]}")
        for kind, cases in KNOBS.items()
        for case in cases
    ],
)
def test_a_knob_acts_from_its_step_on(
    train: Callable[..., Any],
    kind: str,
    path: str,
    others: dict[str, Any],
    early: Any,
    late: Any,
    same: Any,
) -> None:
    """The steps before are those of the first value, and the end is another."""
    first = train(kind, **placed(path, early, others))
    changed = train(kind, **placed(path, schedules.steps({0: early, 3: late}), others))
    for theirs, ours in zip(first.lines[:3], changed.lines[:3], strict=True):
        # A schedule of reward_weight verifies from the first step on, and so logs the reward.
        assert theirs.items() - {("seconds", theirs["seconds"])} <= ours.items()
    assert not same(first, changed)
    if not isinstance(late, dict):
        name = f"setting/{path.replace('.', '/')}"
        assert [line[name] for line in changed.lines[3:]] == [late] * 3
        assert changed.lines[0].get(name) == early


def test_the_weight_of_a_domain_has_a_schedule(train: Callable[..., Any], same: Any) -> None:
    """An entry of a dict is as the dict itself; the other entry stays."""
    both = {"short": 0.0, "words": 2.0}
    entry = schedules.steps({0: 1.0, 3: 0.0})
    ran = train("distill", domain_weights={"short": entry, "words": 2.0})
    whole = schedules.steps({0: both | {"short": 1.0}, 3: both})
    assert same(ran, train("distill", domain_weights=whole))
    assert not same(ran, train("distill", domain_weights=both))
    assert setting(ran, "domain_weights.short") == [1, 1, 1, 0, 0, 0]
    assert "setting/domain_weights/words" not in ran.lines[0]


def test_settings_that_count_are_rounded_and_others_are_not() -> None:
    settings = check("sft", batch_size=schedules.linear(8, 16), aux={"x": schedules.linear(1, 0)})
    found = [settings.at(step, 4, lambda _: []) for step in range(4)]
    assert [s.batch_size for s in found] == [8, 11, 13, 16]
    assert [s.aux["x"].weight for s in found] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_rows_of_a_data_artifact_have_domains_of_their_own(
    train: Callable[..., Any], data: str, drawn: list[Counter[str]]
) -> None:
    train("sft", {"data": data}, domain_shares={"short": 0, "words": 1})
    assert all(step == {"short": 0, "words": 8} for step in drawn)
    for kind in ("sft", "dpo", "reward_model"):
        edge = {"data": data}
        with pytest.raises(
            ConfigError, match=r"my_.*'x' is not one of the domains; .*short, words"
        ):
            train(kind, edge, domain_shares={"x": 1})
        with pytest.raises(ConfigError, match="no share to domain 'words'; write 'words': 0"):
            train(kind, edge, domain_shares={"short": 1})


def test_a_metric_that_is_not_logged_is_told(train: Callable[..., Any]) -> None:
    lr = schedules.on_plateau(0.01, 0.001, times=0.5)
    with pytest.raises(ConfigError, match="schedule of lr reads the metric 'reward', which this"):
        train("sft", lr=lr)


BOTH = {"a": schedules.linear(1, 0), "b": schedules.steps({0: 0, 5: 0})}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "sft",
            {"optimizer": {"beta1": schedules.linear(0.1, 0.2)}},
            "beta1 cannot have a schedule; settings that can: weight_decay, max_grad_norm",
        ),
        ("sft", {"lr": schedules.linear(0.1, 0.0)}, "lr = 0.0 of its schedule.*greater than 0"),
        ("sft", {"batch_size": schedules.linear(4, 0)}, "batch_size = 0 of its schedule"),
        ("sft", {"batch_size": schedules.linear(4.5, 8)}, "batch_size"),
        (
            "sft",
            {"steps": None, "epochs": 2, "batch_size": schedules.linear(4, 8)},
            "epochs = 2 with a schedule of batch_size: .*give steps",
        ),
        ("sft", {"aux": {"x": schedules.linear(1.0, -1.0)}}, "weight = -1.0 of its schedule"),
        ("sft", {"aux": schedules.steps({0: {"x": 1.0}})}, "aux cannot have a schedule"),
        ("sft", {"aux": {"x": {"schedule": "linar"}}}, "schedule 'linar' is not known"),
        ("sft", {"domain_shares": BOTH}, "domain_shares.a = 0.*domain_shares.b = 0.*nothing"),
        (
            "dpo",
            {"loss": {"kind": "dpo", "gamma": schedules.linear(0.5, 0.6)}},
            "gamma cannot have a schedule; settings that can: beta, label_smoothing, nll_weight",
        ),
        (
            "dpo",
            {"loss": {"kind": "kto", "beta": schedules.linear(0.1, 0.0)}},
            "beta = 0.0 of its schedule",
        ),
        (
            "distill",
            {"reward_weight": schedules.linear(0.0, 1.0)},
            "reward_weight = 1.0 of its schedule.*samples_per_prompt to 2 or more",
        ),
        (
            "distill",
            {
                "correction": "truncated",
                "samples_per_prompt": 4,
                "reward_weight": schedules.linear(1.0, 0.0),
            },
            "reward_weight = 0.0 of its schedule.*nothing to correct",
        ),
        (
            "distill",
            {"domain_weights": {"short": schedules.linear(1.0, 0.0), "shrt": 1.0}},
            "domain_weights: 'shrt' is not a domain",
        ),
        (
            "rl",
            {"num_minibatches": schedules.linear(1, 2)},
            "num_minibatches cannot have a schedule",
        ),
        (
            "evaluate",
            {"num_problems": schedules.linear(1, 2)},
            "settings that can: none here",
        ),
    ],
)
def test_mistakes_are_told(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base = {} if kind == "evaluate" else COMMON | STAGES[kind]
        build_config(kind, "mine", base | changes)


def test_shares_may_change_places() -> None:
    """One domain fades out while the other comes in: at no step is there nothing to draw."""
    shares = {"a": schedules.linear(1, 0), "b": schedules.linear(0, 1)}
    settings = check("sft", domain_shares=shares)
    again = check("sft", **settings.to_json())
    for found in (settings, again):
        ends = [found.at(step, STEPS, lambda _: []).domain_shares for step in (0, STEPS - 1)]
        assert ends == [{"a": 1, "b": 0}, {"a": 0, "b": 1}]


def test_weights_of_the_last_steps_are_those_of_the_present_decay(
    train: Callable[..., Any],
) -> None:
    """Decay by hand: with lr 0.01 at its peak and decay 50 each step halves every weight."""
    settings = {"lr_decay": "constant", "warmup_steps": 0, "steps": 2}

    def decayed(decay: Any) -> dict[str, torch.Tensor]:
        optimizer = {"max_grad_norm": 1e-9, "weight_decay": decay}
        weights: dict[str, torch.Tensor] = train("sft", **settings, optimizer=optimizer).weights()
        return weights

    plain, halved = decayed(0.0), decayed(schedules.steps({0: 0.0, 1: 50.0}))
    # Adam moves a weight by lr at most, whatever the gradient: 0.01 per step.
    for name, weight in plain.items():
        torch.testing.assert_close(halved[name], weight / 2, atol=0.011, rtol=0)


def test_the_critic_takes_the_values_of_the_step(train: Callable[..., Any]) -> None:
    """While the critic alone learns, nothing else can tell the two runs apart."""
    settings = {"advantage": {"kind": "gae", "warmup_steps": 5}}
    plain = train("rl", **settings)
    decay = {"weight_decay": schedules.steps({0: 0.0, 2: 9.0})}
    decayed = train("rl", **settings, optimizer=decay)
    losses = [[line["value_loss"] for line in ran.lines] for ran in (plain, decayed)]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3]
    assert plain.lines[4]["reward"] == decayed.lines[4]["reward"]
