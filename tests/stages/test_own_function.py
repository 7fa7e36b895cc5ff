"""Functions of the user's own in an rl stage: they change the numbers as they say, their text is
part of the identity, and where one is wrong the error names it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.algorithms import Clip, Custom, custom
from posttrain.engine.errors import ConfigError, StageError
from posttrain.recipe import Recipe
from posttrain.rl.batch import Batch
from posttrain.stages.config import build_config
from posttrain.stages.rl import add_advantages
from posttrain.stages.settings.rl import Rl
from posttrain.suites.load import load_suite

BASE: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 6,
    "lr": 0.02,
    "warmup_steps": 1,
    "num_minibatches": 2,
}
SOURCE = """
import inspect

import torch
from posttrain.losses.policy import policy_gradient


def clip(*tensors, scale=1.0, **named):
    total, metrics = policy_gradient(
        *tensors, ratio="token", clip_low=0.2, clip_high=0.2, **named
    )
    return scale * total, metrics | {"doubled": 2 * metrics["ratio"]}


def mean(reward_B, group_B):
    group_BB = (group_B[:, None] == group_B).float()
    return reward_B - group_BB @ reward_B / group_BB.sum(1)


def by_token(reward_B, group_B, per_row):
    return mean(reward_B, group_B).repeat_interleave(torch.tensor(per_row))


def half(batch):
    return torch.full((batch.num_tokens,), 0.5)


def first_only(batch):
    row_N = batch.row_N
    return torch.cat([torch.ones(1), (row_N[1:] != row_N[:-1]).float()])


def frames(*tensors, **named):
    names = [frame.function for frame in inspect.stack()]
    assert names[1] == "policy_loss" and names.index("run") <= 4, names
    return clip(*tensors, **named)


def nothing(*arguments, **named):
    return None


def no_tuple(logp_N, *tensors, **named):
    return logp_N.sum()


def not_summed(logp_N, *tensors, **named):
    return logp_N, {}


def a_number(logp_N, *tensors, **named):
    return logp_N.sum(), {"mine": 1.0}


def constant(logp_N, *tensors, **named):
    return logp_N.detach().sum(), {}


def infinite(logp_N, *tensors, **named):
    return logp_N.sum() * float("nan"), {}


def two_axes(*arguments):
    return torch.ones(2, 2)


def not_finite(reward_B, group_B):
    return reward_B / 0


def broken(*arguments, **named):
    numbers = {}
    return numbers["missing"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def own(file: Path) -> Callable[..., Custom]:
    """`own(function, ...)`: a function of the file above."""
    return lambda function, **settings: custom(f"{file}:{function}", **settings)


@pytest.fixture
def rl(
    run_stage: Callable[..., Any], models: Mapping[str, str], domains: Mapping[str, str]
) -> Callable[..., Any]:
    """Run rl from `start` with BASE and the given changes."""

    def run(**changes: Any) -> Any:
        return run_stage("rl", BASE | changes, {"start": models["start"], **domains})

    return run


def test_a_surrogate(rl: Callable[..., Any], own: Callable[..., Custom], same: Any) -> None:
    """One that calls the clipped surrogate ends with its bits; its settings and metrics count. It
    may learn where all rewards of a group are alike, so such rows stay."""
    ours = rl(surrogate=own("clip"))
    assert same(ours, rl(surrogate=Clip(), drop_zero_variance=False))
    assert {line["train_fraction"] for line in ours.lines} == {1.0}
    for line in ours.lines:
        assert line["doubled"] == pytest.approx(2 * line["ratio"], rel=1e-4)
    threefold = rl(surrogate=own("clip", scale=3.0), num_minibatches=1, steps=1)
    plain = rl(num_minibatches=1, steps=1, drop_zero_variance=False)
    assert threefold.lines[0]["grad_norm"] == pytest.approx(
        3 * plain.lines[0]["grad_norm"], rel=1e-4
    )


def test_an_advantage(rl: Callable[..., Any], own: Callable[..., Custom]) -> None:
    """Of responses. It sees all rows; those without contrast are not left out for it, and count in
    the mean over tokens."""
    ours = rl(advantage=own("mean"), steps=1, num_minibatches=1)
    plain = rl(advantage="group_mean", steps=1, num_minibatches=1, drop_zero_variance=False)
    assert ours.lines[0]["grad_norm"] == pytest.approx(plain.lines[0]["grad_norm"], rel=1e-4)
    assert ours.lines[0]["train_fraction"] == 1


def test_an_advantage_of_tokens(own: Callable[..., Custom]) -> None:
    batch = Batch.from_tokens([[7], [7]], [[8, 8, 8], [8]], pad_id=0)
    batch["reward_B"], batch["group_B"] = torch.tensor([1.0, 0.0]), torch.zeros(2)
    for advantage in (own("mean"), own("by_token", per_row=[3, 1])):
        add_advantages(Rl(steps=1, advantage=advantage), batch, None)
        assert batch["advantage_N"].tolist() == [0.5, 0.5, 0.5, -0.5]


def test_a_token_weight(rl: Callable[..., Any], own: Callable[..., Custom], same: Any) -> None:
    """It multiplies the weights of the surrogate and leaves the penalty of the KL as it is."""
    one = {"steps": 1, "num_minibatches": 1}
    plain = rl(**one).lines[0]
    assert rl(token_weight=own("half"), **one).lines[0]["grad_norm"] == pytest.approx(
        plain["grad_norm"] / 2, rel=1e-4
    )
    assert not same(rl(), rl(token_weight=own("first_only")))
    held = {"kl": {"coef": 0.5}, "advantage": own("mean"), "steps": 2, "num_minibatches": 1}
    weighed = rl(token_weight=own("half"), **held)
    assert weighed.lines[0]["kl_reference"] == rl(**held).lines[0]["kl_reference"]


def test_few_frames_lie_between_the_loop_and_the_surrogate(
    rl: Callable[..., Any], own: Callable[..., Custom]
) -> None:
    rl(steps=1, surrogate=own("frames"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "nothing"}, "it returned None .NoneType.; it has to return .loss sum, dict"),
        ({"surrogate": "no_tuple"}, r"it returned a tensor of shape \(\); it has to return"),
        ({"surrogate": "not_summed"}, r"a loss sum of a tensor of shape \(\d+,\); .*sum over the"),
        ({"surrogate": "a_number"}, r"the metric 'mine' as 1\.0 \(float\)"),
        ({"surrogate": "constant"}, "has no gradient; calculate it from logp_N"),
        ({"surrogate": "infinite"}, "a loss sum of nan; it has to be finite"),
        ({"surrogate": "broken"}, r"KeyError: 'missing' \(line \d+\)"),
        ({"surrogate": "mean"}, "TypeError: mean.. got an unexpected keyword argument"),
        ({"advantage": "nothing"}, r"it returned None .*; it has to return a tensor of 24 or \d+ "),
        ({"advantage": "two_axes"}, r"a tensor of shape \(2, 2\); .*a tensor of 24 or \d+ entries"),
        (
            {"advantage": "not_finite"},
            r"the entries \[\d+, .*\] of what it returned are not finite",
        ),
        ({"token_weight": "two_axes"}, r"a tensor of shape \(2, 2\); it has to return a tensor of"),
        ({"token_weight": "broken"}, r"KeyError: 'missing' \(line \d+\)"),
    ],
)
def test_what_is_wrong_names_the_function(
    rl: Callable[..., Any], own: Callable[..., Custom], changes: dict[str, str], message: str
) -> None:
    (field, function), *_ = changes.items()
    with pytest.raises(StageError, match=message) as raised:
        rl(**{field: own(function)}, drop_zero_variance=False)
    assert str(raised.value).startswith(f"custom('mine.py:{function}'): ")
    assert "docs/language.md" in str(raised.value)


def test_the_place_is_checked_when_the_recipe_is_built(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mine\.py'\): write it as 'file\.py:function'"):
        custom("mine.py")
    with pytest.raises(ConfigError, match=r"elsewhere\.py does not exist; paths are relative to"):
        custom(f"{file.parent / 'elsewhere.py'}:clip")
    with pytest.raises(ConfigError, match=r"no function 'clib'; did you mean 'clip'"):
        custom(f"{file}:clib")
    file.write_text("def clip(:\n")
    with pytest.raises(ConfigError, match=r"mine\.py, line 1: "):
        custom(f"{file}:clip")


def test_a_file_that_cannot_be_loaded_ends_the_stage(file: Path, rl: Callable[..., Any]) -> None:
    file.write_text("import nowhere_to_be_found\n\n\ndef clip(*tensors, **named): ...\n")
    with pytest.raises(StageError, match=r"custom\('mine\.py:clip'\): ModuleNotFoundError.*line 1"):
        rl(surrogate=custom(f"{file}:clip"), steps=1)


def test_the_text_of_the_file_is_in_the_identity(file: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        return build_config("rl", "mine", BASE | changes).to_json(defaults=False)

    before = identity(surrogate=custom(f"{file}:clip"))
    again = identity(surrogate=custom(f"{file}:clip"))
    assert before == again != identity(surrogate=custom(f"{file}:clip", scale=2.0))
    file.write_text(SOURCE + "\n")
    assert identity(surrogate=custom(f"{file}:clip")) != before


def test_an_edited_file_runs_the_stage_again(file: Path) -> None:
    def fingerprints() -> Mapping[str, str]:
        r = Recipe(*load_suite("core"))
        own = custom(f"{file}:mean")
        policy = r.rl(start=r.base("tiny"), prompts=r.prompts("add"), steps=2, advantage=own)
        return r.graph(r.sft(start=policy, data=r.demos("add"), steps=1)).fingerprints()

    before = fingerprints()
    assert fingerprints() == before
    file.write_text(SOURCE.replace("group_BB.sum(1)", "len(reward_B)"))
    changed = {name for name, value in fingerprints().items() if value != before[name]}
    assert changed == {"rl", "sft"}


def test_it_survives_json_and_another_process(file: Path) -> None:
    settings = build_config("rl", "mine", BASE | {"surrogate": custom(f"{file}:clip", scale=2.0)})
    file.unlink()
    for copied in (
        build_config("rl", "mine", settings.to_json()),
        pickle.loads(pickle.dumps(settings)),
    ):
        assert copied == settings
        assert callable(copied.surrogate.implementation())
        assert copied.surrogate.arguments() == {"scale": 2.0}
