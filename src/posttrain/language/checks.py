"""What has to fit together once a stage has its settings: one check for each verb that needs one,
and those of a whole recipe, of which a verb sees only the part that stands above it.

Every function raises ConfigError with the stage, the value and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.algorithms import InTurn, StrongAgainstWeak
from posttrain.backends.checkpoint_source import CheckpointSource, ends_of
from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.graph import Graph, Node, named, with_role
from posttrain.language import lacking
from posttrain.language.builder import Builder, root_of
from posttrain.rewards.judge_base import ByDomain, Judge, Lexicographic, Normalised, Whitened
from posttrain.rewards.judge_kinds import Compare, CompareEndpoint, Length, Llm, parse_judge
from posttrain.stages.kinds import KINDS, kind_of
from posttrain.suites.domain import Suite, Table
from posttrain.suites.preferences import form_of, has_margins

MODELS = ("start", "model", "models", "candidates", "student", "students", "along", "init")
"""Roles of the models that a stage asks in its modes."""


def speaks(build: Builder, stage: str, external: CheckpointSource) -> None:
    """Warn of a checkpoint from outside that has no chat template, and of one whose files do not
    agree on what ends a turn; refuse one where nothing would."""
    end = ends_of(external)
    if end is not None and not end.ids:
        raise ConfigError(
            f"stage {stage!r}: {external.directory}: nothing would ever end a response: neither "
            "generation_config.json nor config.json nor tokenizer_config.json names an "
            "end-of-sequence token that tokenizer.json and the model have, and the chat template "
            "writes none after an assistant message; set eos_token_id in generation_config.json"
        )
    for warning in () if end is None else end.warnings:
        build.warn(f"{external.directory}: {warning}", stage)
    if external.chat_template is None:
        build.warn(
            f"{external.directory} has no chat template: prompts are plain text to it, and a "
            "response follows with nothing in between; if it was trained with a template, put it "
            "beside its weights as chat_template.jinja",
            stage,
        )


def needed(build: Builder, graph: Graph) -> None:
    """Warn of stages that the target does not need, which are therefore not made."""
    order = set(graph.order())
    left = [n.name for n in build.nodes.values() if n.name not in order and n.kind != "domain"]
    if left:
        names = ", ".join(left)
        are = f"stage {names} is" if len(left) == 1 else f"stages {names} are"
        build.warn(
            f"{are} not made: {graph.target!r}, which recipe() returns, is not made from "
            f"{'it' if len(left) == 1 else 'them'}; leave out what is not needed, or hand it to a "
            "stage that is"
        )


def aux_losses(build: Builder, stage: str) -> None:
    """Refuse auxiliary losses, given as settings or by --set, that have no data, and modes of one
    that reads the rows of a data stage."""
    inputs = named(build.nodes[stage].inputs, "aux")
    known = sorted({name.partition(".")[0] for name in inputs})
    for name, loss in build.settings[stage].aux.items():
        if name not in known:
            raise ConfigError(
                f"stage {stage!r}, field 'aux': {name!r} has no data in the recipe; choices: "
                f"{', '.join(known) or 'none: give aux={name: (data, weight)}'}"
            )
        if name in inputs and loss.modes:
            raise ConfigError(
                f"stage {stage!r}, field 'aux.{name}.modes': the rows of {name!r} are as its data "
                "stage made them; leave it out"
            )


def merge(build: Builder, stage: str) -> None:
    """Refuse a merge without the base that its `how` adds to, and weights of unknown models."""
    node = build.nodes[stage]
    how, weights = build.settings[stage].how.kind, node.config["weights"]
    names = list(named(node.inputs, "models"))
    if (how != "average") != ("base" in node.inputs):
        raise ConfigError(
            f"stage {stage!r} (merge): how = {how} "
            + (
                "reads no base; leave base= out"
                if how == "average"
                else "adds to a base; give base="
            )
            + ", or change how"
        )
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"stage {stage!r} (merge), field 'weights': {name!r} is not one of its models; "
                f"choices: {', '.join(names)}"
            )
    if how == "average" and sum(weights.get(name, 1.0) for name in names) <= 0:
        raise ConfigError(
            f"stage {stage!r} (merge), field 'weights': they add up to 0, so there is no average"
        )


def demos(suite: Suite, domains: Sequence[str], modes: Sequence[str]) -> None:
    """Raise ConfigError for a domain that has no demonstrations, or none that think."""
    for name in domains:
        source, where = suite.domains[name].source, f"domain {name!r} of suite {suite.name!r}"
        table = isinstance(source, Table)
        if isinstance(source, Table) and not source.demonstrated:
            raise ConfigError(
                f"{where} has no demonstrations: name their column with demo = ... in the suite, "
                "or that of conversations with messages = ..., or leave the domain out of "
                "r.demos(...)"
            )
        thinks = (
            source.thought is not None if isinstance(source, Table) else (source.format != "plain")
        )
        if "think" in modes and not thinks:
            fix = (
                "name the column of the steps with thought = ... in the suite"
                if table
                else "format = 'plain' of a generated domain has no steps; take another format"
            )
            raise ConfigError(
                f"{where} has no demonstrations in the mode think: {fix}, or leave the domain out "
                "of r.demos(..., mode='think')"
            )


def given_rows(build: Builder, stage: str) -> None:
    """Refuse settings of demonstrations where the data is a stage's rows."""
    node = build.nodes[stage]
    for field in ("modes", "demo_noise", "hint"):
        if "data" in node.inputs and node.config.get(field):
            raise ConfigError(
                f"stage {stage!r} ({node.kind}), field {field!r}: {node.config[field]} is not "
                "read, because the rows of a data stage are as they are; leave it out, or learn "
                "from r.demos(...)"
            )


def dpo(build: Builder, stage: str) -> None:
    """Refuse a reference that the loss does not read."""
    if "reference" in build.nodes[stage].inputs and build.settings[stage].loss.kind == "simpo":
        raise ConfigError(
            f"stage {stage!r} (dpo): loss = simpo reads no reference; leave reference= out, or "
            "use another loss"
        )


def rl(build: Builder, stage: str, domains: Sequence[str]) -> None:
    """Refuse a judge that cannot be asked about these domains, settings of other domains, a critic
    that nothing reads, and a way to draw that does not fit the profile."""
    settings, inputs = build.settings[stage], build.nodes[stage].inputs
    _judge(build, stage, "reward", domains)
    named_domains(build, stage, domains, "kl.domains", "critique.domains")
    if settings.critique is not None:
        asked = settings.critique.domains or domains
        lacking.all_of(build, stage, asked, reads="critique learns", fix="leave critique out")
    if "critic" in inputs and not settings.uses_critic:
        raise ConfigError(
            f"stage {stage!r} (rl): critic = {inputs['critic']!r} is read with advantage = gae "
            "only; set that, or leave critic= out"
        )
    draw, needs = settings.draw.kind, not isinstance(settings.draw, InTurn)
    if needs and "profile" not in inputs:
        raise ConfigError(
            f"stage {stage!r} (rl), field 'draw': {draw} needs pass rates to begin with; give "
            "profile=r.profile(start, prompts=...)"
        )
    if "profile" in inputs and not needs:
        raise ConfigError(
            f"stage {stage!r} (rl): profile = {inputs['profile']!r} is not read with draw = "
            "in_turn; leave it out, or set draw to band or gaussian"
        )


def named_domains(build: Builder, stage: str, domains: Sequence[str], *fields: str) -> None:
    """Refuse a setting by domain that names a domain which the stage does not have."""
    for field in fields:
        for name in [name for value in build.values(stage, field) for name in value]:
            if name not in domains:
                raise ConfigError(
                    f"stage {stage!r} ({build.nodes[stage].kind}), field {field!r}: {name!r} is "
                    f"not a domain of its prompts; choices: {', '.join(domains)}"
                )


def select(build: Builder, stage: str) -> None:
    """Refuse a choice of steps of rollouts that have none, and of scores that they do not have."""
    node = build.nodes[stage]
    for field in ("first_step", "last_step"):
        for source in map(build.handle, node.inputs.values()):
            if node.config[field] is not None and source.kind not in ("rl", ""):
                raise ConfigError(
                    f"stage {stage!r} (select): {field} = {node.config[field]} chooses among the "
                    f"steps of an rl stage, and {source.name!r} is a {source.kind} stage; leave it "
                    "out, or select from r.rl(...)"
                )
    _scored(build, stage, getattr(build.settings[stage].how, "by", "reward"))
    lacking.selection(build, stage, build.handle(stage).domains)


def pairs(build: Builder, stage: str) -> None:
    """Refuse a second stage that `how` does not read or lacks, and scores that are not there."""
    node = build.nodes[stage]
    against = bool(with_role(node.inputs, "against"))
    how = build.settings[stage].how
    if isinstance(how, StrongAgainstWeak) != against:
        raise ConfigError(
            f"stage {stage!r} (pairs): how = {how.kind} "
            + ("reads no" if against else "needs a")
            + " second stage; write r.pairs(strong, against=weak) for strong_against_weak and "
            "r.pairs(rollouts) for the others"
        )
    if node.config["judge"] is None:
        _scored(build, stage, build.settings[stage].by)
    lacking.preference(build, stage, build.handle(stage).domains)


def _scored(build: Builder, stage: str, by: str) -> None:
    """Refuse a stage that goes by scores which its rollouts do not have."""
    node = build.nodes[stage]
    for source in with_role(node.inputs, "rollouts", "against").values() if by == "score" else ():
        kind = build.handle(source).kind
        if kind not in ("score", ""):
            raise ConfigError(
                f"stage {stage!r} ({node.kind}): by = score, and {source!r} is a {kind} stage, "
                "whose rollouts have rewards only; give it r.score(rollouts, judge=...)"
            )


def filter(build: Builder, stage: str) -> None:
    """Raise ConfigError for a condition on a second profile that a filter does not have."""
    node = build.nodes[stage]
    for field, unread in {"against_low": 0.0, "against_high": 1.0, "min_gain": None}.items():
        if "against" not in node.inputs and node.config[field] != unread:
            raise ConfigError(
                f"stage {stage!r} (filter): {field} = {node.config[field]} is about a second "
                "profile; give against=r.profile(...), or leave it out"
            )


def mix(build: Builder, stage: str) -> None:
    """Raise ConfigError where a mix by tokens has no tokenizer, or one by rows has one."""
    node = build.nodes[stage]
    given = "tokenizer" in node.inputs
    if (node.config["by"] == "tokens") != given:
        raise ConfigError(
            f"stage {stage!r} (mix): by = {node.config['by']} "
            + ("reads no" if given else "needs")
            + " tokenizer=, a model whose tokens are counted; give both or neither"
        )


def _judge(build: Builder, stage: str, field: str, domains: Sequence[str]) -> None:
    """Refuse a judge, from the recipe or from --set, that the stage cannot ask."""
    node = build.nodes[stage]
    if node.config[field] is None:
        return
    judge, where = parse_judge(node.config[field]), f"stage {stage!r} ({node.kind})"
    _asks(build, node, judge, domains, where=f"{where}, field {field!r}")


def _asks(build: Builder, node: Node, judge: Judge, domains: Sequence[str], *, where: str) -> None:
    """Refuse a judge that a stage cannot ask about these domains, or that asks a stage which is no
    input."""
    problems_of_judge(build, judge, domains, where=where)
    missing = [part.edge for part in judge.walk() if part.edge not in (None, *node.inputs)]
    if missing:
        choices = with_role(node.inputs, "judges")
        raise ConfigError(
            f"{where}: it asks {missing[0]!r}, which is no input of the stage; inputs: "
            f"{', '.join(choices) or 'none'}; name the judge in the recipe"
        )


def evaluate(build: Builder, stage: str, domains: Sequence[str]) -> None:
    """Refuse judges of domains that are not evaluated, and those whose scores say nothing about a
    response by itself."""
    node = build.nodes[stage]
    for domain, judge in build.settings[stage].judges.items():
        where = f"stage {stage!r} (evaluate), field 'judges.{domain}'"
        if domain not in domains:
            raise ConfigError(
                f"stage {stage!r} (evaluate), field 'judges': {domain!r} is not one of its "
                f"domains; {choices_text(domain, domains)}"
            )
        _asks(build, node, judge, [domain], where=where)
        compares = isinstance(judge, Compare | CompareEndpoint)
        if compares and "init" not in node.inputs:
            raise ConfigError(
                f"{where}: judges.compare says which of two responses is better, and there is no "
                "init to compare with; give init=, or a judge that scores one response"
            )
        for part in judge.walk():
            alone = part is judge and compares
            length = isinstance(part, Length) and part.shape in ("group_relative", "pass_rate")
            if length or (isinstance(part, _RELATIVE) and not alone):
                raise ConfigError(
                    f"{where}: the score of judge {part.judge} depends on what other responses it "
                    "is asked about, so it means nothing as a mean; take a judge that scores each "
                    "response by itself, or judges.compare alone"
                )


_RELATIVE = (Compare, CompareEndpoint, Normalised, Whitened, Lexicographic)


def problems_of_judge(build: Builder, judge: Judge, domains: Sequence[str], *, where: str) -> None:
    """Refuse a judge that has nothing to say about the problems of a domain: a `by_domain` without
    it, or a judge that reads the rubrics of rows that have none."""
    for part in judge.walk():
        if isinstance(part, ByDomain):
            part.check(domains, where=where)
    lacking.judge(build, judge, domains, where=where)
    for domain in domains:
        source = build.suite.domains[domain].source
        asked = judge.walk(domain)
        reads = any(isinstance(part, Llm) and part.rubric is True for part in asked)
        if reads and getattr(source, "rubric", None) is None:
            raise ConfigError(
                f"{where}: judges.llm(rubric=True) grades by the criteria of each row, and the "
                f"rows of domain {domain!r} have none; name their column with rubric = ... in the "
                "suite, or give the judge a rubric as a text"
            )


def recipe(build: Builder) -> None:
    """The checks of a whole recipe."""
    _thinking(build.nodes)
    for node in build.nodes.values():
        data = build.nodes.get(node.inputs.get("data", ""))
        if data is not None and "pairs" in kind_of(data.kind).makes:
            _single(node, data)
            _margins(node, data)
    _unread_margins(build)


def _thinking(nodes: Mapping[str, Node]) -> None:
    """Refuse a stage in modes whose model comes from a base that was made without thinking.

    Of a model from outside its chat template decides, when it is loaded.
    """
    for node in nodes.values():
        modes = node.config.get("modes") or ()
        for source in with_role(node.inputs, *MODELS).values() if modes else ():
            base = nodes.get(root_of(nodes, source))
            if (
                base is not None
                and base.kind == "pretrain"
                and not (base.config["thinking"] or base.config["modes"])
            ):
                raise ConfigError(
                    f"stage {node.name!r} ({node.kind}), field 'modes': {', '.join(modes)} is "
                    f"asked of {source!r}, which comes from {base.name!r}, made without thinking; "
                    "write thinking=True there, or leave mode= out"
                )


def _single(node: Node, data: Node) -> None:
    """Refuse single responses, desirable or not, where pairs are learned from."""
    if data.kind != "preferences" or form_of(data.config) != "single":
        return
    where = f"stage {node.name!r} ({node.kind})"
    these = f"{data.name!r} are single responses, desirable or not"
    if node.kind == "reward_model":
        raise ConfigError(
            f"{where}: it learns from pairs, and {these}; learn from them with r.dpo(loss='kto'), "
            "or give it preferences with chosen and rejected responses"
        )
    loss = node.config.get("loss", {})
    if node.kind == "dpo" and loss["kind"] != "kto":
        raise ConfigError(
            f"{where}, field 'loss': {loss['kind']} learns from pairs, and {these}; write "
            "loss='kto', or give it preferences with chosen and rejected responses"
        )


def _margins(node: Node, data: Node) -> None:
    """Refuse a reward model that reads how clear preferences are where nobody said it."""
    loss = node.config.get("loss")
    margins = loss.get("margins") if isinstance(loss, dict) else None
    if margins not in ("strength", "margin"):
        return
    where = f"stage {node.name!r} ({node.kind}), field 'loss.margins'"
    if data.kind == "preferences":
        said = has_margins(data.config) if margins == "margin" else "strength" in data.config
        more = ", or chosen_score and rejected_score" if margins == "margin" else ""
        if not said:
            raise ConfigError(
                f"{where}: {data.name!r} does not say the {margins} of a preference; name its "
                f'column with {margins} = "..."{more}'
            )
    elif data.kind == "pairs":
        pairs: Any = KINDS["pairs"].settings_class()(**data.config)
        if margins == "strength" and not pairs.pairwise:
            raise ConfigError(
                f"{where}: strength is read from pairs whose judge compares two responses, and "
                f"those of {data.name!r} have none; give r.pairs a judge=judges.oracle(...), or "
                "judges.human() with how = all or random"
            )
        if margins == "margin" and (pairs.pairwise or pairs.by != "score"):
            raise ConfigError(
                f"{where}: margin is the difference of two scores, and those of {data.name!r} are "
                "not paired by score; give r.pairs a judge that scores, such as judges.scalar(...)"
            )


def _unread_margins(build: Builder) -> None:
    """Warn of columns of preferences that none of the stages reads that learn from them."""
    for data in build.nodes.values():
        learners = [n for n in build.nodes.values() if n.inputs.get("data") == data.name]
        for column in ("margin", "strength"):
            losses = [node.config.get("loss", {}) for node in learners]
            read = any(loss.get("margins") == column for loss in losses)
            if data.kind == "preferences" and column in data.config and learners and not read:
                build.warn(
                    f"the column {column} = {data.config[column]!r} of {data.name!r} is read by no "
                    f"stage: a reward model reads it with loss=BradleyTerry(margins={column!r}); "
                    "write that, or leave the column out",
                    data.name,
                )
