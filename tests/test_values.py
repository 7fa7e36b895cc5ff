"""Settings as values: schedules within choices, JSON and back, and what is no setting."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from posttrain import schedules
from posttrain.schedules import parse_schedule
from posttrain.values import ByKind, Settings, by_kind, changing, tag


class Plain(Settings):
    kind: Literal["plain"] = tag("plain")
    size: int = changing(4, gt=0)
    rate: float | None = changing(None, gt=0)
    name: str = "x"


class Banded(Settings):
    kind: Literal["banded"] = tag("banded")
    low: float = changing(0.0)
    high: float = changing(1.0)

    @model_validator(mode="after")
    def _is_a_band(self) -> Banded:
        if self.low > self.high:
            raise ValueError(f"low = {self.low:g} is above high = {self.high:g}")
        return self


Choice = Annotated[Plain | Banded, Field(discriminator="kind"), ByKind]


class Stage(Settings):
    steps: int = Field(10, gt=0)
    choice: Choice = Plain()
    parts: dict[str, Banded] = Field(default_factory=dict)
    weights: dict[str, float] = changing({})
    lr: float = changing(0.1, gt=0)


def nothing(metric: str) -> tuple[float, ...]:
    return ()


SCHEDULED = Stage(
    lr=schedules.linear(1.0, 0.1),
    choice=Plain(size=schedules.linear(2, 11)),
    parts={"a": Banded(low=schedules.steps({0: 0.5, 5: 0.75}))},
    weights={"a": schedules.linear(0.0, 9.0), "b": 2.0},
)


def test_schedules_are_found_by_their_dotted_path_and_resolved_by_step() -> None:
    """Ten steps: the lines move by a tenth of 0.9, by 1 and by 1 each; counts are rounded."""
    paths = {"lr", "choice.size", "parts.a.low", "weights.a"}
    assert set(SCHEDULED.schedules) == paths
    assert (SCHEDULED.lr, SCHEDULED.choice.size, SCHEDULED.weights) == (1.0, 2, {"a": 0, "b": 2})
    at = SCHEDULED.at(5, 10, nothing)
    assert at.lr == pytest.approx(0.5)
    assert (at.choice.size, at.weights) == (7, {"a": 5, "b": 2})
    assert at.parts["a"].low == 0.75
    assert SCHEDULED.weights == {"a": 0, "b": 2}, "nothing changes in place"
    assert at.scheduled() == {
        "setting/lr": pytest.approx(0.5),
        "setting/choice/size": 7,
        "setting/parts/a/low": 0.75,
        "setting/weights/a": 5,
    }
    assert SCHEDULED.possible("lr") == [1.0, 0.1]
    assert SCHEDULED.possible("steps") == [10]


def test_without_schedules_a_step_has_the_settings_themselves() -> None:
    stage = Stage(choice=Banded())
    assert stage.at(3, 10, nothing) is stage
    assert stage.schedules == {} and stage.scheduled() == {}


def test_a_value_that_is_none_at_a_step_is_no_metric() -> None:
    plain = Plain(rate=schedules.steps({0: None, 2: 0.5}))
    found = [plain.at(step, 4, nothing) for step in (0, 3)]
    assert [step.rate for step in found] == [None, 0.5]
    assert [step.scheduled() for step in found] == [{}, {"setting/rate": 0.5}]


@pytest.mark.parametrize("stage", [Stage(), SCHEDULED, Stage(choice=Banded(low=0.5))], ids=str)
def test_json_makes_the_same_settings_again(stage: Stage) -> None:
    for defaults in (True, False):
        again = Stage(**stage.to_json(defaults=defaults))
        assert again == stage and again.schedules == stage.schedules
        assert again.at(7, 10, nothing) == stage.at(7, 10, nothing)
    again = pickle.loads(pickle.dumps(stage))
    assert again == stage and again.schedules == stage.schedules


def test_defaults_are_left_out_and_kinds_are_not() -> None:
    assert Stage().to_json(defaults=False) == {}
    assert Stage(lr=0.1, choice=Plain(size=4)).to_json(defaults=False) == {}
    changed = Stage(choice=Plain(size=5), parts={"a": Banded()})
    assert changed.to_json(defaults=False) == {
        "choice": {"kind": "plain", "size": 5},
        "parts": {"a": {"kind": "banded"}},
    }
    whole = Stage().to_json()
    assert whole["choice"] == {"kind": "plain", "size": 4, "rate": None, "name": "x"}
    assert whole["lr"] == 0.1 and whole["steps"] == 10


def test_a_schedule_that_begins_at_the_default_is_no_default() -> None:
    """Its first value is the default's, and what follows is not."""
    line = schedules.linear(4, 8)
    told = Stage(choice=Plain(size=line)).to_json(defaults=False)
    assert told == {"choice": {"kind": "plain", "size": line.model_dump(mode="json")}}
    assert parse_schedule(told["choice"]["size"]) == line
    entry = Stage(weights={"a": schedules.linear(1, 0)}).to_json(defaults=False)
    assert entry["weights"]["a"]["schedule"] == "linear"


def test_a_choice_may_be_named_by_its_kind_alone() -> None:
    assert Stage(choice="banded").choice == Banded()
    assert by_kind("plain") == {"kind": "plain"} and by_kind({"kind": "x"}) == {"kind": "x"}


def test_own_settings_are_taken_in_their_order() -> None:
    assert Plain(5, 0.5) == Plain(size=5, rate=0.5)
    with pytest.raises(TypeError, match="Plain: size is given twice"):
        Plain(5, size=6)
    with pytest.raises(TypeError, match="Plain takes size, rate, name"):
        Plain(1, 2, "y", 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 1}, "Extra inputs are not permitted"),
        ({"lr": float("nan")}, "finite"),
        ({"steps": schedules.linear(1, 2)}, "steps cannot have a schedule; .*: weights, lr"),
        ({"choice": schedules.steps({0: "plain"})}, "choice cannot have a schedule"),
        ({"lr": {"schedule": "linar"}}, "lr: schedule 'linar' is not known"),
        (
            {"steps": 20, "lr": schedules.linear(1, 0)},
            "lr = 0.* of its schedule at step 19: .*greater than 0",
        ),
        (
            {"choice": {"kind": "plain", "name": schedules.steps({0: "y"})}},
            "name cannot have a schedule; settings that can: size, rate",
        ),
        ({"choice": {"kind": "round"}}, "'plain', 'banded'"),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stage(**given)


def test_settings_fit_each_other_at_every_step_at_which_a_schedule_turns() -> None:
    """0.2 to 0.9 above 0.5 from step 4 on; while `high` goes along it is fine."""
    low = schedules.steps({0: 0.2, 4: 0.9})
    with pytest.raises(ValidationError, match=r"low = 0.9 .* at step 4: low = 0.9 is above high"):
        Banded(low=low, high=0.5)
    with pytest.raises(ValidationError, match="high = 0 of its schedule at the last step"):
        Stage(steps=100, choice={"kind": "banded", "low": 0.2, "high": schedules.linear(1, 0)})
    both = Banded(low=low, high=schedules.steps({0: 0.5, 4: 1.0}))
    assert (both.at(4, 10, nothing).low, both.at(4, 10, nothing).high) == (0.9, 1.0)


def test_nothing_changes_after_it_was_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Stage().lr = 1.0
