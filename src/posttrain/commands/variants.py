"""The variants of a sweep: --axis and --seeds read, every combination built, one graph of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from posttrain.engine.errors import ConfigError, PosttrainError
from posttrain.engine.joining import join
from posttrain.engine.store import Store
from posttrain.stages.kinds import KINDS, shown_kind

if TYPE_CHECKING:  # it imports pydantic
    from posttrain.language.loader import Loaded

SPLITS = ("validation", "heldout")
_LONG = 20
"""Characters of a value in the name of a stage."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and the values that it takes."""

    key: str
    """As --set has it: `student.lr`, or a parameter of the recipe."""
    values: tuple[str, ...]
    """As they were written."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One combination of values with one seed."""

    setting: int
    """Its place among the combinations."""
    seed: int
    keys: Mapping[str, str]
    """Stage of the recipe -> what the joined graph calls it."""
    target: str
    """Key of its target in the joined graph."""


@dataclass(frozen=True, kw_only=True)
class Variants:
    """A recipe with every combination of values and seeds, as one graph."""

    loaded: Loaded
    """The recipe; its graph is the joined one."""
    settings: tuple[Mapping[str, str], ...]
    """Every combination: key of an axis -> value."""
    variants: tuple[Variant, ...]

    @property
    def wanted(self) -> int:
        """The stages that separate runs would need."""
        return sum(len(variant.keys) for variant in self.variants)


def read_axis(text: str) -> Axis:
    """An axis as the command line has it, `KEY=VALUE,VALUE`.

    A comma within brackets or double quotes is part of a value. Raises ConfigError for no key, no
    value, and a value that is there twice.
    """
    key, equals, rest = text.partition("=")
    key = key.strip()
    if not equals or not key.strip("."):
        raise ConfigError(
            f"--axis {text}: write --axis STAGE.FIELD=VALUE,VALUE or --axis PARAMETER=VALUE,VALUE, "
            "for example --axis student.lr=1e-4,3e-4"
        )
    if key == "seed":
        raise ConfigError(f"--axis {text}: seeds are no axis; give --seeds {rest or '0,1,2'}")
    if key == "suite":
        raise ConfigError(
            f"--axis {text}: a sweep compares on the same problems, so that the suite is no axis; "
            "make a sweep of each suite with --suite"
        )
    values = tuple(value.strip() for value in _split(rest))
    if "" in values:
        missing = "it gives no value" if len(values) == 1 else "one of its values is empty"
        raise ConfigError(f"--axis {text}: {missing}; write --axis {key}=VALUE,VALUE")
    parsed: list[Any] = []
    for value in values:
        one = _parse(value)
        if any(one == other and type(one) is type(other) for other in parsed):
            raise ConfigError(f"--axis {text}: the value {value} is there twice; give it once")
        parsed.append(one)
    return Axis(key=key, values=values)


def read_axes(texts: Sequence[str], settings: Sequence[str]) -> list[Axis]:
    """All axes. Raises ConfigError for a key that is given twice, or to --set as well."""
    axes = [read_axis(text) for text in texts]
    keys = [axis.key for axis in axes]
    for axis in axes:
        if keys.count(axis.key) > 1:
            raise ConfigError(
                f"--axis {axis.key} is given twice; write all its values in one: "
                f"--axis {axis.key}=VALUE,VALUE"
            )
    for text in settings:
        key = text.partition("=")[0].strip()
        if key in keys:
            raise ConfigError(f"--set {text}: {key} is an axis of the sweep; give one of the two")
        if key == "seed":
            raise ConfigError(f"--set {text}: a sweep takes its seeds from --seeds")
    return axes


MOST_DIGITS = 20
"""Of a seed, before anything else says that it is too large."""


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds as the command line has them, "0,1,2". Raises ConfigError for anything else."""
    seeds: list[int] = []
    for part in text.split(","):
        if not part.strip().isdecimal() or len(part) > MOST_DIGITS:
            problem = (
                f"{part.strip()[:60]!r} is no whole number from 0 up" if part.strip() else "empty"
            )
            raise ConfigError(
                f"--seeds {text}: {problem}; write whole numbers with commas between them, for "
                "example --seeds 0,1,2"
            )
        if int(part) in seeds:
            raise ConfigError(f"--seeds {text}: the seed {int(part)} is there twice; give it once")
        seeds.append(int(part))
    return tuple(seeds)


def build_variants(
    recipe: str,
    *,
    store: Store,
    axes: Sequence[Axis],
    seeds: Sequence[int],
    settings: Sequence[str],
    suite: str | None,
    split: str | None,
) -> Variants:
    """Build the recipe with every combination of the axes and every seed, and join the graphs.

    Its evaluations ask the problems of `split`, by default of the validation split: tuning does not
    look at held-out problems. What `settings` say of a stage goes before that.

    Raises:
        ConfigError: what `load_recipe` raises, naming the axis; nothing varies; an axis or a seed
            that changes nothing; a `split` that `settings` contradict.
        GraphError: as `load_recipe`.
    """
    from posttrain.language.loader import load_recipe

    if not axes and len(seeds) == 1:
        raise ConfigError(
            "a sweep needs something that varies: --axis KEY=VALUE,VALUE or several --seeds; "
            "`posttrain run` makes a single one"
        )
    scoring = {
        name: {"split": split or SPLITS[0]}
        for name, kind in KINDS.items()
        if "scores" in kind.makes and "split" in kind.settings_class().model_fields
    }
    combinations = [
        dict(zip((axis.key for axis in axes), values, strict=True))
        for values in product(*(axis.values for axis in axes))
    ]
    places = [(number, seed) for number in range(len(combinations)) for seed in seeds]
    built = []
    for number, seed in places:
        given = [*settings, *(f"{key}={value}" for key, value in combinations[number].items())]
        with _naming_axes(combinations[number]):
            built.append(
                load_recipe(
                    recipe, store=store, settings=given, suite=suite, seed=seed, of_kinds=scoring
                )
            )
    prints = [loaded.graph.fingerprints()[loaded.graph.target] for loaded in built]
    _check_changes(axes, seeds, combinations, dict(zip(places, prints, strict=True)), built[0])
    joined = join([loaded.graph for loaded in built], _labels(axes, combinations, places))
    if split is not None:
        _check_split(split, joined.graph.nodes.values())
    variants = [
        Variant(setting=number, seed=seed, keys=keys, target=keys[loaded.graph.target])
        for (number, seed), keys, loaded in zip(places, joined.keys, built, strict=True)
    ]
    sources = tuple(dict.fromkeys(path for loaded in built for path in loaded.sources))
    warnings = {(warned.stage, warned.text): warned for one in built for warned in one.warnings}
    loaded = replace(
        built[0], graph=joined.graph, sources=sources, warnings=tuple(warnings.values())
    )
    return Variants(
        loaded=loaded,
        settings=tuple(combinations),
        variants=tuple(variants),
    )


def _split(text: str) -> list[str]:
    """The values of an axis: cut at commas, but not within brackets or double quotes."""
    parts, depth, quoted, before = [""], 0, False, ""
    for character in text:
        if character == '"' and before != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not quoted and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
        before = character
    return parts


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@contextmanager
def _naming_axes(values: Mapping[str, str]) -> Iterator[None]:
    """Let an error about a setting of an axis say so."""
    try:
        yield
    except PosttrainError as error:
        text = str(error)
        for key in values:
            text = re.sub(rf"--set {re.escape(key)}(?![\w.])", f"--axis {key}", text)
        error.args = (text, *error.args[1:])
        if values:
            given = " ".join(f"--axis {key}={value}" for key, value in values.items())
            error.add_note(f"with {given}")
        raise


def _check_changes(
    axes: Sequence[Axis],
    seeds: Sequence[int],
    combinations: Sequence[Mapping[str, str]],
    prints: Mapping[tuple[int, int], str],
    loaded: Loaded,
) -> None:
    """Raise ConfigError for an axis, or for seeds, of which the target does not depend."""
    target = loaded.graph.target
    for axis in axes:
        groups: dict[tuple[Any, ...], set[str]] = {}
        for (number, seed), found in prints.items():
            rest = tuple(v for key, v in combinations[number].items() if key != axis.key)
            groups.setdefault((rest, seed), set()).add(found)
        if len(axis.values) > 1 and all(len(found) == 1 for found in groups.values()):
            raise ConfigError(
                f"--axis {axis.key}={','.join(axis.values)} changes nothing: {target} and all it "
                "needs are the same with every value; take the axis out"
            )
    if len(seeds) > 1 and all(
        len({prints[number, seed] for seed in seeds}) == 1 for number in range(len(combinations))
    ):
        raise ConfigError(
            f"--seeds {','.join(map(str, seeds))} change nothing: {target} and all it needs are "
            "the same with every seed; give one seed"
        )


def _check_split(split: str, nodes: Any) -> None:
    for node in nodes:
        found = node.config.get("split", split)
        if "scores" in shown_kind(node.kind).makes and found != split:
            raise ConfigError(
                f"--split {split} and --set {node.name}.split={found} contradict each other; "
                "give one of them"
            )


def _labels(
    axes: Sequence[Axis],
    combinations: Sequence[Mapping[str, str]],
    places: Sequence[tuple[int, int]],
) -> list[Mapping[str, str]]:
    """What tells each variant apart, short enough for the name of a stage."""
    ends = [axis.key.rpartition(".")[2] for axis in axes]
    names = [
        end if ends.count(end) == 1 and end != "seed" else axis.key
        for end, axis in zip(ends, axes, strict=True)
    ]
    values = [dict(zip(axis.values, _short(axis.values), strict=True)) for axis in axes]
    found: list[Mapping[str, str]] = []
    for number, seed in places:
        label = {
            name: value[combinations[number][axis.key]]
            for name, value, axis in zip(names, values, axes, strict=True)
        }
        found.append(label | {"seed": str(seed)})
    return found


def _short(values: Sequence[str]) -> list[str]:
    """Values in few characters, each its own: cut, or else counted."""
    plain = [re.sub(r"\s+", " ", value) for value in values]
    cut = [value if len(value) <= _LONG else f"{value[: _LONG - 1]}…" for value in plain]
    if len(set(cut)) == len(cut):
        return cut
    return [f"{value[: _LONG - 4]}…{number + 1}" for number, value in enumerate(plain)]
