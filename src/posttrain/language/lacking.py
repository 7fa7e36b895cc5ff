"""What a domain lacks, checked when the recipe is built: a verifier, or a split.

Every function raises ConfigError with the stage, the domain and the fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from posttrain.algorithms import BestResponses, Correct, ShortestCorrect, TopShare
from posttrain.engine.errors import ConfigError
from posttrain.language.builder import Builder
from posttrain.language.handles import Prompts
from posttrain.rewards.judge_base import Judge
from posttrain.rewards.judge_kinds import Oracle, Verifier

NO_VERIFIER = 'has none (verifier = "none")'
SCORE = "judge the responses first, r.score(rollouts, judge=...), and set "


def with_split(build: Builder, split: str) -> tuple[str, ...]:
    """The domains of the suite that have problems in a split."""
    return tuple(name for name, domain in build.suite.domains.items() if domain.has_split(split))


def verified(build: Builder, domains: Iterable[str]) -> tuple[str, ...]:
    """Those of the domains that have a verifier."""
    return tuple(name for name in domains if build.suite.domains[name].verified)


def split(build: Builder, stage: str, name: str, domains: Sequence[str]) -> None:
    """Refuse domains without problems in the split that a stage reads."""
    missing = [domain for domain in domains if domain not in with_split(build, name)]
    if missing:
        raise ConfigError(
            f"stage {stage!r} ({build.nodes[stage].kind}): it reads the {name} split, and domain "
            f"{missing[0]!r} has none ({name} = 0 in suite {build.suite.name!r}); give the domain "
            f"{name} = a table or leave that key out, or name other domains"
        )


def evaluated(build: Builder, stage: str, name: str) -> tuple[str, ...]:
    """The domains that an evaluation reads where none are named: those that have the split."""
    found = with_split(build, name)
    if not found:
        raise ConfigError(
            f"stage {stage!r} (evaluate): no domain of suite {build.suite.name!r} has a {name} "
            f"split ({name} = 0 in all of them); leave that key out in one, or give it a table"
        )
    for domain in build.suite.domains:
        if domain not in found:
            build.warn(
                f"domain {domain!r} is not evaluated: it has no {name} problems ({name} = 0)", stage
            )
    return found


def candidates_answer(build: Builder, stage: str, judge: object) -> Prompts:
    """The prompts by which `best` chooses where none are named: of all domains that have validation
    problems, and somebody to judge the answers."""
    domains = with_split(build, "validation")
    if judge is None:
        domains = verified(build, domains)
    if not domains:
        raise ConfigError(
            f"stage {stage!r} (best): no domain of suite {build.suite.name!r} has both validation "
            "problems and a verifier; give judge=... to score the answers, or validation problems"
        )
    return Prompts(domains)


def verifier(
    build: Builder, stage: str, domains: Iterable[str], *, reads: str, fix: str = ""
) -> None:
    """Refuse domains without a verifier for a stage that `reads` what verifiers say."""
    for domain in domains:
        if domain in build.suite.domains and not build.suite.domains[domain].verified:
            kind = build.nodes[stage].kind
            also = f"{fix}, or leave" if fix else "leave"
            raise ConfigError(
                f"stage {stage!r} ({kind}): {reads} what the verifier says, and domain {domain!r} "
                f"{NO_VERIFIER}; {also} the domain out"
            )


def all_of(build: Builder, stage: str, domains: Sequence[str], *, reads: str, fix: str) -> None:
    """Refuse what goes by verifiers alone where none of the domains has one."""
    if domains and not verified(build, domains):
        raise ConfigError(
            f"stage {stage!r} ({build.nodes[stage].kind}): {reads} what the verifier says, and "
            f'none of its domains {", ".join(domains)} has one (verifier = "none"); {fix}'
        )


def judge(build: Builder, judge: Judge, domains: Sequence[str], *, where: str) -> None:
    """Refuse a judge that asks the verifier of a domain without one."""
    for name in domains:
        domain = build.suite.domains[name]
        if domain.verified:
            continue
        for part in judge.walk(name):
            asks = isinstance(part, Verifier)
            if not asks and not (isinstance(part, Oracle) and domain.oracle is None):
                continue
            raise ConfigError(
                f"{where}: judges.{part.judge}() asks the verifier, and domain {name!r} "
                f"{NO_VERIFIER}; give a judge that reads the response itself, such as "
                "judges.llm(...) or judges.scalar(reward_model), or leave the domain out"
            )


def selection(build: Builder, stage: str, domains: Sequence[str]) -> None:
    """Refuse a choice by reward among responses that nobody verified."""
    how = build.settings[stage].how
    by_reward = isinstance(how, BestResponses | TopShare) and how.by == "reward"
    success = (
        isinstance(how, Correct | ShortestCorrect) or getattr(how, "success", None) is not None
    )
    if by_reward or success:
        fix = f"{SCORE}how=BestResponses(by='score')"
        verifier(build, stage, domains, reads=f"how = {how.kind} goes by", fix=fix)


def noise(build: Builder, stage: str, domains: Iterable[str]) -> None:
    """Refuse wrong demonstrations where nobody can say which are wrong."""
    if any(build.values(stage, "demo_noise")):
        fix = "leave noise out of the demonstrations"
        verifier(build, stage, domains, reads="noise makes demonstrations wrong by", fix=fix)


def preference(build: Builder, stage: str, domains: Sequence[str]) -> None:
    """Refuse pairs by reward among responses that nobody verified."""
    settings = build.settings[stage]
    if settings.compares_values and settings.by == "reward":
        fix = f"give judge=..., or {SCORE}how=BestAgainstWorst(by='score')"
        verifier(build, stage, domains, reads=f"how = {settings.how.kind} goes by", fix=fix)
    if settings.min_chosen_reward is not None:
        verifier(build, stage, domains, reads="min_chosen_reward goes by", fix="leave it out")
