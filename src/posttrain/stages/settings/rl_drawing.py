"""Settings that say which problems an rl step uses; `Rl` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.schedules import Schedule
from posttrain.stages.settings.scheduled import refuse_unread

Share = Annotated[float, Field(ge=0, le=1)]

BAND = ("band_low", "band_high")
GAUSSIAN = ("target_rate", "spread")
REPROFILE = ("reprofile_every", "reprofile_on_plateau")


class Drawing(BaseModel):
    """Which problems a step uses; without any of these each domain's in turn, none left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCHEDULABLE: ClassVar[frozenset[str]] = frozenset(
        {"dynamic_sampling", "retire_above", *BAND, *GAUSSIAN}
    )

    dynamic_sampling: int = Field(0, ge=0, le=255)
    """Further draws per step until every group of the batch has unequal rewards (DAPO, arXiv
    2503.14476, 3.2)."""
    retire_above: float | None = Field(None, gt=0)
    """A problem whose last group had this mean reward or more is drawn no more, until all problems
    of its domain are retired (Olmo Hybrid: 0.875)."""
    curriculum: Literal["none", "band", "gaussian"] = "none"
    """`band` draws problems with a pass rate from `band_low` to `band_high`. `gaussian` weighs
    them by exp(-(rate - target_rate)^2 / (2 spread^2)) (Nemotron 3 Nano). Both need a profile."""
    band_low: Share = 0.0
    band_high: Share = 1.0
    target_rate: Share = 0.5
    spread: float = Field(0.2, gt=0)
    update_rates: bool = False
    """The mean reward of a group becomes the problem's pass rate."""
    reprofile_every: int | None = Field(None, gt=0)
    """The policy is profiled anew every so many steps."""
    reprofile_on_plateau: int | None = Field(None, gt=0)
    """It is profiled anew where the mean reward of so many steps is less than 0.01 above that of as
    many steps before; both windows then start anew."""
    reprofile_samples: int = Field(8, gt=0)
    """Responses per problem of such a profile."""
    reprofile_prompts: int = Field(256, gt=0)
    """Most problems per domain of such a profile; the others keep the rate that they had."""

    @property
    def reprofiles(self) -> bool:
        """Whether the policy may be profiled anew within the stage."""
        return any(getattr(self, name) is not None for name in REPROFILE)

    @model_validator(mode="after")
    def _curriculum_reads(self) -> Self:
        because = f"curriculum = {self.curriculum}"
        if self.curriculum != "band":
            refuse_unread(self, *BAND, because=because)
        if self.curriculum != "gaussian":
            refuse_unread(self, *GAUSSIAN, because=because)
        if self.curriculum == "none":
            refuse_unread(self, "update_rates", *REPROFILE, because=because)
        if not self.reprofiles:
            names = ("reprofile_samples", "reprofile_prompts")
            refuse_unread(self, *names, because="no reprofile_every and no reprofile_on_plateau")
        return self


def check_band(config: Drawing, schedules: Mapping[str, Schedule], steps: int) -> None:
    """Raise ValueError where `band_low` is above `band_high` at some step."""
    if config.curriculum != "band":
        return
    specs = {name: schedules.get(name) for name in BAND}
    ends = {
        name: [getattr(config, name)] if spec is None else spec.possible_values()
        for name, spec in specs.items()
    }
    bands = {"some step": (max(ends["band_low"]), min(ends["band_high"]))}
    # Where a metric decides, what the two will be is not known: no two values may contradict.
    if all(spec is None or spec.metric is None for spec in specs.values()):
        values = {
            name: [getattr(config, name)] * steps
            if spec is None
            else [spec.at(step, steps, lambda metric: ()) for step in range(steps)]
            for name, spec in specs.items()
        }
        pairs = zip(values["band_low"], values["band_high"], strict=True)
        bands = {f"step {step}": pair for step, pair in enumerate(pairs)}
    for when, (low, high) in bands.items():
        if low > high:
            raise ValueError(
                f"band_low = {low:g} is above band_high = {high:g} at {when}: no pass rate "
                "lies between them"
            )
