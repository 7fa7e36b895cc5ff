"""The kinds of judges that stand by themselves, one frozen class each, and the union of all kinds.

A new kind of judge is one class here, which `AnyJudge` names, and one class that scores unless it
does so itself. Recipes call the classes by the names in `posttrain.judges`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from re import Pattern
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.rewards import penalties
from posttrain.rewards.judge_base import (
    ByDomain,
    Gate,
    Judge,
    Lexicographic,
    Normalised,
    Part,
    Sum,
    Term,
    Whitened,
    explain,
)
from posttrain.rewards.judge_fields import (
    MAX_TOKENS,
    Count,
    Edge,
    GradeTemplate,
    NotNegative,
    Number,
    Pairing,
    PairTemplate,
    Positive,
    Rubric,
    Text,
    Unit,
    Url,
    Variable,
)
from posttrain.rewards.verdicts import BETTER_FORM, GRADE_FORM, RUBRIC_FORM

if TYPE_CHECKING:
    from posttrain.rewards.judging import Scoring


class Verifier(Judge):
    """The verifier of the problem's domain: a value in [0, 1]; 0 where the response was cut."""

    SCORER = "posttrain.stages.judging:VerifierJudge"

    judge: Literal["verifier"] = "verifier"


class Scalar(Judge):
    """A `reward_model` stage's score of the prompt with the response, any real number.

    `squash` puts it through the logistic function, into (0, 1).
    """

    SCORER = "posttrain.stages.judging:ScalarJudge"

    judge: Literal["scalar"] = "scalar"
    model: Edge
    squash: StrictBool = False

    @property
    def edge(self) -> str:
        """That of the reward model."""
        return self.model


class Oracle(Judge):
    """The suite's noisy annotator: what a response is worth to it, in logits, the same every time.

    Five times a hidden quality in [0, 1] plus `noise` times a Gumbel variable; see
    `posttrain.rewards.oracle`.
    """

    SCORER = "posttrain.stages.judging:OracleJudge"
    PAIRS = ("best_against_worst", "strong_against_weak", "all", "random")

    judge: Literal["oracle"] = "oracle"
    noise: NotNegative = 1.0


class Constant(Judge):
    """The same score for everything, such as the floor under a `gate`."""

    judge: Literal["constant"] = "constant"
    value: Number

    def score(self, scoring: Scoring) -> list[float]:
        """`value` for each response."""
        return [float(self.value)] * len(scoring.responses)


class Finished(Judge):
    """1 where the response ended by itself, 0 where it was cut at the length limit."""

    judge: Literal["finished"] = "finished"

    def score(self, scoring: Scoring) -> list[float]:
        """1 or 0 for each response."""
        return [float(ended) for ended in scoring.responses.finished]


class Format(Judge):
    """1 where the regular expression is found in the response, else 0; ^ and $ anchor it."""

    judge: Literal["format"] = "format"
    pattern: Pattern[str]

    def score(self, scoring: Scoring) -> list[float]:
        """1 or 0 for each response."""
        texts, pattern = scoring.responses.texts, self.pattern.pattern
        return [penalties.has_format(text, pattern=pattern) for text in texts]


class Language(Judge):
    """Share of a response in the target language, 0 to 1 (DeepSeek-R1, arXiv 2501.12948, 2.3.2).

    `regex` fits one character of the language. `unit`: a word counts where all of its letters fit,
    or each `character` counts. Only letters are looked at, since digits and signs belong to every
    language; a response without any has 1.
    """

    judge: Literal["language"] = "language"
    regex: Pattern[str]
    unit: Unit = "word"

    def score(self, scoring: Scoring) -> list[float]:
        """A share for each response."""
        how = {"regex": self.regex.pattern, "unit": self.unit}
        return [penalties.language_share(text, **how) for text in scoring.responses.texts]


class Repetition(Judge):
    """A cost: the share of a response's n-grams that have occurred in it before, 0 to 1.

    `unit`: n-grams of a `word` (between white space) or of a `character`.
    """

    judge: Literal["repetition"] = "repetition"
    n: Count = 3
    unit: Unit = "word"

    def score(self, scoring: Scoring) -> list[float]:
        """A share for each response."""
        texts = scoring.responses.texts
        return [penalties.repeated_share(text, n=self.n, unit=self.unit) for text in texts]


class Length(Judge):
    """A cost for long responses, >= 0, from n tokens (stop token included) and `budget` tokens.

    linear: max(0, n - budget) / budget. budget: 1 above the budget (Kimi K2, arXiv 2507.20534).
    soft_overlong: 0 up to budget - `cache`, then a straight line to 1 at budget, 1 above (DAPO,
    arXiv 2503.14476, eq. 13). concave: ((1 + k x)^(1-q) - 1) / (k (1-q)) with x = n / budget, and
    log(1 + k x) / k where q is 1 (Composer 2). pass_rate: n / budget, at most 1, times the group's
    mean score under `of`, the verifier if not given: only what is solved gets shorter (after
    MAI-Thinking-1). group_relative: (n - shortest) / (longest - shortest) of the group, without a
    budget (after Nemotron 3 Nano, arXiv 2512.20848; gate it with the quality).
    """

    READS: ClassVar[Mapping[str, frozenset[str]]] = {
        "linear": frozenset({"budget"}),
        "budget": frozenset({"budget"}),
        "soft_overlong": frozenset({"budget", "cache"}),
        "concave": frozenset({"budget", "k", "q"}),
        "pass_rate": frozenset({"budget", "of"}),
        "group_relative": frozenset(),
    }
    """Shape to the fields that it has besides; the JSON form has no other."""

    judge: Literal["length"] = "length"
    shape: Literal[
        "linear", "budget", "soft_overlong", "concave", "pass_rate", "group_relative"
    ] = "linear"
    budget: Count | None = None
    cache: Count | None = None
    k: Positive | None = None
    q: NotNegative | None = None
    of: Part | None = None

    @model_validator(mode="before")
    @classmethod
    def _solved_is_what_the_verifier_says(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = fields.get("shape") != "pass_rate" or fields.get("of") is not None
        return fields if given else fields | {"of": Verifier()}

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

    def score(self, scoring: Scoring) -> list[float]:
        """A cost for each response."""
        quality = None if self.of is None else scoring.scores(self.of)
        how = {name: getattr(self, name) for name in self.READS[self.shape] - {"of"}}
        tokens, group = scoring.responses.num_tokens, scoring.responses.group
        return penalties.length(self.shape, tokens, group, quality, **how)


class Llm(Judge):
    """A model behind an OpenAI-compatible endpoint grades each response; the score is in [0, 1].

    `url` is the API's base, such as http://localhost:8000/v1; `key` names the environment variable
    that holds the API key. `reference` shows the row's answer. `rubric` is a text for all prompts,
    or True: each problem row has a column `rubric`, a list of {"criterion", "weight"}, and the
    score is the weighted share of those that the model says are met. `template` replaces the
    prompt's text: {prompt}, {response}, {answer}, {rubric} stand for the row's. It has to ask for
    what is read (`posttrain.rewards.verdicts`): a last line `Grade: N`, from 0 to `best`, or with a
    list of criteria a line `1: yes` for each. `max_tokens` is the longest reply, thoughts included.
    """

    SCORER = "posttrain.rewards.grading:Grader"

    judge: Literal["llm"] = "llm"
    url: Url
    model: Text
    key: Variable | None = None
    reference: StrictBool = False
    rubric: Rubric = None
    template: GradeTemplate = None
    best: Positive = 10.0
    max_tokens: Count = MAX_TOKENS

    @model_validator(mode="after")
    def _template_shows_what_is_given(self) -> Self:
        shown = {"answer": ("reference", self.reference), "rubric": ("rubric", bool(self.rubric))}
        for field, (setting, given) in shown.items():
            if self.template is not None and given != (f"{{{field}}}" in self.template):
                raise ValueError(
                    f"the template shows {{{field}}} where {setting} is given, and only there"
                )
        _asks_for(RUBRIC_FORM if self.rubric is True else GRADE_FORM, self.template)
        return self

    @model_serializer(mode="wrap")
    def _what_is_not_the_default(
        self, serialise: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        return _without_default_length(serialise(self))


def _asks_for(form: str, template: str | None) -> None:
    """Raises ValueError for a template that does not ask for what is read in the reply."""
    if template is not None and form.lower() not in template.lower():
        raise ValueError(
            f"the template has to ask for the form in which the reply is read: '{form}' stands in "
            "it nowhere; see docs/language.md, Endpoints"
        )


def _without_default_length(fields: dict[str, Any]) -> dict[str, Any]:
    """A judge as it was before its replies' length was a setting keeps its identity."""
    default = fields["max_tokens"] == MAX_TOKENS
    return {n: value for n, value in fields.items() if n != "max_tokens" or not default}


class Python(Judge):
    """A function of the user's own, `(response, problem) -> number`; made by `judges.python`.

    The text of its file and of what it reads is its identity, see `posttrain.rewards.own_judge`.
    """

    SCORER = "posttrain.stages.judging:PythonJudge"

    judge: Literal["python"] = "python"
    name: Text
    source: Text
    data: dict[str, str] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """The kind and the function."""
        return f"python.{self.name.rpartition(':')[2]}"


class Compare(Judge):
    """A language model of a stage says which of two responses is better: share of wins."""

    SCORER = "posttrain.stages.judging:ModelComparison"

    judge: Literal["compare"] = "compare"
    model: Edge
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: PairTemplate = None

    @property
    def edge(self) -> str:
        """That of the language model."""
        return self.model


class CompareEndpoint(Judge):
    """The same by a model behind an endpoint."""

    SCORER = "posttrain.rewards.grading:EndpointComparison"

    judge: Literal["compare_endpoint"] = "compare_endpoint"
    url: Url
    model: Text
    key: Variable | None = None
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: PairTemplate = None
    max_tokens: Count = MAX_TOKENS

    @model_validator(mode="after")
    def _template_asks_for_the_form(self) -> Self:
        _asks_for(BETTER_FORM, self.template)
        return self

    @model_serializer(mode="wrap")
    def _what_is_not_the_default(
        self, serialise: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        return _without_default_length(serialise(self))


class Itself(Judge):
    """`compare` by the policy that is being trained, with its newest weights (Kimi K2, DeepSeek
    V4). Train it on comparisons as well: `posttrain.rewards.comparisons`."""

    SCORER = "posttrain.stages.judging:ModelComparison"
    STAGES = ("rl",)
    OTHERWISE = "judges.itself() is for rl, which trains a policy; write judges.compare(stage)"

    judge: Literal["itself"] = "itself"
    pairing: Pairing = "all"
    swap: StrictBool = True
    template: PairTemplate = None


class Human(Judge):
    """People compare pairs: the stage writes a file, the run waits until it is filled in.

    `file` is where it is written, a path from the current directory; without one it lies in the
    stage's work directory, which the message names. `pairing` as in `compare`. Takes part in no sum
    or combination.
    """

    SCORER = "posttrain.rewards.people:HumanJudge"
    ALONE = True
    WHOLE = True
    PAIRS = ("all", "random")
    STAGES = ("pairs", "score", "best")
    OTHERWISE = (
        "judges.human() is for pairs, score and best; train a reward_model on the pairs, and give "
        "judges.scalar(...) here"
    )

    judge: Literal["human"] = "human"
    file: Text | None = None
    pairing: Pairing = "circular"


class Answer(Judge):
    """The judge's score of the answer alone, as a verifier sees it; without an answer that of an
    empty text.

    For models that think: a judge reads all that was said otherwise. Raises ConfigError for
    `length` inside, which counts the tokens of whole responses.
    """

    COMBINES = True

    judge: Literal["answer"] = "answer"
    of: Part

    @model_validator(mode="after")
    def _no_tokens(self) -> Self:
        if any(isinstance(part, Length) for part in self.walk()):
            raise ValueError(
                "length counts the tokens of whole responses, of an answer they are not known; "
                "write it outside of judges.answer(...)"
            )
        return self

    def score(self, scoring: Scoring) -> list[float]:
        """A score for each response."""
        return scoring.answers().scores(self.of)


AnyJudge = Annotated[
    Verifier | Scalar | Oracle | Constant | Finished | Format | Language | Repetition | Length
    | Llm | Python | Compare | CompareEndpoint | Itself | Human
    | Sum | Gate | Lexicographic | Normalised | Whitened | ByDomain | Answer,
    Field(discriminator="judge"),
]  # fmt: skip
for kind in (Length, Term, Sum, Gate, Lexicographic, Normalised, Whitened, ByDomain, Answer):
    kind.model_rebuild(_types_namespace={"AnyJudge": AnyJudge})
_ADAPTER: TypeAdapter[Judge] = TypeAdapter(AnyJudge)


def parse_judge(value: Any, *, where: str = "judge") -> Judge:
    """The judge that a value is, or that its JSON form describes; `where` begins every message.

    Raises ConfigError for an unknown kind or field, a missing one, a value that does not fit, and
    people who are not alone.
    """
    if isinstance(value, Judge):
        return value
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise ConfigError(explain(error, where)) from None


JudgeSetting = Annotated[AnyJudge, BeforeValidator(parse_judge)]
"""The type of a setting that holds a judge."""


def check_use(judge: Judge, kind: str, *, where: str) -> None:
    """Raises ConfigError for a judge that a stage of this kind cannot ask."""
    for part in judge.walk():
        if part.STAGES and kind not in part.STAGES:
            raise ConfigError(f"{where}: {part.OTHERWISE}")
