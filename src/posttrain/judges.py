"""Judges: what scores a response, as values that a recipe passes to `rl`, `score` and `pairs`.

    reward = judges.verifier() - 0.1 * judges.length(budget=32, shape="soft_overlong", cache=8)
    reward = judges.gate(judges.scalar(safety), below=0.15,
                         then=judges.scalar(safety), otherwise=judges.scalar(helpful))

A judge is frozen and runs nothing. Its JSON form, `{"judge": kind, ...}` nested, is part of the
stage's identity, and `--set` may give it as well; the stages that it asks are inputs of the stage
under the edges `judges.NAME`. The classes, one for each kind, are in
`posttrain.rewards.judge_kinds`. Higher is better; what its docstring calls a cost is to be
subtracted. Every function raises ConfigError for values that do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards.judge_kinds import EDGE, Handle, Judge, make_judge, require_judge
from posttrain.schedules import Schedule

__all__ = [
    "Judge",
    "by_domain",
    "compare",
    "constant",
    "finished",
    "format",
    "gate",
    "human",
    "itself",
    "language",
    "length",
    "lexicographic",
    "llm",
    "normalised",
    "oracle",
    "repetition",
    "scalar",
    "verifier",
    "whitened",
]


def verifier() -> Judge:
    """The verifier of the problem's domain: a value in [0, 1]; 0 where the response was cut."""
    return make_judge("verifier")


def scalar(stage: Handle, *, squash: bool = False) -> Judge:
    """A `reward_model` stage's score of the prompt with the response, any real number.

    `squash` puts it through the logistic function, into (0, 1).
    """
    return _asking("scalar", stage, ("reward_model",), squash=squash)


def oracle(*, noise: float = 1.0) -> Judge:
    """The suite's noisy annotator: what a response is worth to it, in logits, the same every time.

    Five times a hidden quality in [0, 1] plus `noise` times a Gumbel variable; see
    `posttrain.rewards.oracle`.
    """
    return make_judge("oracle", noise=noise)


def constant(value: float) -> Judge:
    """The same score for everything, such as the floor under a `gate`."""
    return make_judge("constant", value=value)


def length(
    *,
    budget: int | None = None,
    shape: str = "linear",
    cache: int | None = None,
    k: float | None = None,
    q: float | None = None,
    of: Judge | None = None,
) -> Judge:
    """A cost for long responses, >= 0, from n tokens (stop token included) and `budget` tokens.

    linear: max(0, n - budget) / budget. budget: 1 above the budget (Kimi K2, arXiv 2507.20534).
    soft_overlong: 0 up to budget - `cache`, then a straight line to 1 at budget, 1 above (DAPO,
    arXiv 2503.14476, eq. 13). concave: ((1 + k x)^(1-q) - 1) / (k (1-q)) with x = n / budget, and
    log(1 + k x) / k where q is 1 (Composer 2). pass_rate: n / budget, at most 1, times the group's
    mean score under `of`, the verifier if not given: only what is solved gets shorter (after
    MAI-Thinking-1). group_relative: (n - shortest) / (longest - shortest) of the group, without a
    budget (after Nemotron 3 Nano, arXiv 2512.20848; gate it with the quality).
    """
    if of is not None:
        require_judge(of, "judge length: of")
    elif shape == "pass_rate":
        of = verifier()
    return make_judge("length", shape=shape, budget=budget, cache=cache, k=k, q=q, of=of)


def language(alphabet: str | None = None, *, regex: str | None = None, unit: str = "word") -> Judge:
    """Share of a response in the target language, 0 to 1 (DeepSeek-R1, arXiv 2501.12948, 2.3.2).

    Give the language as its characters, `alphabet`, or as a `regex` for one character. `unit`: a
    word counts where all of its letters fit, or each `character` counts. Only letters are looked
    at, since digits and signs belong to every language; a response without any has 1.
    """
    if (alphabet is None) == (regex is None):
        raise ConfigError("judge language: give exactly one of alphabet and regex")
    if alphabet is not None:
        regex = f"[{re.escape(alphabet)}]"
    return make_judge("language", regex=regex, unit=unit)


def format(pattern: str) -> Judge:
    """1 where the regular expression is found in the response, else 0; ^ and $ anchor it."""
    return make_judge("format", pattern=pattern)


def repetition(*, n: int = 3, unit: str = "word") -> Judge:
    """A cost: the share of a response's n-grams that have occurred in it before, 0 to 1.

    `unit`: n-grams of a `word` (between white space) or of a `character`.
    """
    return make_judge("repetition", n=n, unit=unit)


def finished() -> Judge:
    """1 where the response ended by itself, 0 where it was cut at the length limit."""
    return make_judge("finished")


def llm(
    url: str,
    model: str,
    *,
    key: str | None = None,
    reference: bool = False,
    rubric: bool | str | None = None,
    template: str | None = None,
    best: float = 10.0,
) -> Judge:
    """A model behind an OpenAI-compatible endpoint grades each response; the score is in [0, 1].

    `url` is the API's base, such as http://localhost:8000/v1; `key` names the environment variable
    that holds the API key. `reference` shows the row's answer. `rubric` is a text for all prompts,
    or True: each problem row has a column `rubric`, a list of {"criterion", "weight"}, and the
    score is the weighted share of those that the model says are met. `template` replaces the
    prompt's text: {prompt}, {response}, {answer}, {rubric} stand for the row's. Without a list of
    criteria the reply's last number is the grade, from 0 to `best`.
    """
    shown = {"reference": reference, "rubric": rubric, "template": template, "best": best}
    return make_judge("llm", url=url, model=model, key=key, **shown)


def compare(
    judge: Handle | str,
    model: str | None = None,
    *,
    pairing: str = "all",
    swap: bool = True,
    key: str | None = None,
    template: str | None = None,
) -> Judge:
    """A judge that says which of two responses is better: a response's share of wins in its group.

    `judge` is a stage that makes a language model, or the url of an endpoint (with `model` and
    `key` as in `llm`). `pairing` all compares all N(N-1)/2 pairs of a group; circular each with the
    next, N comparisons (Nemotron 3 Nano, arXiv 2512.20848). `swap` asks in both orders and takes
    the mean. `template` replaces the question: {prompt}, {a}, {b}, {answer}; the verdict is 1 or 2.
    """
    how = {"pairing": pairing, "swap": swap, "template": template}
    if not isinstance(judge, str):
        if model is not None or key is not None:
            raise ConfigError("judge compare: model and key belong to the url of an endpoint")
        if getattr(judge, "kind", "") == "reward_model":
            raise ConfigError(
                f"judge compare: stage {judge.name!r} is a reward model, which scores one "
                "response; write judges.scalar(...), or give a stage that makes a language model"
            )
        return _asking("compare", judge, (), **how)
    if model is None:
        raise ConfigError(
            f"judge compare: the endpoint {judge!r} needs model=, the name that it serves"
        )
    return make_judge("compare_endpoint", url=judge, model=model, key=key, **how)


def itself(*, pairing: str = "all", swap: bool = True, template: str | None = None) -> Judge:
    """`compare` by the policy that is being trained, with its newest weights (Kimi K2, DeepSeek
    V4). Train it on comparisons as well: `posttrain.rewards.comparisons`."""
    return make_judge("itself", pairing=pairing, swap=swap, template=template)


def human(file: str | None = None, *, pairing: str = "circular") -> Judge:
    """People compare pairs: the stage writes a file, the run waits until it is filled in.

    `file` is where it is written, a path from the current directory; without one it lies in the
    stage's work directory, which the message names. `pairing` as in `compare`. Takes part in no sum
    or combination.
    """
    return make_judge("human", file=file, pairing=pairing)


def gate(condition: Judge, *, below: float | Schedule, then: Judge, otherwise: Judge) -> Judge:
    """`then` where `condition` scores less than `below`, else `otherwise` (Llama 2, 3.2.3)."""
    parts = {"condition": condition, "then": then, "otherwise": otherwise}
    for name, part in parts.items():
        require_judge(part, f"judge gate: {name}")
    return make_judge("gate", below=below, **parts)


def lexicographic(first: Judge, second: Judge) -> Judge:
    """`first`; where a whole group has the same score under it, plus `second`, which then decides.

    After MAI-Thinking-1.
    """
    for part in (first, second):
        require_judge(part, "judge lexicographic: one of its two")
    return make_judge("lexicographic", first=first, second=second)


def normalised(*judges: Judge) -> Judge:
    """Each judge's z-score within the group, added (GDPO, arXiv 2601.05242); weigh the result."""
    for judge in judges:
        require_judge(judge, "judge normalised: one of them")
    return make_judge("normalised", judges=judges)


def whitened(judge: Judge) -> Judge:
    """The judge's z-score over the whole batch (Llama 2, 3.2.3)."""
    return make_judge("whitened", of=require_judge(judge, "judge whitened: its judge"))


def by_domain(judges: Mapping[str, Judge]) -> Judge:
    """Each domain's own judge."""
    if not isinstance(judges, Mapping):
        raise ConfigError(f"judge by_domain: {judges!r} is no dict of domain to judge")
    for name, judge in judges.items():
        require_judge(judge, f"judge by_domain: that of {name!r}")
    return make_judge("by_domain", domains=dict(judges))


def _asking(kind: str, stage: Handle, kinds: tuple[str, ...], **fields: Any) -> Judge:
    """A judge that asks a stage, which is of one of `kinds` where any are given."""
    if not hasattr(stage, "name") or not hasattr(stage, "kind"):
        raise ConfigError(f"judge {kind}: {stage!r} is no stage; pass what a verb returned")
    if kinds and stage.kind not in (*kinds, ""):
        raise ConfigError(
            f"judge {kind}: stage {stage.name!r} is of kind {stage.kind}; it takes a stage of kind "
            f"{', '.join(kinds)}"
        )
    judge = make_judge(kind, model=f"{EDGE}{stage.name}", **fields)
    judge._stage = stage
    return judge
