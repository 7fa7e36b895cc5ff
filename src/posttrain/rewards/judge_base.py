"""What a judge is, and the judges that are made of others: one frozen class for each kind. The
types of their fields are in `posttrain.rewards.judge_fields`.

The JSON form of a judge is `{"judge": kind, ...fields}`, nested. What can be computed from
responses, or from the scores of the judges inside it, a judge computes in `score`; one that needs a
model, a verifier or people names in `SCORER` the class that does it. The kinds that stand by
themselves, and the union of all, are in `posttrain.rewards.judge_kinds`. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from posttrain.engine import exact
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards.judge_fields import EDGE, HIDDEN, Weight
from posttrain.rewards.penalties import groups
from posttrain.schedules import Schedule

if TYPE_CHECKING:
    from posttrain.rewards.judge_kinds import AnyJudge
    from posttrain.rewards.judging import Scorer, Scoring

EPSILON = 1e-6
"""Added to a standard deviation; one below it counts as zero, and so does the z-score."""


def _not_alone(judge: Judge) -> Judge:
    if judge.ALONE:
        raise ValueError(
            "people compare pairs by themselves; judges.human() stands alone, in no sum or "
            "combination"
        )
    return judge


Part = Annotated["AnyJudge", AfterValidator(_not_alone)]
"""A judge within another one; `judge_kinds` says which there are."""


class Judge(BaseModel):
    """What scores responses. A recipe adds, subtracts and weighs judges.

    Raises ConfigError where a field does not fit; fields may be given in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCORER: ClassVar[str] = ""
    """The class that scores for it, as "module:name", which is made from the judge and the stage's
    `StageTools`. Empty for a judge that scores by itself."""
    ALONE: ClassVar[bool] = False
    """Whether it can be part of no other judge."""
    COMBINES: ClassVar[bool] = False
    """Whether its scores are made of those of its parts, which are logged in its place."""
    WHOLE: ClassVar[bool] = False
    """Whether it has to see all responses at once, not group by group."""
    PAIRS: ClassVar[tuple[str, ...]] = ()
    """The ways of choosing pairs (`how` of `pairs`) in which it is asked about pairs, not for
    scores."""
    STAGES: ClassVar[tuple[str, ...]] = ()
    """The kinds of stages that can ask it; any where it names none."""
    OTHERWISE: ClassVar[str] = ""
    """What to write in other stages."""

    _stage: Any = PrivateAttr(None)
    """The handle on the stage that it asks, where a recipe made it."""

    judge: str
    """Its kind."""

    def __init__(self, *values: Any, **fields: Any) -> None:
        kind, *names = type(self).model_fields
        kind = f"judge {type(self).model_fields[kind].default}"
        if len(values) > len(names):
            raise TypeError(f"{kind} takes {', '.join(names) or 'nothing'}")
        try:
            super().__init__(**dict(zip(names, values, strict=False)), **fields)
        except ValidationError as error:
            raise ConfigError(explain(error, kind, names)) from None

    @property
    def edge(self) -> str | None:
        """The input of the stage, `judges.NAME`, whose model it asks."""
        return None

    @property
    def label(self) -> str:
        """What the log calls it: the kind, or kind.NAME where a stage's model answers."""
        return self.judge if self.edge is None else f"{self.judge}.{self.edge.removeprefix(EDGE)}"

    @property
    def identity(self) -> str:
        """Its JSON form as text: judges with the same identity give the same scores."""
        return self.model_dump_json()

    @property
    def stages(self) -> dict[str, Any]:
        """Edge, `judges.NAME`, to the stage that is asked; of a judge that a recipe made."""
        asked = (part for part in self.walk() if part._stage is not None)
        return {part.edge: part._stage for part in asked if part.edge is not None}

    @property
    def scheduled(self) -> bool:
        """Whether a weight in it has a schedule."""
        return any(isinstance(weight, Schedule) for p in self.walk() for weight in p.weights())

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return self.model_dump(mode="json")

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The judges directly inside; with `domain` only those that see its responses."""
        return [part for name in type(self).model_fields for part in _inside(getattr(self, name))]

    def walk(self, domain: str | None = None) -> Iterator[Judge]:
        """The judge itself and then all inside, in the order in which they are written; with
        `domain` without what other domains have for themselves."""
        yield self
        for part in self.parts(domain):
            yield from part.walk(domain)

    def weights(self) -> list[Any]:
        """Its own numbers that may be schedules."""
        return []

    def score(self, scoring: Scoring) -> list[float]:
        """One number for each of `scoring.responses`, higher is better."""
        return scoring.ask(self)

    def scorer(self, tools: Any) -> Scorer:
        """What scores for it, made with what the stage has. Raises what loading a model raises."""
        module, _, name = self.SCORER.partition(":")
        made: Scorer = getattr(import_module(module), name)(self, tools)
        return made

    def __mul__(self, weight: float | Schedule) -> Judge:
        """Raises ConfigError for a weight that is neither a number nor a schedule."""
        if isinstance(self, Sum) and len(self.terms) == 1 and isinstance(weight, int | float):
            (term,) = self.terms
            if not isinstance(term.weight, Schedule):
                return _sum([{"weight": weight * term.weight, "of": term.of}])
        return _sum([{"weight": weight, "of": self}])

    __rmul__ = __mul__

    def __neg__(self) -> Judge:
        return self * -1.0

    def __add__(self, other: Judge) -> Judge:
        """Raises ConfigError for what is no judge, as the other operators do."""
        return _sum([*_terms(self), *_terms(other)])

    def __radd__(self, other: Any) -> Judge:
        # What sum() begins with.
        zero = isinstance(other, int) and other == 0
        return self if zero else _sum([*_terms(other), *_terms(self)])

    def __sub__(self, other: Judge) -> Judge:
        return self + (-other if isinstance(other, Judge) else other)

    def __rsub__(self, other: Any) -> Judge:
        return _sum([*_terms(other), *_terms(-self)])


class Term(BaseModel):
    """One summand with its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Weight
    of: Part


class Sum(Judge):
    """Judges added up, each times its weight, in their order."""

    COMBINES = True

    judge: Literal["sum"] = "sum"
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]

    def weights(self) -> list[Any]:
        """Those of the terms."""
        return [term.weight for term in self.terms]

    def score(self, scoring: Scoring) -> list[float]:
        """The weighted sum for each response."""
        weights = [scoring.value(weight) for weight in self.weights()]
        rows = zip(*(scoring.scores(term.of) for term in self.terms), strict=True)
        return [sum(w * score for w, score in zip(weights, row, strict=True)) for row in rows]


class Gate(Judge):
    """`then` where `condition` scores less than `below`, else `otherwise` (Llama 2, 3.2.3)."""

    COMBINES = True

    judge: Literal["gate"] = "gate"
    condition: Part
    below: Weight
    then: Part
    otherwise: Part

    def weights(self) -> list[Any]:
        """The limit between the branches."""
        return [self.below]

    def score(self, scoring: Scoring) -> list[float]:
        """A branch that no response takes is not asked."""
        below = scoring.value(self.below)
        low = [exact.below(value, below) for value in scoring.scores(self.condition)]
        then = scoring.scores(self.then) if any(low) else []
        otherwise = [] if all(low) else scoring.scores(self.otherwise)
        return [then[row] if takes else otherwise[row] for row, takes in enumerate(low)]


class Lexicographic(Judge):
    """`first`; where a whole group has the same score under it, plus `second`, which then decides.

    After MAI-Thinking-1.
    """

    COMBINES = True

    judge: Literal["lexicographic"] = "lexicographic"
    first: Part
    second: Part

    def score(self, scoring: Scoring) -> list[float]:
        """The first's scores, plus the second's in groups that tie: the advantage of a group is a
        difference, so what is added to a tied group alone decides there."""
        found, second = list(scoring.scores(self.first)), scoring.scores(self.second)
        for rows in groups(scoring.responses.group):
            if max(found[row] for row in rows) - min(found[row] for row in rows) < EPSILON:
                for row in rows:
                    found[row] += second[row]
        return found


class Normalised(Judge):
    """Each judge's z-score within the group, added (GDPO, arXiv 2601.05242); weigh the result."""

    COMBINES = True

    judge: Literal["normalised"] = "normalised"
    judges: Annotated[tuple[Part, ...], Field(min_length=2)]

    def score(self, scoring: Scoring) -> list[float]:
        """The sum of z-scores for each response: no judge outweighs another by its scale."""
        total = [0.0] * len(scoring.responses)
        for judge in self.judges:
            scores = scoring.scores(judge)
            for rows in groups(scoring.responses.group):
                for row, z in zip(rows, z_scores([scores[row] for row in rows]), strict=True):
                    total[row] += z
        return total


class Whitened(Judge):
    """The judge's z-score over the whole batch (Llama 2, 3.2.3)."""

    COMBINES = True
    WHOLE = True

    judge: Literal["whitened"] = "whitened"
    of: Part

    def score(self, scoring: Scoring) -> list[float]:
        """The z-score of each response."""
        return z_scores(scoring.scores(self.of))


class ByDomain(Judge):
    """Each domain's own judge, which sees the responses to that domain's problems only."""

    COMBINES = True

    judge: Literal["by_domain"] = "by_domain"
    domains: Annotated[dict[str, Part], Field(min_length=1)]

    def parts(self, domain: str | None = None) -> list[Judge]:
        """Those of all domains, or of one."""
        return list(self.domains.values()) if domain is None else [self.domains[domain]]

    def check(self, domains: Sequence[str], *, where: str) -> None:
        """Raises ConfigError for a domain without a judge."""
        for domain in domains:
            if domain not in self.domains:
                raise ConfigError(
                    f"{where}: judges.by_domain has none for domain {domain!r}; it has judges for "
                    f"{', '.join(self.domains)}"
                )

    def score(self, scoring: Scoring) -> list[float]:
        """Each response's score by the judge of its domain. Raises as `check`."""
        rows: dict[str, list[int]] = {}
        for row, problem in enumerate(scoring.responses.problems):
            rows.setdefault(problem["domain"], []).append(row)
        self.check(list(rows), where="the reward")
        scores = [0.0] * len(scoring.responses)
        for domain, index in rows.items():
            found = scoring.subset(index).scores(self.domains[domain])
            for row, value in zip(index, found, strict=True):
                scores[row] = value
        return scores


def _sum(terms: list[Any]) -> Judge:
    """The sum of terms that are still to be checked."""
    return Sum(terms=tuple(terms))


def _terms(judge: Any) -> list[Any]:
    return list(judge.terms) if isinstance(judge, Sum) else [{"weight": 1.0, "of": judge}]


def _inside(value: Any) -> list[Judge]:
    """The judges in the value of a field."""
    if isinstance(value, Judge):
        return [value]
    if isinstance(value, Term):
        return [value.of]
    parts = value.values() if isinstance(value, dict) else value
    return [j for part in parts for j in _inside(part)] if isinstance(value, dict | tuple) else []


def z_scores(scores: Sequence[float]) -> list[float]:
    """(score - mean) / (standard deviation + epsilon), over all rows; 0 where all are alike.

    The standard deviation divides by the number of rows; the whitening of advantages,
    `posttrain.rl.advantage.whitened`, divides by one less.
    """
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    if deviation < EPSILON:
        return [0.0] * len(scores)
    return [(score - mean) / (deviation + EPSILON) for score in scores]


def no_judge_hint(value: object) -> str:
    """What to write where a judge is wanted and something else is given."""
    if isinstance(value, int | float):
        return "a number is written judges.constant(...)"
    if hasattr(value, "kind"):
        return "a reward model is asked by judges.scalar(stage), a language model by compare(stage)"
    return 'it takes what posttrain.judges makes, or JSON of the form {"judge": kind, ...}'


def explain(error: ValidationError, at: str, fields: Iterable[str] = ()) -> str:
    """The first mistake in words: "judge whitened.of.oracle: noise = -1; it has to be ...".

    `at` is what was checked, which has these `fields`.
    """
    # A misspelt field may be the reason why another one is missing.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    value, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    *before, name = [str(place) for place in problem["loc"]] or [""]
    outer = ".".join([at, *before])
    whole = f"{outer}.{name}" if name else outer
    if kind == HIDDEN:
        return f"{outer}: {context['said']}"
    said = str(context.get("error", problem["msg"])).replace("Input should be", "it has to be")
    if said.startswith(f"judge {name}") and isinstance(context.get("error"), ConfigError):
        # A judge inside has said it already.
        return whole + said.removeprefix(f"judge {name}")
    if kind == "union_tag_invalid":
        known = re.findall(r"'(\w+)'", context["expected_tags"])
        tag = str(context["tag"])
        return f"{whole}.{tag}: unknown judge {tag!r}; {choices_text(tag, known)}"
    if kind in ("union_tag_not_found", "model_attributes_type"):
        return f"{whole}: {value!r} is no judge; {no_judge_hint(value)}"
    if kind == "model_type":
        return f"{whole}: {value!r} is no term; it has the form {{weight, of}}"
    if kind == "missing":
        return f"{outer}: {name} is needed"
    if kind == "extra_forbidden":
        return f"{outer}: it reads no {name!r}; {choices_text(name, fields)}"
    if kind == "too_short":
        said = f"it takes {context['min_length']} or more"
    return f"{outer}: {name} = {value!r}; {said}" if name else f"{outer}: {said}"
