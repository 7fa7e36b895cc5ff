"""Verbs that make rows of data and choose among them, as a recipe calls them.

Apart from those that train, compare and measure models (`recipe.py`): what comes in and goes out of
these are prompts, rollouts, pairs and demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.judges import Judge
from posttrain.language.builder import Builder
from posttrain.language.handles import Demos, Prompts, Stage
from posttrain.language.operands import (
    check_filter,
    check_mix,
    check_pairs,
    check_scored,
    check_steps,
    domains_of,
    judge_inputs,
    mix_parts,
    profile_edge,
    rollout_edges,
)
from posttrain.language.routes import samplers


class Operators:
    """Sampling, scoring and choosing."""

    def __init__(self, build: Builder) -> None:
        self._build = build

    def sample(
        self,
        models: Stage | Sequence[Stage] | Mapping[str, Stage | Sequence[Stage]],
        *,
        prompts: Prompts | Stage,
        name: str = "rollouts",
        **settings: Any,
    ) -> Stage:
        """Scored responses of one model or several, or of each domain's own."""
        inputs = self._build.data(name, prompts, (Prompts,))
        routes, edges = samplers(self._build, name, prompts.domains, models)
        settings = prompts.settings() | settings
        return self._build.stage("sample", name, settings, edges | inputs, routes)

    def score(
        self,
        rollouts: Stage | Sequence[Stage],
        *,
        judge: Judge,
        name: str = "scored",
        **settings: Any,
    ) -> Stage:
        """The rollouts with the judge's score of each; they stand wherever rollouts do."""
        inputs = rollout_edges("score", name, rollouts)
        asked, edges = judge_inputs(self._build, name, judge, domains_of(rollouts))
        return self._build.stage("score", name, asked | settings, inputs | edges)

    def select(
        self, rollouts: Stage | Sequence[Stage], *, name: str = "selection", **settings: Any
    ) -> Stage:
        """The rollouts worth imitating, as data for `sft`; those of several stages are one pool."""
        inputs = rollout_edges("select", name, rollouts)
        stage = self._build.stage("select", name, settings, inputs)
        check_steps(self._build, name)
        check_scored(self._build, name)
        return stage

    def comparisons(
        self, rollouts: Stage | Sequence[Stage], *, name: str = "comparisons", **settings: Any
    ) -> Stage:
        """Which of two responses is better, as data that teaches a model to judge."""
        inputs = rollout_edges("comparisons", name, rollouts)
        return self._build.stage("comparisons", name, settings, inputs)

    def pairs(
        self,
        rollouts: Stage | Sequence[Stage],
        *,
        against: Stage | Sequence[Stage] | None = None,
        judge: Judge | None = None,
        name: str = "pairs",
        **settings: Any,
    ) -> Stage:
        """Preference pairs out of rollouts, as data for `dpo`.

        By reward or score among the responses to one problem, or with `against` the responses of a
        strong model's stage against those of a weak one's. Several stages are one pool. `judge`
        says which response is better; with how "all" or "random" oracle and human compare two.
        """
        inputs = rollout_edges("pairs", name, rollouts)
        if judge is not None:
            asked, edges = judge_inputs(self._build, name, judge, domains_of(rollouts))
            settings = asked | settings
            inputs |= edges
        if against is not None:
            inputs |= rollout_edges("pairs", name, against, edge="against")
            settings = {"how": "strong_against_weak"} | settings
        stage = self._build.stage("pairs", name, settings, inputs)
        check_pairs(self._build, name)
        check_scored(self._build, name)
        return stage

    def profile(
        self, model: Stage, *, prompts: Prompts | Stage, name: str = "profile", **settings: Any
    ) -> Stage:
        """How often `model` solves each of the prompts: for `r.filter`, and for curricula."""
        inputs = {"model": self._build.model(name, "model", model)}
        inputs |= self._build.data(name, prompts, (Prompts,))
        return self._build.stage("profile", name, prompts.settings() | settings, inputs)

    def filter(
        self,
        prompts: Prompts | Stage,
        *,
        profile: Stage,
        against: Stage | None = None,
        name: str = "filtered",
        **settings: Any,
    ) -> Stage:
        """Those of the prompts that are as hard as asked for; it stands wherever prompts do.

        `profile` and `against` are profiles of two models: solved by one but not by the other.
        """
        inputs = self._build.data(name, prompts, (Prompts,))
        for edge, source in {"profile": profile, "against": against}.items():
            if source is not None:
                inputs[edge] = profile_edge(name, edge, source, prompts.domains)
        stage = self._build.stage("filter", name, prompts.settings() | settings, inputs)
        check_filter(self._build, name)
        return stage

    def mix(
        self,
        sources: Mapping[Demos | Stage, float],
        *,
        tokenizer: Stage | None = None,
        name: str = "mix",
        **settings: Any,
    ) -> Stage:
        """Data of several sources in shares by weight, as data for `sft`.

        With by="tokens" those of the tokens of the model `tokenizer`.
        """
        parts, inputs = mix_parts(self._build, name, sources)
        if tokenizer is not None:
            inputs["tokenizer"] = self._build.model(name, "tokenizer", tokenizer)
        stage = self._build.stage("mix", name, settings, inputs, parts=parts)
        check_mix(self._build, name)
        return stage

    def dedup(
        self, data: Stage | Sequence[Stage], *, name: str = "distinct", **settings: Any
    ) -> Stage:
        """Data without repeats, of one stage or of several one after another."""
        several = [data] if isinstance(data, Stage) else list(data)
        if not several:
            raise ConfigError(f"stage {name!r} (dedup): it is given no data; name one stage")
        found = [self._build.data(name, source, (Stage,))["data"] for source in several]
        inputs = {f"data.{number}": source for number, source in enumerate(found)}
        inputs = {"data": found[0]} if isinstance(data, Stage) else inputs
        return self._build.stage("dedup", name, settings, inputs)
