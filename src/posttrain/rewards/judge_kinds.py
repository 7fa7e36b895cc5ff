"""The kinds of judges: one frozen class each, with its fields, its checks, and how it scores.

A judge is a value. Its JSON form is `{"judge": kind, ...fields}`, nested, and `parse_judge` reads
it again. What can be computed from responses, or from the scores of the judges inside it, a judge
computes in `score`; one that needs a model, a verifier or people names in `SCORER` the class that
does it. A new kind of judge is one class here, with its name in `AnyJudge`, and one class that
scores, unless it does so itself. Imports no torch.

Recipes make judges with the functions of `posttrain.judges`, which say what each one means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards import combine, penalties
from posttrain.schedules import AnySchedule, Schedule, is_schedule, parse_schedule

if TYPE_CHECKING:
    from posttrain.rewards.judging import Scorer, Scoring, Tools

EDGE = "judges."
"""What the edges of a judge's stages begin with."""
At = Callable[[Schedule], float]
"""The value of a schedule at the present step."""


class Handle(Protocol):
    """A stage of the recipe, as `posttrain.language.handles.Stage`."""

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        ...

    @property
    def kind(self) -> str:
        """Its kind, empty while it is not defined yet."""
        ...


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("it has to be a number")
    return value


def _weight(value: Any) -> Any:
    if not is_schedule(value):
        try:
            return _number(value)
        except ValueError:
            raise ValueError("it has to be a number or a schedule") from None
    schedule = parse_schedule(value)
    try:
        for number in schedule.possible_values():
            _number(number)
    except ValueError:
        raise ValueError("it has to be a schedule of numbers") from None
    return schedule


def _edge(value: str) -> str:
    if not value.startswith(EDGE):
        raise ValueError(
            f"it has to be the edge of a stage, {EDGE}NAME; pass the stage in the recipe"
        )
    return value


def _url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("it has to be a url that begins with http:// or https://")
    return value


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it has to be a regular expression ({error})") from None
    return value


def _rubric(value: Any) -> Any:
    if value is None or value is True or (isinstance(value, str) and value):
        return value
    raise ValueError("it has to be a text, or true to read each row's rubric")


def _template(*fields: str, needs: Sequence[str]) -> AfterValidator:
    """A text for the values of `fields`; all of `needs` stand in it."""

    def check(value: str | None) -> str | None:
        found = set(needs) if value is None else set(re.findall(r"\{(\w+)\}", value))
        if not set(needs) <= found <= set(fields):
            may, must = (", ".join(f"{{{name}}}" for name in names) for names in (fields, needs))
            raise ValueError(f"it has to be a text with {must}; it may hold {may}")
        return value

    return AfterValidator(check)


def _no_people(judge: Judge) -> Judge:
    if isinstance(judge, Human):
        raise ValueError(
            "people compare pairs by themselves; judges.human() stands alone, in no sum or "
            "combination"
        )
    return judge


Number = Annotated[int | float, BeforeValidator(_number)]
Weight = Annotated[int | float | AnySchedule, BeforeValidator(_weight)]
Count = Annotated[StrictInt, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Regex = Annotated[str, AfterValidator(_regex)]
Url = Annotated[str, AfterValidator(_url)]
Edge = Annotated[str, AfterValidator(_edge)]
Unit = Literal["word", "character"]
Pairing = Literal["all", "circular"]
Question = Annotated[str | None, _template("prompt", "a", "b", "answer", needs=("a", "b"))]
Part = Annotated["AnyJudge", AfterValidator(_no_people)]
"""A judge within another one."""


class Judge(BaseModel):
    """What scores responses. A recipe adds, subtracts and weighs judges."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    SCORER: ClassVar[str] = ""
    """Where the class that scores for it is, as "module:name"; it is made from the judge and the
    stage's `Tools`. Empty for a judge that scores by itself."""
    COMBINES: ClassVar[bool] = False
    """Whether its scores are made of those of its parts, which are logged in its place."""
    WHOLE: ClassVar[bool] = False
    """Whether it has to see all responses at once, not group by group."""
    STAGES: ClassVar[tuple[str, ...]] = ()
    """The kinds of stages that can ask it; any where it names none."""
    OTHERWISE: ClassVar[str] = ""
    """What to write in other stages."""

    _stage: Handle | None = PrivateAttr(None)
    """The stage that it asks, where a recipe made it."""

    judge: str
    """Its kind."""

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
    def stages(self) -> dict[str, Handle]:
        """Edge, `judges.NAME`, to the stage that is asked; of a judge that a recipe made."""
        return {
            part.edge: part._stage
            for part in self.walk()
            if part.edge is not None and part._stage is not None
        }

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return self.model_dump(mode="json")

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The judges directly inside; with `domain` only those that see its responses."""
        return []

    def walk(self, domain: str | None = None) -> Iterator[Judge]:
        """The judge itself and then all inside, in the order in which they are written; with
        `domain` without what other domains have for themselves."""
        yield self
        for part in self.parts(domain):
            yield from part.walk(domain)

    @property
    def scheduled(self) -> bool:
        """Whether a weight in it has a schedule."""
        return self.resolved(None) != self

    def asked_about_pairs(self, how: str) -> bool:
        """Whether a `pairs` stage asks it which of two responses is better, not for scores."""
        return False

    def resolved(self, at: At | None) -> Self:
        """The same with each schedule replaced by its value, the first one where `at` is None."""
        return _resolved(self, at)

    def score(self, scoring: Scoring) -> list[float]:
        """One number for each of `scoring.responses`, higher is better."""
        return scoring.ask(self)

    def scorer(self, tools: Tools) -> Scorer:
        """What scores for it, made with what the stage has. Raises what loading a model raises."""
        module, _, name = self.SCORER.partition(":")
        made: Scorer = getattr(import_module(module), name)(self, tools)
        return made

    def __mul__(self, weight: float | Schedule) -> Judge:
        """Raises ConfigError for a weight that is neither a number nor a schedule."""
        if isinstance(self, Sum) and len(self.terms) == 1:
            (term,) = self.terms
            if isinstance(weight, int | float) and not isinstance(term.weight, Schedule):
                return make_judge("sum", terms=[_term(weight * term.weight, term.of)])
        return make_judge("sum", terms=[_term(weight, self)])

    __rmul__ = __mul__

    def __neg__(self) -> Judge:
        return self * -1.0

    def __add__(self, other: Judge) -> Judge:
        """Raises ConfigError for what is no judge."""
        require_judge(other, "a summand of a judge")
        return make_judge("sum", terms=[*_terms(self), *_terms(other)])

    def __radd__(self, other: object) -> Judge:
        # What sum() begins with.
        if isinstance(other, int) and other == 0:
            return self
        raise _no_judge(other, "a summand of a judge")

    def __sub__(self, other: Judge) -> Judge:
        """Raises ConfigError for what is no judge."""
        return self + -require_judge(other, "what is subtracted from a judge")

    def __rsub__(self, other: object) -> Judge:
        raise _no_judge(other, "what a judge is subtracted from")


class Verifier(Judge):
    """The verifier of the problem's domain."""

    SCORER = "posttrain.stages.judging:VerifierJudge"

    judge: Literal["verifier"] = "verifier"


class Scalar(Judge):
    """A reward model."""

    SCORER = "posttrain.stages.judging:ScalarJudge"

    judge: Literal["scalar"] = "scalar"
    model: Edge
    squash: StrictBool = False

    @property
    def edge(self) -> str:
        """That of the reward model."""
        return self.model


class Oracle(Judge):
    """The suite's noisy annotator."""

    SCORER = "posttrain.stages.judging:OracleJudge"

    judge: Literal["oracle"] = "oracle"
    noise: Annotated[Number, Field(ge=0)] = 1.0

    def asked_about_pairs(self, how: str) -> bool:
        """Always: it prefers better than it scores."""
        return True


class Constant(Judge):
    """The same score for everything."""

    judge: Literal["constant"] = "constant"
    value: Number

    def score(self, scoring: Scoring) -> list[float]:
        """The value for each response."""
        return [float(self.value)] * len(scoring.responses)


class Finished(Judge):
    """Whether a response ended by itself."""

    judge: Literal["finished"] = "finished"

    def score(self, scoring: Scoring) -> list[float]:
        """1 or 0 for each response."""
        return [float(ended) for ended in scoring.responses.finished]


class Format(Judge):
    """Whether a pattern is found in a response."""

    judge: Literal["format"] = "format"
    pattern: Regex

    def score(self, scoring: Scoring) -> list[float]:
        """1 or 0 for each response."""
        texts = scoring.responses.texts
        return [penalties.has_format(text, pattern=self.pattern) for text in texts]


class Language(Judge):
    """Share of a response in the target language."""

    judge: Literal["language"] = "language"
    regex: Regex
    unit: Unit = "word"

    def score(self, scoring: Scoring) -> list[float]:
        """A share in [0, 1] for each response."""
        how = {"regex": self.regex, "unit": self.unit}
        return [penalties.language_share(text, **how) for text in scoring.responses.texts]


class Repetition(Judge):
    """Share of a response's n-grams that have occurred in it before."""

    judge: Literal["repetition"] = "repetition"
    n: Count = 3
    unit: Unit = "word"

    def score(self, scoring: Scoring) -> list[float]:
        """A share in [0, 1] for each response."""
        texts = scoring.responses.texts
        return [penalties.repeated_share(text, n=self.n, unit=self.unit) for text in texts]


class Length(Judge):
    """A cost for long responses; the JSON form holds what its shape reads and nothing else."""

    READS: ClassVar[Mapping[str, frozenset[str]]] = {
        "linear": frozenset({"budget"}),
        "budget": frozenset({"budget"}),
        "soft_overlong": frozenset({"budget", "cache"}),
        "concave": frozenset({"budget", "k", "q"}),
        "pass_rate": frozenset({"budget", "of"}),
        "group_relative": frozenset(),
    }
    """Shape to the fields that it has besides."""

    judge: Literal["length"] = "length"
    shape: Literal[
        "linear", "budget", "soft_overlong", "concave", "pass_rate", "group_relative"
    ] = "linear"
    budget: Count | None = None
    cache: Count | None = None
    k: Annotated[Number, Field(gt=0)] | None = None
    q: Annotated[Number, Field(ge=0)] | None = None
    of: Part | None = None

    @model_validator(mode="after")
    def _shape_reads(self) -> Self:
        reads, shape = self.READS[self.shape], f"with shape = {self.shape}"
        for name in ("budget", "cache", "k", "q", "of"):
            if name not in reads and getattr(self, name) is not None:
                raise ValueError(f"{shape} it reads no {name!r}; {choices_text(name, reads)}")
            if name in reads and getattr(self, name) is None:
                raise ValueError(f"{shape} it needs {name}")
        if self.cache is not None and self.budget is not None and self.cache > self.budget:
            raise ValueError(f"cache = {self.cache} is more than budget = {self.budget}")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, serialise: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in serialise(self).items() if value is not None}

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The judge of quality, where the shape reads one."""
        return [] if self.of is None else [self.of]

    def score(self, scoring: Scoring) -> list[float]:
        """A cost >= 0 for each response."""
        quality = None if self.of is None else scoring.scores(self.of)
        how = {name: getattr(self, name) for name in self.READS[self.shape] - {"of"}}
        tokens, group = scoring.responses.num_tokens, scoring.responses.group
        return penalties.length(self.shape, tokens, group, quality, **how)


class Llm(Judge):
    """A model behind an endpoint that grades each response."""

    SCORER = "posttrain.rewards.grading:Grader"

    judge: Literal["llm"] = "llm"
    url: Url
    model: Text
    key: Text | None = None
    reference: StrictBool = False
    rubric: Annotated[bool | str | None, BeforeValidator(_rubric)] = None
    template: Annotated[
        str | None,
        _template("prompt", "response", "answer", "rubric", needs=("prompt", "response")),
    ] = None
    best: Annotated[Number, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _template_shows_what_is_given(self) -> Self:
        shown = {"answer": ("reference", self.reference), "rubric": ("rubric", bool(self.rubric))}
        for field, (setting, given) in shown.items():
            if self.template is not None and given != (f"{{{field}}}" in self.template):
                raise ValueError(
                    f"the template shows {{{field}}} where {setting} is given, and only there"
                )
        return self


class Compare(Judge):
    """A language model that says which of two responses is better."""

    SCORER = "posttrain.stages.judging:ModelComparison"

    judge: Literal["compare"] = "compare"
    model: Edge
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: Question = None

    @property
    def edge(self) -> str:
        """That of the language model."""
        return self.model


class CompareEndpoint(Judge):
    """A model behind an endpoint that says which of two responses is better."""

    SCORER = "posttrain.rewards.grading:EndpointComparison"

    judge: Literal["compare_endpoint"] = "compare_endpoint"
    url: Url
    model: Text
    key: Text | None = None
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: Question = None


class Itself(Judge):
    """The policy that is being trained says which of two responses is better."""

    SCORER = "posttrain.stages.judging:ModelComparison"
    STAGES = ("rl",)
    OTHERWISE = "judges.itself() is for rl, which trains a policy; write judges.compare(stage)"

    judge: Literal["itself"] = "itself"
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: Question = None


class Human(Judge):
    """People who compare pairs of responses."""

    SCORER = "posttrain.rewards.people:HumanJudge"
    WHOLE = True
    STAGES = ("pairs", "score", "best")
    OTHERWISE = (
        "judges.human() is for pairs, score and best; train a reward_model on the pairs, and give "
        "judges.scalar(...) here"
    )

    judge: Literal["human"] = "human"
    file: Text | None = None
    pairing: Pairing = "circular"

    def asked_about_pairs(self, how: str) -> bool:
        """Where the pairs do not follow from scores."""
        return how in ("all", "random")


class Term(BaseModel):
    """One summand with its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Weight
    of: Part


class Sum(Judge):
    """Judges added up, each times its weight."""

    COMBINES = True

    judge: Literal["sum"] = "sum"
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The summands."""
        return [term.of for term in self.terms]

    def score(self, scoring: Scoring) -> list[float]:
        """The weighted sum for each response."""
        weights: list[Any] = [term.weight for term in self.terms]
        return combine.weighted_sum(weights, [scoring.scores(term.of) for term in self.terms])


class Gate(Judge):
    """One judge or another one, by what a third one says."""

    COMBINES = True

    judge: Literal["gate"] = "gate"
    below: Weight
    condition: Part
    then: Part
    otherwise: Part

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The condition and both branches."""
        return [self.condition, self.then, self.otherwise]

    def score(self, scoring: Scoring) -> list[float]:
        """A branch that no response takes is not asked."""
        below: Any = self.below
        condition = scoring.scores(self.condition)
        low = [value < below for value in condition]
        skipped = [0.0] * len(condition)
        then = scoring.scores(self.then) if any(low) else skipped
        otherwise = skipped if all(low) else scoring.scores(self.otherwise)
        return combine.gated(condition, below, then, otherwise)


class Lexicographic(Judge):
    """A judge, and a second one where the first sees no difference."""

    COMBINES = True

    judge: Literal["lexicographic"] = "lexicographic"
    first: Part
    second: Part

    def parts(self, domain: str | None = None) -> list[Judge]:
        """Both."""
        return [self.first, self.second]

    def score(self, scoring: Scoring) -> list[float]:
        """The first's scores, and the second's added in groups that tie on the first."""
        first, second = scoring.scores(self.first), scoring.scores(self.second)
        return combine.lexicographic(first, second, scoring.responses.group)


class Normalised(Judge):
    """Each judge's z-score within the group, added."""

    COMBINES = True

    judge: Literal["normalised"] = "normalised"
    judges: Annotated[tuple[Part, ...], Field(min_length=2)]

    def parts(self, domain: str | None = None) -> list[Judge]:
        """All of them."""
        return list(self.judges)

    def score(self, scoring: Scoring) -> list[float]:
        """The sum of z-scores for each response."""
        scores = [scoring.scores(judge) for judge in self.judges]
        return combine.normalised(scores, scoring.responses.group)


class Whitened(Judge):
    """A judge's z-score over the whole batch."""

    COMBINES = True
    WHOLE = True

    judge: Literal["whitened"] = "whitened"
    of: Part

    def parts(self, domain: str | None = None) -> list[Judge]:
        """The one."""
        return [self.of]

    def score(self, scoring: Scoring) -> list[float]:
        """The z-score of each response."""
        return combine.z_scores(scoring.scores(self.of))


class ByDomain(Judge):
    """Each domain's own judge."""

    COMBINES = True

    judge: Literal["by_domain"] = "by_domain"
    domains: Annotated[dict[str, Part], Field(min_length=1)]

    def parts(self, domain: str | None = None) -> list[Judge]:
        """Those of all domains, or of one."""
        return list(self.domains.values()) if domain is None else [self.domains[domain]]

    def score(self, scoring: Scoring) -> list[float]:
        """Each response's score by the judge of its domain, which sees that domain's responses
        only. Raises ConfigError for a domain without a judge."""
        rows: dict[str, list[int]] = {}
        for row, problem in enumerate(scoring.responses.problems):
            rows.setdefault(problem["domain"], []).append(row)
        scores = [0.0] * len(scoring.responses)
        for domain, index in rows.items():
            if domain not in self.domains:
                raise ConfigError(
                    f"judge by_domain: it has none for domain {domain!r}; it has judges for "
                    f"{', '.join(self.domains)}"
                )
            found = scoring.subset(index).scores(self.domains[domain])
            for row, value in zip(index, found, strict=True):
                scores[row] = value
        return scores


AnyJudge = Annotated[
    Verifier
    | Scalar
    | Oracle
    | Constant
    | Finished
    | Format
    | Language
    | Repetition
    | Length
    | Llm
    | Compare
    | CompareEndpoint
    | Itself
    | Human
    | Sum
    | Gate
    | Lexicographic
    | Normalised
    | Whitened
    | ByDomain,
    Field(discriminator="judge"),
]

KINDS: dict[str, type[Judge]] = {
    kind.model_fields["judge"].default: kind for kind in get_args(get_args(AnyJudge)[0])
}
_ADAPTER: TypeAdapter[Judge] = TypeAdapter(AnyJudge)


def parse_judge(value: Any, *, where: str = "") -> Judge:
    """The judge that a value is, or that its JSON form describes; `where` begins every message.

    Raises ConfigError for an unknown kind or field, a missing one, a value that does not fit, and
    people who are not alone.
    """
    if isinstance(value, Judge):
        return value
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise ConfigError(_told(error, where)) from None


def make_judge(kind: str, **fields: Any) -> Judge:
    """A judge of this kind. Raises ConfigError as `parse_judge`."""
    return parse_judge({"judge": kind, **fields})


JudgeSetting = Annotated[AnyJudge, BeforeValidator(parse_judge)]
"""The type of a setting that holds a judge."""


def check_domains(judge: Judge, domains: Sequence[str], *, where: str) -> None:
    """Raises ConfigError where a `by_domain` has no judge for one of these domains."""
    for part in judge.walk():
        if isinstance(part, ByDomain):
            missing = [domain for domain in domains if domain not in part.domains]
            if missing:
                raise ConfigError(
                    f"{where}: judges.by_domain has none for domain {missing[0]!r}; it has judges "
                    f"for {', '.join(part.domains)}"
                )


def check_use(judge: Judge, kind: str, *, where: str) -> None:
    """Raises ConfigError for a judge that a stage of this kind cannot ask."""
    for part in judge.walk():
        if part.STAGES and kind not in part.STAGES:
            raise ConfigError(f"{where}: {part.OTHERWISE}")


def require_judge(value: object, what: str) -> Judge:
    """The value if it is a judge; else ConfigError, with `what` it stands for."""
    if not isinstance(value, Judge):
        raise _no_judge(value, what)
    return value


def _no_judge(value: object, what: str) -> ConfigError:
    hint = "judges.constant(...) for a number"
    if not isinstance(value, int | float):
        hint = "judges.scalar(stage) for a reward model, judges.compare(stage) for a language model"
    return ConfigError(
        f"{what} is {value!r}, which is no judge; it takes what posttrain.judges makes, such as "
        f"judges.verifier(), or {hint}"
    )


def _terms(judge: Judge) -> list[Any]:
    return list(judge.terms) if isinstance(judge, Sum) else [_term(1.0, judge)]


def _term(weight: Any, judge: Judge) -> dict[str, Any]:
    """A term that is still to be checked."""
    return {"weight": weight, "of": judge}


def _resolved(value: Any, at: At | None) -> Any:
    if isinstance(value, Schedule):
        return value.possible_values()[0] if at is None else at(value)
    if isinstance(value, Judge | Term):
        fields = {name: _resolved(getattr(value, name), at) for name in type(value).model_fields}
        return value.model_copy(update=fields)
    if isinstance(value, tuple):
        return tuple(_resolved(part, at) for part in value)
    if isinstance(value, dict):
        return {name: _resolved(part, at) for name, part in value.items()}
    return value


def _told(error: ValidationError, where: str) -> str:
    """The first mistake, with the way to it: "judge whitened.of.oracle: noise = -1; ..."."""
    # A misspelt field may be the reason why another one is missing.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    value, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    places = [str(place) for place in problem["loc"]]
    whole = ".".join(([where] if where else []) + places)
    whole = whole if where else f"judge {whole}".rstrip()
    if kind == "union_tag_invalid":
        return f"{whole}.{context['tag']}: unknown judge {context['tag']!r}; " + choices_text(
            str(context["tag"]), KINDS
        )
    if kind in ("union_tag_not_found", "model_attributes_type"):
        return f'{whole}: {value!r} is no judge; it has the form {{"judge": kind, ...}}'
    if kind == "model_type":
        return f"{whole}: {value!r} is no term; it has the form {{weight, of}}"
    said = str(context.get("error", problem["msg"])).replace("Input should be", "it has to be")
    if not places or places[-1] in KINDS:
        # A mistake of the judge as a whole, not of one field.
        return f"{whole}: {said}"
    at, name = whole.rpartition(".")[0], places[-1]
    if kind == "missing":
        return f"{at}: {name} is needed"
    if kind == "extra_forbidden":
        owner = KINDS.get(places[-2], Term)
        return f"{at}: it reads no {name!r}; " + choices_text(
            name, owner.model_fields.keys() - {"judge"}
        )
    if kind == "too_short":
        said = f"it takes {context['min_length']} or more"
    return f"{at}: {name} = {value!r}; {said}"
