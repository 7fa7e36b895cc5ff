"""What checkpoints from outside say of conversations and modes: their chat templates, read while
planning.

A model speaks as the checkpoint does that it descends from by its starts. Of one that is trained
from nothing by `pretrain`, and of data that is made in the run, the stages find out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from posttrain.backends.checkpoint_source import CheckpointSource
from posttrain.backends.prompting import EFFORTS
from posttrain.backends.template import DATE, ChatTemplate, roles_refused
from posttrain.engine.errors import ConfigError
from posttrain.engine.graph import Node, with_role
from posttrain.language.builder import Builder, root_of

MODELS = ("start", "model", "models", "candidates", "student", "students", "along", "init")
"""Roles of the models that a stage asks in its modes."""
DATA = ("domains", "data", "aux")
"""Roles of what a stage shows to them."""
HELP = (
    "give it the messages that the template knows, or use a checkpoint whose template takes these"
)


def clock(build: Builder, stage: str, external: CheckpointSource) -> None:
    """Warn of a checkpoint whose template reads the clock. Raises ConfigError for a template that
    cannot be read or draws at random."""
    template = template_of(external)
    if template is not None and template.reads_clock:
        build.warn(
            f"{external.directory}: its chat template writes the date into prompts; all stages "
            f"show {DATE:%d %b %Y}, so that a run can be made again; to show another date, write "
            "it into the template in place of strftime_now",
            stage,
        )


def template_of(external: CheckpointSource) -> ChatTemplate | None:
    """Its chat template; None without one. Raises ConfigError for a text that is none."""
    if external.chat_template is None:
        return None
    file, text = external.chat_template
    try:
        return ChatTemplate(text)
    except ConfigError as error:
        raise ConfigError(f"{external.directory / file}: {error}") from None


def modes(build: Builder) -> None:
    """Refuse a stage in modes that its models do not have."""
    for node in build.nodes.values():
        asked = node.config.get("modes") or ()
        if node.kind == "pretrain":
            _refuse_efforts(f"stage {node.name!r} (pretrain), field 'modes'", asked, node)
        for source in with_role(node.inputs, *MODELS).values() if asked else ():
            where = f"stage {node.name!r} ({node.kind}), field 'modes'"
            _without_thinking(build, where, asked, source)
            external = build.external.get(root_of(build.nodes, source))
            if external is None:
                continue
            template = template_of(external)
            if template is None:
                raise ConfigError(
                    f"{where}: {', '.join(asked)} is asked of {source!r}, and "
                    f"{external.directory} has no chat template; leave mode= out"
                )
            for mode in asked:
                try:
                    template.variables(mode)
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error} ({source!r}, {_file(external)})") from None


def _without_thinking(build: Builder, where: str, asked: Sequence[str], source: str) -> None:
    """Refuse modes of a model that comes from a base which was made without thinking."""
    base = build.nodes.get(root_of(build.nodes, source))
    if (
        base is not None
        and base.kind == "pretrain"
        and not (base.config["thinking"] or base.config["modes"])
    ):
        raise ConfigError(
            f"{where}: {', '.join(asked)} is asked of {source!r}, which comes from "
            f"{base.name!r}, made without thinking; write thinking=True there, or leave mode= out"
        )
    if base is not None and base.kind == "pretrain":
        _refuse_efforts(where, asked, base)


def _refuse_efforts(where: str, asked: Sequence[str], base: Node) -> None:
    """Refuse modes of which a model that is made here knows nothing."""
    efforts = [mode for mode in asked if mode in EFFORTS]
    if efforts:
        raise ConfigError(
            f"{where}: {', '.join(efforts)} is asked of {base.name!r}, whose chat template does "
            "not read reasoning_effort; use think and no_think, or a model from outside that "
            "reads it"
        )


def conversations(build: Builder) -> None:
    """Refuse a stage that shows conversations to a model whose chat template takes none of that
    shape, as far as its rows were read."""
    for node in build.nodes.values():
        for source in with_role(node.inputs, *MODELS).values():
            external = build.external.get(root_of(build.nodes, source))
            if external is None:
                continue
            template = template_of(external)
            for data in _shown(build, node):
                for shape, count in (data.runtime.get("asked") or {}).items():
                    _refuse_shape(node, data, external, template, shape, count)


def _refuse_shape(
    node: Node,
    data: Node,
    external: CheckpointSource,
    template: ChatTemplate | None,
    shape: str,
    count: int,
) -> None:
    roles = shape.replace(" ", ", ").replace("+", " with ")
    what = f"{count} of the rows of {data.name!r} are conversations of {roles}"
    where = f"stage {node.name!r} ({node.kind}): {what}"
    if template is None:
        raise ConfigError(
            f"{where}, and {external.directory} has no chat template, which says how one is laid "
            "out; use a checkpoint with one (an instruct model, or put chat_template.jinja beside "
            "its weights), or data of one user message per row without `system`"
        )
    refusal = roles_refused(template, shape)
    if refusal is not None:
        raise ConfigError(
            f"{where}, which the chat template of {_file(external)} does not take: {refusal}; "
            f"{HELP}"
        )


def _shown(build: Builder, node: Node) -> Iterator[Node]:
    """The domains and tables whose rows a stage shows, those behind a mix among them."""
    for name in with_role(node.inputs, *DATA).values():
        data = build.nodes.get(name)
        if data is None:
            continue
        if data.kind in ("mix", "dedup"):
            yield from _shown(build, data)
        else:
            yield data


def _file(external: CheckpointSource) -> str:
    file = "" if external.chat_template is None else external.chat_template[0]
    return str(external.directory / file)
