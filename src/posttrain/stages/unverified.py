"""What an evaluation says where accuracy is not all: in domains without a verifier how far a model
is from others, how long its responses are and how many were cut; and what judges say of responses.

KL is the estimator k1: the mean over the tokens that a model sampled at temperature 1 of
log p_model - log p_other, both after the same tokens. It is unbiased for the KL of the model from
the other one and can be below 0 by chance. Its interval is over problems.

Legend: B rows (responses), N sampled tokens, P problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.backends.base import Scorer
from posttrain.backends.chat import Chat
from posttrain.backends.prompting import Problem, asked
from posttrain.backends.vocabulary import check_same_tokens
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import edge_name, role_of
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.judge_kinds import Compare, CompareEndpoint, Oracle
from posttrain.rewards.judging import Responses, RewardFunction
from posttrain.rewards.people import Pair
from posttrain.rl.batch import Batch
from posttrain.rl.statistics import mean_interval, ratio_interval, wins
from posttrain.stages.context import Context
from posttrain.stages.judging import ROWS_PER_CALL, make_reward
from posttrain.stages.settings.models import Evaluate

if TYPE_CHECKING:  # it imports this module
    from posttrain.stages.evaluate import Answers

Array = NDArray[np.float64]
DECODINGS = ("sampled", "greedy")


def routes_of(settings: Evaluate, problems: Mapping[str, list[Problem]]) -> dict[str, str]:
    """Domain, or domain/mode, to the name of its teacher, of those that have one."""
    return {
        name: settings.routes[key]
        for name, rows in problems.items()
        for key in (name, rows[0]["domain"])
        if key in settings.routes
    }


def behaviours(
    settings: Evaluate,
    models: Mapping[str, Path],
    problems: Mapping[str, list[Problem]],
    answers: Mapping[Path, Mapping[str, Answers]],
) -> dict[str, Any]:
    """What was measured in the domains without a verifier, `problems`."""
    taught = routes_of(settings, problems)
    return {
        name: {
            "num_problems": len(rows),
            "teacher": taught.get(name),
            "models": {edge: answers[path][name].behaviour for edge, path in models.items()},
        }
        for name, rows in problems.items()
    }


class Behaviour:
    """Measures models in domains without a verifier."""

    def __init__(
        self,
        settings: Evaluate,
        ctx: Context,
        models: Mapping[str, Path],
        problems: Mapping[str, list[Problem]],
    ) -> None:
        self.settings, self.ctx, self.models = settings, ctx, models
        self.routes = routes_of(settings, problems)
        self.students = {p for e, p in models.items() if role_of(e) in ("student", "students")}
        self._scorers: dict[Path, Scorer] = {}

    def of(self, path: Path, name: str, chat: Chat, sampled: Batch) -> dict[str, Any]:
        """Length in tokens, share of truncated responses, and KL to init; of a student also KL to
        its teacher. Another model reads a response behind the prompt in its own template. A KL is
        None where there is no such other model, or its tokens differ."""
        how: dict[str, Any] = {"resamples": self.settings.bootstrap, "seed": self.settings.seed}
        count = int(sampled["group_B"].max()) + 1
        # One per response -> one per problem, the mean over its samples.
        length_P = sampled.sampled_len_B.double().reshape(count, -1).mean(dim=1).numpy()
        finished_B = sampled["finished_B"].double()
        teacher = self.routes.get(name)
        others = {"kl_init": self.models.get("init"), "kl_teacher": None}
        if teacher is not None and path in self.students:
            others["kl_teacher"] = self.models[edge_name("teachers", teacher)]
        kls = {
            key: None if other in (None, path) else self._kl(other, chat, sampled, count, how)
            for key, other in others.items()
        }
        return {
            "length": mean_interval({name: length_P}, **how, of="number"),
            "truncated": 1.0 - float(finished_B.mean()),
            **kls,
        }

    def _kl(
        self, other: Path | None, chat: Chat, sampled: Batch, count: int, how: Mapping[str, Any]
    ) -> dict[str, float] | None:
        assert other is not None
        if other not in self._scorers:
            self._scorers[other] = self.ctx.scorer(other, precision=self.settings.precision)
        scorer = self._scorers[other]
        try:
            check_same_tokens(chat, scorer.chat, "other")
            rows = _read_by(scorer.chat, chat, sampled)
        except ConfigError:
            return None
        if any(token not in scorer.chat.ids for token in set(sampled.targets_N.tolist())):
            # A token that the other has not: it would never have said that.
            return None
        k1_N = sampled["sampler_logp_N"].double().cpu() - scorer.logprobs(rows).double()
        group_N = sampled["group_B"][sampled.row_N]
        total_P = torch.zeros(count, dtype=torch.float64).index_add_(0, group_N, k1_N)
        count_P = torch.bincount(group_N, minlength=count).double()
        return ratio_interval(total_P.numpy(), count_P.numpy(), **how)


def _read_by(reader: Chat, chat: Chat, sampled: Batch) -> Batch:
    """What a model has sampled, as another one reads it: behind the prompt in its own template.
    Raises ConfigError where that has not the mode, or does not take the conversation."""
    if reader.lays_out_as(chat):
        return sampled
    prompts = []
    for problem in sampled.problems:
        shown, mode = asked(problem), problem.get("mode")
        prompts.append(reader.prompt_before(shown, chat.opened(shown, mode), mode))
    return sampled.with_prompts(prompts)


# -- judges ----------------------------------------------------------------------------------------


def judge_all(
    settings: Evaluate,
    ctx: Context,
    models: Mapping[str, Path],
    problems: Mapping[str, list[Problem]],
    answers: Mapping[Path, Mapping[str, Answers]],
) -> dict[str, Any]:
    """What the judges say: mean score of each model and how often it wins against init.

    The domains that have a judge only. Answers keep the scores of their responses.
    """
    found: dict[str, Any] = {}
    how: dict[str, Any] = {"resamples": settings.bootstrap, "seed": settings.seed}
    for name, rows in problems.items():
        judge = settings.judges.get(name, settings.judges.get(rows[0]["domain"]))
        if judge is None:
            continue
        judged = JudgedDomain(judge, settings, ctx)
        of_model: dict[Path, dict[str, Any]] = {}
        reference = models.get("init")
        # Init first: the others are compared with its scores.
        for path in dict.fromkeys([*([] if reference is None else [reference]), *models.values()]):
            against = answers[reference][name] if reference not in (None, path) else None
            of_model[path] = judged.measure(answers[path][name], against, how)
        found[name] = {
            "num_problems": len(rows),
            "judge": [part.label for part in judge.walk(rows[0]["domain"]) if not part.COMBINES],
            "compares": judged.compares,
            "unit": judged.unit,
            "models": {edge: of_model[path] for edge, path in models.items()},
        }
    return found


class JudgedDomain:
    """One judge, made once, asked about the answers of all models to one domain."""

    def __init__(self, judge: Judge, settings: Evaluate, ctx: Context) -> None:
        self.compares = isinstance(judge, Compare | CompareEndpoint)
        if isinstance(judge, Compare | CompareEndpoint):
            # Both orders: models have a liking for the first or the second place.
            judge = judge.model_copy(update={"pairing": "all", "swap": True})
        self.judge = judge
        self.reward: RewardFunction = make_reward(
            judge,
            ctx,
            precision=settings.precision,
            seed=settings.seed,
            cut=settings.on_long == "truncate",
        )
        self.unit = True
        """Whether all scores lie in [0, 1], as shares do."""

    def measure(
        self, answers: Answers, against: Answers | None, how: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`score` and `win`, each with its interval or None, and both for greedy decoding."""
        found: dict[str, Any] = {}
        for decoding in DECODINGS:
            score_P = None if self.compares else self._scores(answers, decoding)
            win_P = None if against is None else self._wins(answers, against, decoding)
            cells = {
                key: None if value_P is None else mean_interval({"": value_P}, **how)
                for key, value_P in (("score", score_P), ("win", win_P))
            }
            found |= cells if decoding == "sampled" else {"greedy": cells}
        return found

    def _scores(self, answers: Answers, decoding: str) -> Array:
        """The mean score of the responses to each problem."""
        scores = self._ask(answers.responses[decoding])
        answers.judged[decoding] = scores
        self.unit = self.unit and all(0 <= score <= 1 for score in scores)
        return _by_problem(scores, answers.count)

    def _wins(self, answers: Answers, against: Answers, decoding: str) -> Array:
        """What each problem's responses win against those of another model: 1, 0.5 or 0 by scores,
        or the mean of what a judge says that compares response with response."""
        ours, theirs = answers.responses[decoding], against.responses[decoding]
        if self.compares:
            shares = self._ask(_side_by_side(ours, theirs))[: len(ours)]
            answers.judged[decoding] = shares
            return _by_problem(shares, answers.count)
        if isinstance(self.judge, Oracle):
            scorer: Any = self.reward.scorers[self.judge.identity]
            rows = list(zip(ours.problems, ours.texts, theirs.texts, strict=True))
            first = scorer.prefer([Pair(problem=p, first=a, second=b) for p, a, b in rows])
            second = scorer.prefer([Pair(problem=p, first=b, second=a) for p, a, b in rows])
            shares = [(a.first + 1 - b.first) / 2 for a, b in zip(first, second, strict=True)]
            return _by_problem(shares, answers.count)
        mine, other = (a.judged[decoding] for a in (answers, against))
        return wins(_by_problem(mine, answers.count), _by_problem(other, against.count))

    def _ask(self, responses: Responses) -> list[float]:
        scores = [0.0] * len(responses)
        for index in self.reward.portions(responses, ROWS_PER_CALL):
            found, _ = self.reward.score(responses.select(index))
            for row, score in zip(index, found, strict=True):
                scores[row] = score
        return scores


def _side_by_side(ours: Responses, theirs: Responses) -> Responses:
    """Both, each response in a group with the other model's response of the same number."""
    columns = {
        name: [*column, *getattr(theirs, name)]
        for name, column in vars(ours).items()
        if column is not None
    }
    return Responses(**columns | {"group": [*range(len(ours)), *range(len(theirs))]})


def _by_problem(scores: Sequence[float], count: int) -> Array:
    """One per response -> the mean of each problem's, [P]."""
    found: Array = np.asarray(scores, dtype=np.float64).reshape(count, -1).mean(axis=1)
    return found
