"""Stages that were stopped or failed, by name: what is in their work directories.

`NAME@step` means the newest step checkpoint of the unfinished stage NAME, `NAME@step-120` the one
of step 120. NAME may also be `name-fingerprint` or the start of a fingerprint.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from posttrain.engine.atomic import remembered
from posttrain.engine.errors import StoreError, choices_text
from posttrain.engine.form import is_hash, is_object_of_texts
from posttrain.engine.graph import is_stage_name
from posttrain.engine.record import SHORT, label_of
from posttrain.engine.store import Store
from posttrain.engine.work import STAGE, STEP, read_step, read_warnings

_PLACE: Final = re.compile(r"(?P<name>[^/@]+)@step(-(?P<step>\d+))?")


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A stage that has a work directory and no artifact."""

    path: Path
    """The work directory."""
    stage: Mapping[str, Any]
    """name, kind, version, fingerprint, config, data, and inputs (edge -> directory of an
    artifact)."""
    step: int | None
    """Of its newest step checkpoint, None before the first."""

    @property
    def name(self) -> str:
        """What the run that began it calls it."""
        return str(self.stage["name"])

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return str(self.stage["kind"])

    @property
    def fingerprint(self) -> str:
        """Its identity."""
        return str(self.stage["fingerprint"])

    @property
    def label(self) -> str:
        """`name-fingerprint[:12]`."""
        return label_of(self.stage)

    @property
    def warnings(self) -> list[str]:
        """What it has warned of so far."""
        return read_warnings(self.path)

    def checkpoint(self) -> dict[str, Any]:
        """What the stage wrote beside the number of its step, see `work.write_step`.

        Raises StoreError for a file that no stage has written so.
        """
        found: dict[str, Any] = json.loads((self.path / STEP).read_bytes())
        for key, kind in (("directory", str), ("metrics", dict), ("tokens", int)):
            if not isinstance(found.get(key, kind()), kind):
                raise StoreError(
                    f"{self.path / STEP} has {found[key]!r} as its {key}: it was damaged; remove "
                    f"{self.path} to start that stage anew"
                )
        return found


def is_place(text: str) -> bool:
    """Whether a text has the form of a step checkpoint: "student@step", "student@step-120"."""
    return _PLACE.fullmatch(text) is not None


def split_place(text: str) -> tuple[str, int | None]:
    """Name and step of such a text; no step where the newest is meant."""
    found = _PLACE.fullmatch(text)
    assert found is not None, text
    return found["name"], None if found["step"] is None else int(found["step"])


def unfinished(store: Store) -> list[Unfinished]:
    """All of them, by name. One whose name was not noted, or whose note is damaged, is left out."""
    done = store.index()
    found = []
    for path in sorted((store.root / "work").glob(f"*/{STAGE}")):
        if path.parent.name not in done and len(path.parent.name) == SHORT:
            stage = remembered(path)
            if _is_whole(stage):
                found.append(Unfinished(path=path.parent, stage=stage, step=_step(path.parent)))
    return sorted(found, key=lambda one: (one.name, one.fingerprint))


def _is_whole(stage: Any) -> bool:
    return (
        isinstance(stage, dict)
        and is_stage_name(stage.get("name"))
        and is_stage_name(stage.get("kind"))
        and is_hash(stage.get("fingerprint"))
        and isinstance(stage.get("config"), dict)
        and is_object_of_texts(stage.get("inputs"))
    )


def _step(path: Path) -> int | None:
    """A damaged step checkpoint is none; the stage's own run says what is wrong with it."""
    try:
        return read_step(path)
    except StoreError:
        return None


def find_unfinished(store: Store, text: str) -> Unfinished:
    """The stage meant by `NAME@step` or `NAME@step-120`, which has a step checkpoint.

    Raises StoreError: there is none of that name, more than one, none of that step, or it has no
    step checkpoint yet.
    """
    name, step = split_place(text)
    every = unfinished(store)
    found = [one for one in every if one.name == name]
    found = found or [
        one
        for one in every
        if (one.label.startswith(name) and len(name) > len(one.name))
        or (len(name) >= 4 and one.fingerprint.startswith(name))
    ]
    # What has no step checkpoint cannot be meant where something else can.
    found = [one for one in found if one.step is not None] or found[:1]
    if len(found) > 1:
        choices = "\n".join(f"  {one.label}@step  ({_where(one)})" for one in found)
        raise StoreError(
            f"{text!r} could be {len(found)} unfinished stages; give one of:\n{choices}"
        )
    finished = any(
        name in store.names.all_of(label[-SHORT:], label[: -SHORT - 1])
        for label in (path.name for path in store.index().values())
    )
    if not found:
        known = choices_text(name, [one.name for one in every], label="unfinished stages")
        hint = f"{name!r} is finished, name it without @step; " if finished else ""
        raise StoreError(f"{text!r}: no unfinished stage {name!r} in {store.root}; {hint}{known}")
    (one,) = found
    if one.step is None:
        raise StoreError(
            f"{text!r}: {one.name} has no step checkpoint yet; the first one is written after some "
            "seconds of work"
            + (f"; another {name!r} is finished, name that without @step" if finished else "")
        )
    if step not in (None, one.step):
        raise StoreError(
            f"{text!r}: the newest step checkpoint of {one.name} is that of step {one.step}, and "
            f"older ones are not kept; give {name}@step-{one.step}"
        )
    return one


def _where(one: Unfinished) -> str:
    return "no step checkpoint" if one.step is None else f"step {one.step}"
