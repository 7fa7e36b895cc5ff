"""The recipe language: calls that build a graph of stages. Building runs nothing.

    def recipe(r: Recipe):
        s = r.sft(start=r.model("my-base"), data=r.demos(r.domains), steps=500)
        teachers = {d: r.rl(start=s, prompts=r.prompts(d), steps=200) for d in r.domains}
        student = r.distill(start=s, teachers=teachers, prompts=r.prompts(r.domains), steps=100)
        return r.evaluate(student, teachers=teachers, init=s)

Every stage takes any setting of its kind by name (the classes in `stages/settings/`) and `name=`,
which is what people see and what `--set NAME.FIELD=VALUE` refers to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Graph
from posttrain.engine.store import Store
from posttrain.judges import Judge
from posttrain.language import checks, inputs, lacking
from posttrain.language.builder import Builder
from posttrain.language.calls import checked_calls
from posttrain.language.data_verbs import DataVerbs
from posttrain.language.extending import extended
from posttrain.language.handles import Demos, Prompts, Stage, Warned, check_modes
from posttrain.language.inputs import Aux
from posttrain.language.models import check_adapters, taken_in_model
from posttrain.language.routes import Teachers, route
from posttrain.stages.kinds import Kind
from posttrain.suites.domain import Suite

TINY: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 350, "lr": 4e-3, "loss_on": "response"},
    "mini": {
        "steps": 350,
        "lr": 4e-3,
        "loss_on": "response",
        "hidden_size": 48,
        "num_layers": 2,
        "intermediate_size": 192,
    },
}
"""Size to the settings of its pretraining: about 0.2 and 0.1 million parameters."""


@checked_calls
class Recipe(DataVerbs):
    """The builder that a recipe function is given: a verb makes a stage and returns its handle."""

    def __init__(
        self,
        suite: Suite,
        suite_directory: Path,
        *,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        of_kinds: Mapping[str, Mapping[str, Any]] | None = None,
        store: Store | None = None,
    ) -> None:
        self._build = Builder(
            suite,
            suite_directory,
            seed=seed,
            overrides=overrides,
            of_kinds=of_kinds,
            store=store,
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the suite's domains."""
        return self._build.domains

    def prompts(
        self, domains: str | Iterable[str], *, mode: str | Iterable[str] | None = None
    ) -> Prompts:
        """The training prompts of one domain or of several.

        `mode`, such as think or no_think, is asked of the model's chat template. With several modes
        each prompt occurs in each of them.
        """
        return Prompts(self._build.known(domains), check_modes(mode))

    def demos(
        self,
        domains: str | Iterable[str],
        *,
        mode: str | Iterable[str] | None = None,
        noise: float = 0.0,
        hint: str | None = None,
    ) -> Demos:
        """The demonstrations of one domain or of several, in a mode or each in several.

        A share `noise` of them is wrong. With a `hint`, a template of the prompt such as
        "{prompt} {answer}", each is there with the plain prompt and with the hinted one. Raises
        ConfigError for a domain that has none.
        """
        known, modes = self._build.known(domains), check_modes(mode)
        checks.demos(self._build.suite, known, modes)
        return Demos(known, modes, noise, hint)

    def model(
        self,
        source: str | Path,
        *,
        base: Stage | str | Path | None = None,
        name: str = "base",
    ) -> Stage:
        """A checkpoint from outside: a directory, an adopted name, a Hub id or a GGUF file.

        A GGUF file (or a directory with one and no other weights) is converted once, by its bytes.

        Or the newest step checkpoint of a stage of this store that was stopped or failed,
        "student@step"; "student@step-120" where it must be that of step 120.

        A LoRA adapter of peft stands on the `base` that its adapter_config.json names, or on the
        model that is given here; it is told apart by its name, NAME_base.
        """
        return taken_in_model(self._build, source, base, name)

    def base(
        self, source: str | Path = "tiny", *, thinking: bool = False, name: str = "base"
    ) -> Stage:
        """What a recipe starts from: a size of `TINY`, or a checkpoint as `model` takes it.

        A size is a model trained from nothing on the demonstrations of all domains; with `thinking`
        it has a chat template with modes and learns to answer in both. Recipes that ask for the
        same base share one.
        """
        if source not in TINY:
            return self.model(source, name=name)
        settings = TINY[str(source)] | ({"thinking": True} if thinking else {})
        data = self.demos(self.domains, mode=("think", "no_think") if thinking else None)
        return self.pretrain(data=data, name=name, **settings)

    def stage(self, name: str) -> Stage:
        """A stage by its name, which may be defined further down."""
        return self._build.handle(name)

    def pretrain(
        self, *, data: Demos | Stage, aux: Aux | None = None, name: str = "base", **settings: Any
    ) -> Stage:
        """A tiny model trained from nothing on the documents of some domains or of a table.

        `aux` as in `sft`.
        """
        edges = self._build.data(name, data, (Demos, Stage))
        stage = self._trained("pretrain", name, data.settings() | settings, edges, aux)
        checks.given_rows(self._build, name)
        return stage

    def sft(
        self,
        *,
        start: Stage,
        data: Demos | Stage,
        aux: Aux | None = None,
        name: str = "sft",
        **settings: Any,
    ) -> Stage:
        """Supervised fine-tuning of `start` on demonstrations or on selected rollouts.

        `aux` maps names of further cross-entropy losses to their data and weight.
        """
        edges = {"start": self._build.model(name, "start", start)}
        edges |= self._build.data(name, data, (Demos, Stage))
        stage = self._trained("sft", name, data.settings() | settings, edges, aux)
        checks.given_rows(self._build, name)
        return stage

    def dpo(
        self,
        *,
        start: Stage,
        data: Stage,
        reference: Stage | None = None,
        aux: Aux | None = None,
        name: str = "dpo",
        **settings: Any,
    ) -> Stage:
        """Training of `start` on preference pairs, relative to `reference` (the start itself).

        `aux` as in `sft`.
        """
        pairs = self._build.pairs("dpo", name, data)
        edges = {"start": self._build.model(name, "start", start), "data": pairs}
        if reference is not None:
            edges["reference"] = self._build.model(name, "reference", reference)
            self._build.same_vocabulary(name, start.name, reference.name, role="reference")
        stage = self._trained("dpo", name, settings, edges, aux)
        checks.dpo(self._build, name)
        return stage

    def reward_model(
        self, *, start: Stage, data: Stage, name: str = "reward_model", **settings: Any
    ) -> Stage:
        """A model that scores responses, from preference pairs.

        `start` is a language model, whose output layer makes way for a score, or a reward model.
        """
        edges = {
            "start": self._build.model(name, "start", start, scores=True),
            "data": self._build.pairs("reward_model", name, data),
        }
        return self._build.stage("reward_model", name, settings, edges)

    def rl(
        self,
        *,
        start: Stage,
        prompts: Prompts | Stage,
        reward: Judge | None = None,
        profile: Stage | None = None,
        critic: Stage | None = None,
        aux: Aux | None = None,
        name: str = "rl",
        **settings: Any,
    ) -> Stage:
        """Reinforcement learning of `start` on what a judge says of its responses.

        `reward` is a judge of `posttrain.judges`, the verifiers of the prompts' domains if not
        given. `profile` has the pass rates that a `curriculum` begins with. `critic` is where the
        critic of advantage = gae starts, a language model or a reward model; `start` if not given.
        `aux` as in `sft`.
        """
        edges = {"start": self._build.model(name, "start", start)}
        if critic is not None:
            edges["critic"] = self._build.model(name, "critic", critic, scores=True)
            self._build.same_vocabulary(name, start.name, critic.name, role="critic")
        edges |= self._build.data(name, prompts, (Prompts,))
        if profile is not None:
            edges["profile"] = inputs.profile("rl", name, "profile", profile, prompts.domains)
        if reward is not None:
            edges |= inputs.judge_edges(self._build, name, "reward", reward)
            settings = {"reward": reward} | settings
        stage = self._trained("rl", name, prompts.settings() | settings, edges, aux)
        checks.rl(self._build, name, prompts.domains)
        return stage

    def distill(
        self,
        *,
        start: Stage,
        teachers: Teachers,
        prompts: Prompts | Stage,
        aux: Aux | None = None,
        name: str = "student",
        **settings: Any,
    ) -> Stage:
        """On-policy distillation of each prompt's domain from that domain's teacher into `start`.

        `teachers` maps every domain of `prompts` to a stage, or to "self" for the start itself; to
        a list of these, which take its prompts in turn; or to a dict with those of each mode.
        `aux` as in `sft`.
        """
        edges = {"start": self._build.model(name, "start", start)}
        edges |= self._build.data(name, prompts, (Prompts,))
        modes = self._build.modes(prompts)
        routes, asked = route(self._build, name, prompts.domains, teachers, start, modes=modes)
        for teacher in asked.values():
            self._build.same_vocabulary(name, start.name, teacher)
        settings = prompts.settings() | settings
        stage = self._trained("distill", name, settings, edges | asked, aux, routes)
        checks.named_domains(self._build, name, prompts.domains, "hints")
        if any(self._build.values(name, "reward_weight")):
            fix = "leave reward_weight out"
            lacking.all_of(self._build, name, prompts.domains, reads="reward_weight is of", fix=fix)
        return stage

    def extend(
        self, stage: Stage, *, steps: int, name: str | None = None, **settings: Any
    ) -> Stage:
        """More training of a stage, `steps` more, from where it ended: a stage of the same kind,
        settings and inputs that starts from it.

        Any of its settings may be given anew, such as `lr`. The seed is another one, so data is
        drawn in another order; the optimiser begins afresh, and so do warm-up, decay, schedules and
        a critic. What rl takes the start for, the reference of its KL, is then `stage`; the
        reference of dpo and a teacher "self" stay what they were. Raises ConfigError for a stage
        that does not train from a start.
        """
        return extended(self._build, stage, name, {"steps": steps} | settings)

    def merge(
        self,
        models: Mapping[str, Stage] | Iterable[Stage],
        *,
        base: Stage | None = None,
        name: str = "merged",
        **settings: Any,
    ) -> Stage:
        """One model out of the weights of several, by name or as a list.

        `how = "average"` takes their mean; the others add what the models learned on top of `base`.
        `weights` maps names to numbers.
        """
        edges = inputs.merged(self._build, name, models, base)
        stage = self._build.stage("merge", name, settings, edges)
        checks.merge(self._build, name)
        return stage

    def evaluate(
        self,
        student: Stage | Mapping[str, Stage] | Sequence[Stage],
        *,
        init: Stage | None = None,
        teachers: Teachers | None = None,
        along: Mapping[str, Stage] | Sequence[Stage] | None = None,
        judges: Mapping[str, Judge] | None = None,
        domains: Iterable[str] | None = None,
        name: str = "evaluation",
        **settings: Any,
    ) -> Stage:
        """Score one student or several, init and teachers on held-out problems.

        Says what was gained on `init` and what of the teachers' gain was recovered. Several
        students, by name or as a list, are compared in pairs. `along` are models on the way to
        them, in their order. `judges` maps domains to judges of their responses.
        """
        edges = inputs.students(self._build, name, student, along)
        if init is not None:
            edges["init"] = self._build.model(name, "init", init)
        if domains is None:
            split = self._build.told("evaluate", name, settings).get("split", "heldout")
            domains = lacking.evaluated(self._build, name, split)
        known = self._build.known(domains)
        edges |= self._build.data(name, Prompts(known), (Prompts,))
        modes = settings.get("modes", ())
        start = self._build.handle(next(iter(edges.values()))) if init is None else init
        routes, asked = route(
            self._build, name, known, teachers or {}, start, modes=modes, strict=False
        )
        given = inputs.judges(self._build, name, judges)
        settings = {"judges": dict(judges)} | settings if judges else settings
        stage = self._build.stage("evaluate", name, settings, edges | asked | given, routes)
        lacking.split(self._build, name, self._build.settings[name].split, known)
        checks.evaluate(self._build, name, known)
        return stage

    def best(
        self,
        candidates: Mapping[str, Stage] | Sequence[Stage],
        *,
        prompts: Prompts | None = None,
        judge: Judge | None = None,
        name: str = "best",
        **settings: Any,
    ) -> Stage:
        """The best of several models on the validation problems of all domains or of `prompts`.

        All are those with validation problems and, without a `judge`, a verifier. Of equally good
        ones it is the first. With a `judge` its score decides; a judge that compares responses
        compares the candidates'.
        """
        edges = inputs.candidates(self._build, name, candidates)
        if prompts is None:
            prompts = lacking.candidates_answer(self._build, name, judge or settings.get("judge"))
        if not isinstance(prompts, Prompts):
            raise ConfigError(
                f"stage {name!r} (best): its prompts are {prompts!r}; the candidates answer "
                "validation problems, so it takes r.prompts(...)"
            )
        edges |= self._build.data(name, prompts, (Prompts,))
        if judge is not None:
            edges |= inputs.judged(self._build, name, judge, prompts.domains)
            settings = {"judge": judge} | settings
        stage = self._build.stage("best", name, prompts.settings() | settings, edges)
        lacking.split(self._build, name, "validation", prompts.domains)
        if self._build.settings[name].judge is None:
            fix = "give judge=... to score the answers"
            lacking.verifier(self._build, name, prompts.domains, reads="it compares", fix=fix)
        return stage

    def stage_of_kind(
        self,
        kind: Kind,
        *,
        inputs: Mapping[str, Stage | Prompts | Demos],
        name: str,
        **settings: Any,
    ) -> Stage:
        """A stage of any kind, of the table or one that a module of yours defines (`kinds.Kind`).

        `inputs` maps edges to stages. Prompts and demonstrations become the edges of their domains,
        and their modes settings.
        """
        edges: dict[str, str] = {}
        for edge, source in inputs.items():
            if isinstance(source, Stage):
                edges[edge] = source.name
            elif isinstance(source, Prompts | Demos):
                edges |= self._build.domain_edges(name, source.domains)
                settings = source.settings() | settings
            else:
                raise ConfigError(
                    f"stage {name!r}: its input {edge!r} is {source!r}; it takes a stage, "
                    "r.prompts(...) or r.demos(...)"
                )
        return self._build.stage(kind.name, name, settings, edges)

    def graph(self, target: Stage) -> Graph:
        """The finished graph. Raises ConfigError for a setting that matched no stage, and for
        stages that do not fit together."""
        checks.recipe(self._build)
        check_adapters(self._build)
        graph = self._build.graph(target)
        checks.needed(self._build, graph)
        return graph

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """What is to be told about the recipe so far, though it can be run."""
        return tuple(self._build.warnings)

    def _trained(
        self,
        kind: str,
        name: str,
        settings: Mapping[str, Any],
        edges: Mapping[str, str],
        aux: Aux | None,
        routes: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> Stage:
        """A stage that trains, with its auxiliary losses."""
        losses, data = inputs.aux_losses(self._build, name, aux)
        stage = self._build.stage(kind, name, {**settings, **losses}, {**edges, **data}, routes)
        checks.aux_losses(self._build, name)
        lacking.noise(self._build, name, stage.domains)
        return stage
