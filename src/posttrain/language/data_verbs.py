"""The verbs of a recipe that make data: taken in from outside, out of models, out of other data.

`posttrain.recipe` has those that make models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.judges import Judge
from posttrain.language import checks, inputs, lacking
from posttrain.language.builder import Builder
from posttrain.language.handles import Demos, Prompts, Stage
from posttrain.language.own_data import taken_in_data
from posttrain.language.routes import samplers
from posttrain.suites.data_table import TABLE
from posttrain.suites.preferences import PREFERENCES


class DataVerbs:
    """Tables, sampling, judging, selecting and mixing: a part of `posttrain.recipe.Recipe`."""

    _build: Builder

    def preferences(self, source: str | Path, *, name: str | None = None, **columns: Any) -> Stage:
        """A table of your own preferences, as data for `dpo` and `reward_model`.

        `source` is a name in the suite's `preferences`, or where a table lies; then `columns` name
        its columns, as the fields of `posttrain.Preferences`.
        """
        return taken_in_data(self._build, PREFERENCES, source, name, columns)

    def table(self, source: str | Path, *, name: str | None = None, **columns: Any) -> Stage:
        """A table of prompts and responses that is no domain, as data for `sft` and `mix`.

        `source` and `columns` as in `preferences`; the columns are those of `posttrain.DataTable`.
        """
        return taken_in_data(self._build, TABLE, source, name, columns)

    def sample(
        self,
        models: Stage | Sequence[Stage] | Mapping[str, Stage | Sequence[Stage]],
        *,
        prompts: Prompts | Stage,
        name: str = "rollouts",
        **settings: Any,
    ) -> Stage:
        """Scored responses of one model or several, or of each domain's own."""
        edges = self._build.data(name, prompts, (Prompts,))
        routes, sampled = samplers(self._build, name, prompts.domains, models)
        settings = prompts.settings() | settings
        return self._build.stage("sample", name, settings, sampled | edges, routes)

    def score(
        self,
        rollouts: Stage | Sequence[Stage],
        *,
        judge: Judge,
        name: str = "scored",
        **settings: Any,
    ) -> Stage:
        """The rollouts with the judge's score of each; they stand wherever rollouts do."""
        edges = inputs.rollouts("score", name, rollouts)
        asked = inputs.judged(self._build, name, judge, inputs.domains_of(rollouts))
        return self._build.stage("score", name, {"judge": judge} | settings, edges | asked)

    def select(
        self, rollouts: Stage | Sequence[Stage], *, name: str = "selection", **settings: Any
    ) -> Stage:
        """The rollouts worth imitating, as data for `sft`; those of several stages are one pool."""
        edges = inputs.rollouts("select", name, rollouts)
        stage = self._build.stage("select", name, settings, edges)
        checks.select(self._build, name)
        return stage

    def comparisons(
        self, rollouts: Stage | Sequence[Stage], *, name: str = "comparisons", **settings: Any
    ) -> Stage:
        """Which of two responses is better, as data that teaches a model to judge."""
        edges = inputs.rollouts("comparisons", name, rollouts)
        stage = self._build.stage("comparisons", name, settings, edges)
        lacking.verifier(self._build, name, stage.domains, reads="it compares")
        return stage

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
        edges = inputs.rollouts("pairs", name, rollouts)
        if judge is not None:
            edges |= inputs.judged(self._build, name, judge, inputs.domains_of(rollouts))
            settings = {"judge": judge} | settings
        if against is not None:
            edges |= inputs.rollouts("pairs", name, against, role="against")
            settings = {"how": "strong_against_weak"} | settings
        stage = self._build.stage("pairs", name, settings, edges)
        checks.pairs(self._build, name)
        return stage

    def profile(
        self, model: Stage, *, prompts: Prompts | Stage, name: str = "profile", **settings: Any
    ) -> Stage:
        """How often `model` solves each of the prompts: for `r.filter`, and for curricula."""
        edges = {"model": self._build.model(name, "model", model)}
        edges |= self._build.data(name, prompts, (Prompts,))
        stage = self._build.stage("profile", name, prompts.settings() | settings, edges)
        lacking.verifier(self._build, name, prompts.domains, reads="a pass rate is")
        return stage

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
        edges = self._build.data(name, prompts, (Prompts,))
        for edge, source in {"profile": profile, "against": against}.items():
            if source is not None:
                edges[edge] = inputs.profile("filter", name, edge, source, prompts.domains)
        stage = self._build.stage("filter", name, prompts.settings() | settings, edges)
        checks.filter(self._build, name)
        lacking.verifier(self._build, name, prompts.domains, reads="it goes by")
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
        parts, edges = inputs.mix_parts(self._build, name, sources)
        if tokenizer is not None:
            edges["tokenizer"] = self._build.model(name, "tokenizer", tokenizer)
        stage = self._build.stage("mix", name, settings, edges, parts=parts)
        checks.mix(self._build, name)
        return stage

    def dedup(
        self, data: Stage | Sequence[Stage], *, name: str = "distinct", **settings: Any
    ) -> Stage:
        """Data without repeats, of one stage or of several one after another."""
        edges = inputs.several_data(self._build, name, data)
        return self._build.stage("dedup", name, settings, edges)
