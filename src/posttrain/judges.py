"""Judges: what scores a response, as values that a recipe passes to `rl`, `score` and `pairs`.

    reward = judges.verifier() - 0.1 * judges.length(budget=32, shape="soft_overlong", cache=8)
    reward = judges.gate(judges.scalar(safety), below=0.15,
                         then=judges.scalar(safety), otherwise=judges.scalar(helpful))

A judge is frozen and runs nothing. Its JSON form, `{"judge": kind, ...}` nested, is part of the
stage's identity, and `--set` may give it as well; the stages that it asks are inputs of the stage
under the edges `judges.NAME`. Higher is better; what its docstring calls a cost is to be
subtracted. Raises ConfigError for values that do not fit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.rewards import judge_kinds as kinds
from posttrain.rewards.judge_base import Judge as Judge
from posttrain.rewards.judge_fields import EDGE
from posttrain.rewards.own_judge import read_judge

Maker = Callable[..., Judge]
"""Makes a judge from the fields of its class, by position or by name."""

verifier: Maker = kinds.Verifier
oracle: Maker = kinds.Oracle
constant: Maker = kinds.Constant
finished: Maker = kinds.Finished
format: Maker = kinds.Format
repetition: Maker = kinds.Repetition
length: Maker = kinds.Length
llm: Maker = kinds.Llm
itself: Maker = kinds.Itself
human: Maker = kinds.Human
gate: Maker = kinds.Gate
lexicographic: Maker = kinds.Lexicographic
whitened: Maker = kinds.Whitened
by_domain: Maker = kinds.ByDomain
answer: Maker = kinds.Answer


Handle = Any
"""A stage of the recipe, what a verb returned: `posttrain.language.handles.Stage`."""


def scalar(stage: Handle, *, squash: bool = False) -> Judge:
    """A `reward_model` stage's score of the prompt with the response, any real number.

    `squash` puts it through the logistic function, into (0, 1).
    """
    judge = kinds.Scalar(model=_edge("scalar", stage), squash=squash)
    if stage.kind not in ("reward_model", ""):
        raise ConfigError(
            f"judge scalar: stage {stage.name!r} is of kind {stage.kind}; it takes a stage of kind "
            "reward_model"
        )
    judge._stage = stage
    return judge


def language(alphabet: str | None = None, *, regex: str | None = None, unit: str = "word") -> Judge:
    """Share of a response in the target language, 0 to 1; see `judge_kinds.Language`.

    Give the language as its characters, `alphabet`, or as a `regex` for one character.
    """
    if (alphabet is None) == (regex is None):
        raise ConfigError("judge language: give exactly one of alphabet and regex")
    how: dict[str, Any] = {"regex": regex, "unit": unit}
    if alphabet is not None:
        how["regex"] = f"[{re.escape(alphabet)}]"
    return kinds.Language(**how)


def compare(
    judge: Handle | str,
    model: str | None = None,
    *,
    pairing: str = "all",
    swap: bool = True,
    key: str | None = None,
    template: str | None = None,
    max_tokens: int | None = None,
) -> Judge:
    """A judge that says which of two responses is better: a response's share of wins in its group.

    `judge` is a stage that makes a language model, or the url of an endpoint (with `model` and
    `key` as in `llm`). `pairing` all compares all N(N-1)/2 pairs of a group; circular each with the
    next, N comparisons (Nemotron 3 Nano, arXiv 2512.20848). `swap` asks in both orders and takes
    the mean. `template` replaces the question: {prompt}, {a}, {b}, {answer}; the verdict is 1 or 2,
    that of an endpoint a last line `Better: 1` or `Better: 2`, in a reply of `max_tokens` at most.
    """
    how: dict[str, Any] = {"pairing": pairing, "swap": swap, "template": template}
    if isinstance(judge, str):
        if model is None:
            raise ConfigError(
                "judge compare: an endpoint needs model=, the name of the model that it serves"
            )
        if max_tokens is not None:
            how["max_tokens"] = max_tokens
        return kinds.CompareEndpoint(url=judge, model=model, key=key, **how)
    if model is not None or key is not None or max_tokens is not None:
        raise ConfigError(
            "judge compare: model, key and max_tokens belong to the url of an endpoint"
        )
    if getattr(judge, "kind", "") == "reward_model":
        raise ConfigError(
            f"judge compare: stage {judge.name!r} is a reward model, which scores one "
            "response; write judges.scalar(...), or give a stage that makes a language model"
        )
    asking = kinds.Compare(model=_edge("compare", judge), **how)
    asking._stage = judge
    return asking


def python(place: str) -> Judge:
    """A function of your own, `"file.py:function"`: it gets the response and the problem row, by
    name `num_tokens`, `finished` and `step` where it takes them, and returns a number or a bool.

    The path is relative to the file that calls this, else to the working directory. The text of the
    file is part of the identity, and of the files that it names in `DATA_FILES`, which lie beside
    it. It runs in worker processes, as a python verifier does. Raises ConfigError for a file that
    is missing or does not parse, or has no such function.
    """
    where = f"judges.python({place!r})"
    file, _, function = place.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"{where}: write it as 'file.py:function'")
    path = Path(file).expanduser()
    if not path.is_absolute():
        beside = Path(sys._getframe(1).f_code.co_filename).parent / path
        path = beside if beside.is_file() else path
    return kinds.Python(**read_judge(path, function, where=where))


def normalised(*judges: Judge) -> Judge:
    """Each judge's z-score within the group, added (GDPO, arXiv 2601.05242); weigh the result."""
    given: Any = judges
    return kinds.Normalised(judges=given)


def _edge(kind: str, stage: Handle) -> str:
    if not hasattr(stage, "name") or not hasattr(stage, "kind"):
        raise ConfigError(f"judge {kind}: {stage!r} is no stage; pass what a verb returned")
    return f"{EDGE}{stage.name}"
