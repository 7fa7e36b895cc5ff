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
    "benchmarks",  # scores of one model on tasks of lm-eval
]
"""What a stage can leave behind for others to read."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of stage."""

    name: str
    """As in records and the store; that of a kind outside the table is "module.ATTRIBUTE"."""
    settings: str
    """The class of its settings, a `posttrain.values.Settings`, as "module:Class". Empty for what
    takes in files from outside the store: a recipe gives it no settings."""
    run: str
    """Its loop, as "module:function": takes the settings, or without any the engine's `Job`, and
    the stage's `Context`; returns the summary metrics."""
    makes: tuple[Product, ...] = ()
    """What other stages can read of it."""
    version: int = 1
    """Raised by hand when a change makes it give other numbers for the same settings."""
    work: str = ""
    """What counts its work for an estimate, as "module:function": takes a
    `posttrain.estimate.parts.View`, returns a `posttrain.estimate.parts.Work`. Without one its
    seconds are known from earlier runs alone."""

    card: str = ""
    """How a model of this kind was made, after "Made by posttrain: "."""
    headline: tuple[str, ...] = ("reward", "kl", "loss", "norm", "rows")
    """Metrics for the one number shown while it runs: the first that it logs."""
    number: tuple[str, str] = ("rows", "rows")
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

    @property
    def from_outside(self) -> bool:
        """Whether it takes in files from outside the store, and has no settings."""
        return not self.settings

    def settings_class(self) -> Any:
        """The class of its settings. Raises ConfigError for a kind without any."""
        if self.from_outside:
            raise ConfigError(f"a recipe gives a stage of kind {self.name!r} no settings")
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

    def is_data(self) -> bool:
        """Whether it takes in data from outside the store, of a user's own or of a domain."""
        return self.from_outside and bool(self.makes) and not self.is_model()

    def is_model(self) -> bool:
        """Whether it leaves a checkpoint behind, of whatever it may be asked."""
        return "model" in self.makes or "reward_model" in self.makes


NO_MODEL = (*("preferences", "table", "select", "filter", "mix", "dedup", "comparisons"),)
"""Kinds that compute with no model; what the others compute is counted by a function named after
them."""


def _kind(name: str, settings: str, run: str, *makes: Product, **others: Any) -> Kind:
    """A row of the table; places are named from `stages/settings/` and from `stages/`, and what
    counts its work from `estimate/work.py`."""
    place = settings and f"posttrain.stages.settings.{settings}"
    counted = name if name not in NO_MODEL else "nothing"
    return Kind(
        name=name,
        settings=place,
        run=f"posttrain.stages.{run}",
        work=f"posttrain.estimate.work:{counted}",
        makes=makes,
        **others,
    )


_SUPERVISED: dict[str, Any] = {
    "number": ("loss", "loss"),
    "section": "Supervised stages",
    "panels": ("loss",),
    "hints": {"loss": "cross-entropy, nats per token"},
}

_ALL = (
    _kind("domain", "", "models:run_domain", "problems", number=("train", "problems")),
    _kind("preferences", "", "own_data:run_preferences", "pairs", number=("rows", "rows")),
    _kind("table", "", "own_data:run_table", "rows", number=("rows", "rows")),
    _kind(
        "model",
        "",
        "models:run_model",
        "model",
        card="taken in from outside",
        number=("parameters", "parameters"),
    ),
    _kind(
        "pretrain",
        "offline:Pretrain",
        "supervised:pretrain",
        "model",
        card="pre-trained from nothing",
        version=2,
        **_SUPERVISED,
    ),
    _kind(
        "sft",
        "offline:Sft",
        "supervised:sft",
        "model",
        card="supervised fine-tuning",
        version=2,
        **_SUPERVISED,
    ),
    _kind(
        "dpo",
        "offline:DpoStage",
        "dpo:run",
        "model",
        card="learning from preference pairs",
        headline=("accuracy",),
        number=("accuracy", "accuracy"),
        section="Preference stages",
        panels=("loss", "accuracy", "margin", "logp_chosen", "logp_rejected"),
        hints={"loss": "mean over pairs; over responses with kto"},
        version=2,
    ),
    _kind(
        "reward_model",
        "offline:RewardModel",
        "reward_model:run",
        "reward_model",
        card="a reward model from preference pairs",
        headline=("accuracy",),
        number=("heldout_accuracy", "held-out"),
        section="Reward models",
        panels=("loss", "accuracy", "margin", "reward_mean"),
        hints={"loss": "mean over pairs; over prompts with per_prompt"},
        version=2,
    ),
    _kind(
        "rl",
        "rl:Rl",
        "rl:run",
        "model",
        "rollouts",
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
        version=2,
    ),
    _kind(
        "distill",
        "distill:Distill",
        "distill:run",
        "model",
        card="on-policy distillation from one teacher per domain",
        headline=("kl",),
        number=("kl", "KL"),
        section="Distillation: {stage}",
        panels=(
            *("kl", "entropy", "response_length", "token_share", "clipped", "correction_masked"),
            "reward",
        ),
        hints={"loss": "as the estimator weighs it"},
        version=2,
    ),
    _kind(
        "merge",
        "models:Merge",
        "models:run_merge",
        "model",
        card="merged from the weights of several models",
        number=("models", "models"),
        version=2,
    ),
    _kind(
        "evaluate",
        "models:Evaluate",
        "evaluate:run",
        "scores",
        number=("norm", "Norm"),
        unit="models",
        version=2,
    ),
    _kind(
        "harness",
        "models:Harness",
        "harness:run",
        "benchmarks",
        number=("tasks", "tasks"),
        unit="requests",
    ),
    _kind("sample", "data:Sample", "sample:run", "rollouts", unit="draws", version=2),
    _kind(
        "score", "data:Score", "judging:run_score", "rollouts", number=("score", "score"), version=2
    ),
    _kind("select", "data:Select", "select:run", "rows", version=2),
    _kind("pairs", "data:Pairs", "pairs:run", "pairs", number=("rows", "pairs"), version=2),
    _kind(
        "profile",
        "data:Profile",
        "sample:run_profile",
        "rates",
        number=("rate", "pass rate"),
        unit="domains",
        version=2,
    ),
    _kind(
        "filter",
        "data:Filter",
        "curation:run_filter",
        "prompts",
        number=("rows", "prompts"),
        version=2,
    ),
    _kind("mix", "data:Mix", "curation:run_mix", "rows", version=2),
    _kind("dedup", "data:Dedup", "curation:run_dedup", "rows", version=2),
    _kind("comparisons", "data:Comparisons", "pairs:run_comparisons", "rows", version=2),
    _kind(
        "best",
        "models:Best",
        "evaluate:run_best",
        "model",
        card="the best of several models on validation problems",
        number=("score", "score"),
        unit="models",
        version=2,
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
