"""Algorithms as values: JSON and back for all of them, functions of one's own, and their checks."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain import algorithms
from posttrain.algorithms import (
    KL,
    Advantage,
    Balance,
    Band,
    Cispo,
    Clip,
    Correction,
    Critique,
    Custom,
    Decay,
    Dpo,
    Draw,
    Estimator,
    Gae,
    GroupZScore,
    Kimi,
    MergeHow,
    Pairing,
    Preference,
    RewardLoss,
    Selection,
    SimPO,
    Surrogate,
    TopK,
    custom,
)
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import digest
from posttrain.schedules import linear
from posttrain.values import Settings

UNIONS: dict[str, Any] = {
    "surrogate": Surrogate,
    "advantage": Advantage,
    "correction": Correction,
    "draw": Draw,
    "estimator": Estimator,
    "balance": Balance,
    "preference": Preference,
    "reward_loss": RewardLoss,
    "decay": Decay,
    "merge": MergeHow,
    "selection": Selection,
    "pairing": Pairing,
}


def kinds(union: Any) -> list[type[Settings]]:
    """The classes of a tagged union."""
    found: list[type[Settings]] = []
    for part in get_args(union):
        if isinstance(part, type):
            if issubclass(part, Settings):
                found.append(part)
        else:
            found += kinds(part)
    return found


@pytest.mark.parametrize("name", UNIONS)
def test_every_kind_of_a_choice_is_read_again_from_json(name: str) -> None:
    """By its kind alone where it has defaults for all; the kinds of a choice have names apart."""
    adapter, classes = TypeAdapter(UNIONS[name]), kinds(UNIONS[name])
    names = [cls.model_fields["kind"].default for cls in classes]
    assert len(classes) >= 2 and len(set(names)) == len(names)
    for cls, kind in zip(classes, names, strict=True):
        if any(field.is_required() for field in cls.model_fields.values()):
            continue
        value = adapter.validate_python(kind)
        assert type(value) is cls and value == cls()
        assert adapter.validate_python(value.to_json()) == value
        assert value.to_json(defaults=False) == {"kind": kind}
        assert pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(ValidationError, match=names[0]):
        adapter.validate_python("no such kind")


def test_functions_of_choices_are_where_they_say() -> None:
    every = [cls for cls in vars(algorithms).values() if isinstance(cls, type)]
    named = [c for c in every if issubclass(c, Settings) and c is not Settings and c.FUNCTION]
    assert {Clip, Cispo, Kimi} <= set(named)
    for cls in named:
        assert callable(cls().implementation())
        assert "kind" not in cls().arguments()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KL(-0.1), "coef"),
        (lambda: KL(), "coef"),
        (lambda: KL(0.1, estimator="k1"), "k1 with where = loss: .*zero in expectation"),
        (lambda: KL(0.1, estimator="unbiased", where="reward"), "a reward has none"),
        (lambda: Band(low=0.6, high=0.4), "low = 0.6 is above high = 0.4"),
        (lambda: Band(low=0.2, high=linear(0.5, 0.1)), "low = 0.2 is above high = 0.1"),
        (lambda: Clip(clip_low=1.5), "clip_low"),
        (lambda: Gae(lam=1.1), "lam"),
        (lambda: TopK(0), "k"),
        (lambda: Dpo(gamma=0.5), "gamma"),  # type: ignore[call-arg]
        (lambda: SimPO(beta=0), "beta"),
        (lambda: Critique(), "weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_positional_settings_and_schedules_inside() -> None:
    assert TopK(64) == TopK(k=64) and KL(0.02) == KL(coef=0.02)
    surrogate = Cispo(clip_high=linear(4, 2))
    assert surrogate.at(5, 11, lambda _: []).clip_high == 3
    assert [GroupZScore.BY_GROUP, Gae.BY_GROUP, Custom.BY_GROUP] == [True, False, False]


SOURCE = """
from dataclasses import dataclass

@dataclass
class Scale:
    by: float

def doubled(value, *, factor=2.0):
    return Scale(factor).by * value

number = 3
"""


@pytest.fixture
def loss(tmp_path: Path) -> Path:
    path = tmp_path / "loss.py"
    path.write_text(SOURCE)
    return path


def test_a_function_of_ones_own_is_its_source(loss: Path) -> None:
    """It works after the file is gone, and another text is another identity."""
    made = custom(f"{loss}:doubled", factor=3.0)
    assert (made.name, made.source, made.settings) == ("loss.py:doubled", SOURCE, {"factor": 3.0})
    loss.write_text(SOURCE.replace("* value", "* value + 1"))
    other = custom(f"{loss}:doubled", factor=3.0)
    assert digest(made.to_json(defaults=False)) != digest(other.to_json(defaults=False))
    loss.unlink()
    again = Custom(**made.to_json())
    for value, expected in ((made, 6.0), (again, 6.0), (other, 7.0)):
        assert value.implementation()(2.0, **value.arguments()) == expected
    assert again == made
    for union in (Surrogate, Advantage):
        assert TypeAdapter(union).validate_python(made.to_json()) == made


def test_a_path_is_relative_to_the_file_that_calls(
    loss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe beside its loss, and a call from a working directory."""
    recipe = tmp_path / "my_recipe_of_own.py"
    recipe.write_text(
        "from posttrain.algorithms import custom\n\nLOSS = custom('loss.py:doubled')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        from my_recipe_of_own import LOSS  # type: ignore[import-not-found]
    finally:
        sys.modules.pop("my_recipe_of_own", None)
    assert LOSS.source == SOURCE
    monkeypatch.chdir(tmp_path)
    assert custom("loss.py:doubled") == LOSS


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("doubled", "write it as 'file.py:function'"),
        ("{dir}/none.py:doubled", "none.py"),
        ("{dir}/loss.py:halved", "halved"),
        ("{dir}/loss.py:number", "number"),
        ("{dir}/broken.py:f", "broken.py"),
    ],
)
def test_files_and_functions_are_checked_at_once(loss: Path, place: str, message: str) -> None:
    (loss.parent / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=message):
        custom(place.format(dir=loss.parent))
