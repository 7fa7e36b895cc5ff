"""What --set changes: the setting of a stage, or a part of it, by dotted path.

--set student.lr=1e-3                          of the stage `student`
--set '*_teacher.steps=50'                     of all stages whose names fit
--set student.estimator.k=64                   within a choice
--set sft.aux.pretraining=0.1                  an entry of a dict
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from posttrain.engine.errors import ConfigError, choices_text
from posttrain.engine.graph import Node
from posttrain.stages.kinds import kind_of
from posttrain.values import Settings, by_kind, default_of


class Overrides:
    """The settings of --set, each a key `STAGE.FIELD` or `STAGE.FIELD.PATH` with its value.

    STAGE is a name, or a glob for those of its stages that have the setting. `of_kinds` has
    settings of all stages of a kind, which --set may change again.
    """

    def __init__(
        self, given: Mapping[str, Any], of_kinds: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._given = dict(given)
        self._of_kinds = of_kinds or {}
        self._used: set[str] = set()

    def apply(self, kind: str, stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a stage with what --set says of them.

        Raises ConfigError for a path into a setting that has no parts.
        """
        fields = kind_of(kind).settings_class().model_fields
        found = {**settings, **self._of_kinds.get(kind, {})}
        matched = [(key, _split(key, stage, fields)) for key in self._given]
        paths = [(key, path) for key, path in matched if path]
        # The whole before its parts, and which choice it is before the settings of that choice.
        for key, path in sorted(paths, key=lambda pair: (len(pair[1]), pair[1][-1] != "kind")):
            self._used.add(key)
            name, *rest = path
            if rest:
                before = found[name] if name in found else _default(fields, name)
                found[name] = _with(before, rest, self._given[key], key)
            else:
                found[name] = self._given[key]
        return found

    def check_used(self, nodes: Mapping[str, Node]) -> None:
        """Raise ConfigError for the first key that was about no stage or about no setting."""
        for key in self._given:
            if key not in self._used:
                raise ConfigError(f"--set {key}: {_unused(key, nodes)}")


def _split(key: str, stage: str, fields: Mapping[str, Any]) -> list[str]:
    """Field and path that a key names of a stage, [] where it is not about that stage."""
    parts = key.split(".")
    for cut in range(1, len(parts)):
        pattern = ".".join(parts[:cut])
        if fnmatchcase(stage, pattern) and (parts[cut] in fields or not _is_glob(pattern)):
            return parts[cut:]
    return []


def _default(fields: Mapping[str, Any], name: str) -> Any:
    field = fields.get(name)
    return None if field is None or field.is_required() else default_of(field)


def _with(value: Any, path: list[str], new: Any, key: str) -> Any:
    """`value` with `new` at `path`, as plain data. What is not there yet begins empty."""
    if not path:
        return new
    value = by_kind(value.to_json(defaults=False) if isinstance(value, Settings) else value)
    if path == ["kind"]:
        # Another choice has other settings.
        return {"kind": new}
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"--set {key}: {value!r} has no part {path[0]!r}; set the whole")
    parts = dict(value or {})
    return {**parts, path[0]: _with(parts.get(path[0]), path[1:], new, key)}


def _unused(key: str, nodes: Mapping[str, Node]) -> str:
    """Why a key changed nothing."""
    stages = [name for name, node in nodes.items() if not kind_of(node.kind).from_outside]
    parts = key.split(".")
    for cut in range(1, len(parts)):
        pattern = ".".join(parts[:cut])
        matched = [name for name in stages if fnmatchcase(name, pattern)]
        if matched:
            classes = [kind_of(nodes[name].kind).settings_class() for name in matched]
            fields = {field for one in classes for field in one.model_fields}
            return (
                f"none of the stages {', '.join(matched)} has a setting {parts[cut]!r}; "
                f"{choices_text(parts[cut], fields)}"
            )
    known = choices_text(parts[0], stages, label="stages")
    return f"no stage of this recipe with settings has that name; {known}"


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")
