"""The table of stage kinds: everything that is particular to a kind, in one row.

The recipe language, the worker, the report and the model card all read it here, so that a new kind
is a row, a settings class and a loop. Settings and loops are named as "module:attribute" and are
imported when they are needed: reading the table imports neither torch nor pydantic.

A kind need not stand in the table. Any module may define one, named after the place where it is
found, and a recipe uses it with `r.stage_of_kind`:

    ECHO = Kind(name="my_kinds.ECHO", settings="my_kinds:Echo", run="my_kinds:run")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from posttrain.engine.errors import ConfigError, choices_text

Product = Literal[
    "problems",  # of a domain, with their verifier
    "model",  # a checkpoint that writes responses
    "reward_model",  # a checkpoint that scores responses and writes none
    "rollouts",  # sampled responses with their rewards
    "rows",  # prompts with a response to imitate
    "pairs",  # of a better and a worse response
    "prompts",  # chosen ones
    "rates",  # how often a model solves each prompt
    "scores",  # of models on held-out problems
]
"""What a stage can leave behind for others to read."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of stage."""

    name: str
    """As in records and the store; that of a kind outside the table is "module.ATTRIBUTE"."""
    settings: str
    """The pydantic class of its settings, as "module:Class"."""
    run: str
    """Its loop, as "module:function": takes the settings and the stage's `Context`, returns the
    summary metrics. With `from_outside` it takes the engine's `Job` in place of the settings."""
    makes: tuple[Product, ...] = ()
    """What other stages can read of it."""
    from_outside: bool = False
    """Whether it takes in files from outside the store; a recipe gives it no settings."""
    version: int = 1
    """Raised by hand when a change makes it give other numbers for the same settings."""

    card: str = ""
    """How a model of this kind was made, after "Made by posttrain: "."""
    headline: tuple[str, ...] = ("reward", "kl", "loss", "norm", "rows")
    """Metrics for the one number shown while it runs: the first that it logs."""
    number: tuple[str, str] = ("", "")
    """The summary metric that says most about it, and what the lineage calls that."""
    unit: str = "steps"
    """What a step is."""

    section: str = ""
    """Title above its curves in a report, "{stage}" for the name of the stage; kinds with one title
    share their panels. Without a title it has no curves."""
    panels: tuple[str, ...] = ()
    """Metrics whose curves are shown; the others are folded away."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Metric to its title, where it is another one than elsewhere."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """Metric to the line below its title, where it is another one than elsewhere."""

    def __str__(self) -> str:
        return self.name

    def settings_class(self) -> Any:
        """The class of its settings, a pydantic model."""
        return resolve_name(self.settings)

    def loop(self) -> Any:
        """The function `run`. Importing it may import torch."""
        return resolve_name(self.run)

    def file(self) -> Path:
        """The file of its loop, found without running it. Raises ImportError if there is none."""
        module = self.run.partition(":")[0]
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ImportError(f"there is no module {module!r}")
        return Path(spec.origin)

    def folder(self) -> Path:
        """What has to be in `sys.path` so that its loop is found."""
        return self.file().parents[self.run.partition(":")[0].count(".")]

    def is_model(self) -> bool:
        """Whether it leaves a checkpoint behind, of whatever it may be asked."""
        return "model" in self.makes or "reward_model" in self.makes


_SETTINGS = "posttrain.stages.settings"
_CROSS_ENTROPY = {"loss": "cross-entropy, nats per token"}

_ALL = (
    Kind(
        name="domain",
        settings=f"{_SETTINGS}.models:DomainData",
        run="posttrain.stages.outside:run_domain",
        makes=("problems",),
        from_outside=True,
        number=("train", "problems"),
    ),
    Kind(
        name="model",
        settings=f"{_SETTINGS}.models:ExternalModel",
        run="posttrain.stages.outside:run_model",
        makes=("model",),
        from_outside=True,
        card="taken in from outside",
        number=("parameters", "parameters"),
    ),
    Kind(
        name="pretrain",
        settings=f"{_SETTINGS}.supervised:Pretrain",
        run="posttrain.stages.supervised:pretrain",
        makes=("model",),
        card="pre-trained from nothing",
        headline=("loss",),
        number=("loss", "loss"),
        section="Supervised stages",
        panels=("loss",),
        hints=_CROSS_ENTROPY,
    ),
    Kind(
        name="sft",
        settings=f"{_SETTINGS}.supervised:Sft",
        run="posttrain.stages.supervised:sft",
        makes=("model",),
        card="supervised fine-tuning",
        headline=("loss",),
        number=("loss", "loss"),
        section="Supervised stages",
        panels=("loss",),
        hints=_CROSS_ENTROPY,
    ),
    Kind(
        name="dpo",
        settings=f"{_SETTINGS}.preference:DpoStage",
        run="posttrain.stages.dpo:run",
        makes=("model",),
        card="learning from preference pairs",
        headline=("accuracy",),
        number=("accuracy", "accuracy"),
        section="Preference stages",
        panels=("loss", "accuracy", "margin", "logp_chosen", "logp_rejected"),
        hints={"loss": "mean over pairs; over responses with kto"},
    ),
    Kind(
        name="reward_model",
        settings=f"{_SETTINGS}.preference:RewardModel",
        run="posttrain.stages.reward_model:run",
        makes=("reward_model",),
        card="a reward model from preference pairs",
        headline=("accuracy",),
        number=("heldout_accuracy", "held-out"),
        section="Reward models",
        panels=("loss", "accuracy", "margin", "reward_mean"),
        hints={"loss": "mean over pairs; over prompts with per_prompt"},
    ),
    Kind(
        name="rl",
        settings=f"{_SETTINGS}.rl:Rl",
        run="posttrain.stages.rl:run",
        makes=("model", "rollouts"),
        card="reinforcement learning on verifiable rewards",
        headline=("reward",),
        number=("reward", "reward"),
        section="Reinforcement learning",
        panels=(
            *("reward", "entropy", "response_length", "clip_share", "correction_masked"),
            "explained_variance",
        ),
        titles={"accuracy": "Accuracy"},
        hints={"accuracy": "verifier's score, mean over the samples"},
    ),
    Kind(
        name="distill",
        settings=f"{_SETTINGS}.distill:Distill",
        run="posttrain.stages.distill:run",
        makes=("model",),
        card="on-policy distillation from one teacher per domain",
        headline=("kl",),
        number=("kl", "KL"),
        section="Distillation: {stage}",
        panels=(
            *("kl", "entropy", "response_length", "token_share", "clipped", "correction_masked"),
            "reward",
        ),
        hints={"loss": "as the estimator weighs it"},
    ),
    Kind(
        name="merge",
        settings=f"{_SETTINGS}.models:Merge",
        run="posttrain.stages.merge:run",
        makes=("model",),
        card="merged from the weights of several models",
        number=("models", "models"),
    ),
    Kind(
        name="evaluate",
        settings=f"{_SETTINGS}.models:Evaluate",
        run="posttrain.stages.evaluate:run",
        makes=("scores",),
        headline=("norm",),
        number=("norm", "Norm"),
        unit="models",
    ),
    Kind(
        name="sample",
        settings=f"{_SETTINGS}.data:Sample",
        run="posttrain.stages.sample:run",
        makes=("rollouts",),
        number=("rows", "rows"),
        unit="draws",
    ),
    Kind(
        name="score",
        settings=f"{_SETTINGS}.data:Score",
        run="posttrain.stages.score:run",
        makes=("rollouts",),
        number=("score", "score"),
    ),
    Kind(
        name="select",
        settings=f"{_SETTINGS}.data:Select",
        run="posttrain.stages.select:run",
        makes=("rows",),
        number=("rows", "rows"),
    ),
    Kind(
        name="pairs",
        settings=f"{_SETTINGS}.preference:Pairs",
        run="posttrain.stages.pairs:run",
        makes=("pairs",),
        number=("rows", "pairs"),
    ),
    Kind(
        name="profile",
        settings=f"{_SETTINGS}.data:Profile",
        run="posttrain.stages.sample:run_profile",
        makes=("rates",),
        number=("rate", "pass rate"),
        unit="domains",
    ),
    Kind(
        name="filter",
        settings=f"{_SETTINGS}.data:Filter",
        run="posttrain.stages.filter:run",
        makes=("prompts",),
        number=("rows", "prompts"),
    ),
    Kind(
        name="mix",
        settings=f"{_SETTINGS}.data:Mix",
        run="posttrain.stages.mix:run",
        makes=("rows",),
        number=("rows", "rows"),
    ),
    Kind(
        name="dedup",
        settings=f"{_SETTINGS}.data:Dedup",
        run="posttrain.stages.dedup:run",
        makes=("rows",),
        number=("rows", "rows"),
    ),
    Kind(
        name="comparisons",
        settings=f"{_SETTINGS}.data:Comparisons",
        run="posttrain.stages.comparisons:run",
        makes=("rows",),
        number=("rows", "rows"),
    ),
    Kind(
        name="best",
        settings=f"{_SETTINGS}.models:Best",
        run="posttrain.stages.best:run",
        makes=("model",),
        card="the best of several models on validation problems",
        number=("score", "score"),
        unit="models",
    ),
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}
"""Name to kind, in the order in which a report shows their curves."""


def kind_of(name: str) -> Kind:
    """The kind of that name: a row of the table, or one that stands where its name says.

    Raises ConfigError for a name that is neither.
    """
    if name in KINDS:
        return KINDS[name]
    module, _, attribute = name.rpartition(".")
    found: object = None
    if module:
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError as error:
            raise ConfigError(
                f"kind {name!r}: its module {module!r} cannot be imported ({error}); put it beside "
                "the recipe or install it"
            ) from None
    if not isinstance(found, Kind) or found.name != name:
        raise ConfigError(
            f"unknown kind of stage {name!r}; {choices_text(name, KINDS)}; or the place of a Kind "
            "of your own, as in Kind(name='my_module.MY_KIND', ...)"
        )
    return found


def shown_kind(name: str) -> Kind:
    """As `kind_of`, for showing what was made: a kind that cannot be found any more is plain."""
    try:
        return kind_of(name)
    except ConfigError:
        return Kind(name=name, settings="", run="")


def kinds_making(*products: Product) -> tuple[str, ...]:
    """Names of the kinds in the table that make one of these."""
    return tuple(name for name, kind in KINDS.items() if set(products) & set(kind.makes))
