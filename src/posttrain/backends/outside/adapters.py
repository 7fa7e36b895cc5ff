"""Adapter directories of peft: which base they stand on, and whether they fit it.

An adapter is `adapter_config.json` and `adapter_model.safetensors`. Which model they belong to is
said by whoever is nearest to the truth:

1. In a store the artifact that is the base, by kind, name and fingerprint: `adapter_base.json`
   beside an adapter that a stage has trained, or the record of one that was taken in. There is no
   path in it, so the store can be moved.
2. A folder `base` beside the adapter, as `posttrain export` writes it.
3. `base_model_name_or_path` of `adapter_config.json`: a directory or a Hub id. What it says is a
   fact of the place and no part of an adapter's identity; the base's own identity is.

Nothing here reads numbers: JSON and the headers of weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.backends.outside.headers import TensorHeader, read_header
from posttrain.engine.errors import ConfigError
from posttrain.engine.hashes import HashFile
from posttrain.engine.parsing import Unreadable, parse_json_file
from posttrain.engine.record import RECORD, label_of
from posttrain.engine.store import ARTIFACTS

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
BASE_FOLDER = "base"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

OF_THE_PLACE = ("base_model_name_or_path", "revision")
"""Entries that say where the base lies."""
READ = frozenset(
    {
        *OF_THE_PLACE, "task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode",
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "use_dora",
        "qalora_group_size", "lora_bias", "ensure_weight_tying", "loftq_config",
    }
)  # fmt: skip
"""Entries of adapter_config.json that may say anything; all others have to be empty."""
TASKS = ("CAUSAL_LM", "SEQ_CLS")
INITS = ("gaussian", "orthogonal", "eva", "loftq")
"""Ways to begin that leave the weights of the base as they are, beside true and false."""
PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?$"
)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in place of a whole model."""
    return (directory / CONFIG).is_file()


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Content of adapter_config.json. Raises ConfigError for one that is damaged, and for what is
    no LoRA or has what cannot be added to the weights of a base."""
    path = directory / CONFIG
    try:
        config = dict(parse_json_file(path))
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}; fetch the adapter again") from error
    fix = "Merge it into its base with peft (merge_and_unload, then save_pretrained) and name that"
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{path}: peft_type = {config.get('peft_type')!r}; posttrain reads LORA, with or "
            f"without DoRA and rsLoRA. {fix}"
        )
    if config.get("task_type") not in (*TASKS, None):
        raise ConfigError(
            f"{path}: task_type = {config['task_type']!r}; posttrain reads adapters of language "
            f"models (CAUSAL_LM) and reward models (SEQ_CLS)"
        )
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in INITS:
        raise ConfigError(
            f"{path}: init_lora_weights = {init!r} changes the weights of the base, so the adapter "
            "does not fit the base that it names; save it again with peft's "
            "path_initial_model_for_weight_conversion"
        )
    more = sorted(name for name, value in config.items() if value and name not in READ)
    if more:
        raise ConfigError(
            f"{path}: {more[0]} = {config[more[0]]!r}: posttrain does not read adapters with that. "
            f"{fix}"
        )
    return config


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """The bytes of adapter_config.json in a store, which say nothing of a place."""
    plain = {**config, **dict.fromkeys(OF_THE_PLACE)}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def hash_without_place(hash_file: HashFile) -> HashFile:
    """As `hash_file`, and of an adapter_config.json the hash of its `canonical_config`."""

    def hashed(path: Path) -> str:
        if path.name != CONFIG:
            return hash_file(path)
        return hashlib.sha256(canonical_config(parse_json_file(path))).hexdigest()

    return hashed


def base_pointer(base: Path) -> dict[str, str] | None:
    """What `adapter_base.json` says of a base: kind, name and fingerprint of an artifact; None for
    a directory outside of a store."""
    path = base / RECORD
    if not path.is_file():
        return None
    record = parse_json_file(path)
    return {key: str(record[key]) for key in ("kind", "name", "fingerprint")}


def read_pointer(directory: Path) -> dict[str, str] | None:
    """Kind, name and fingerprint of the artifact on which an adapter in a store stands; None
    outside of one. Raises ConfigError for a damaged file."""
    path = directory / BASE
    try:
        if path.is_file():
            content = parse_json_file(path)
        else:
            path = directory / RECORD
            inputs = parse_json_file(path).get("inputs", {}) if path.is_file() else {}
            if "base" not in inputs:
                return None
            content = inputs["base"]
        return {key: str(content[key]) for key in ("kind", "name", "fingerprint")}
    except (Unreadable, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error}); `posttrain verify` says more") from error


def base_of(directory: Path) -> Path:
    """The directory of an adapter's base, or a Hub id as a path. Raises ConfigError where there is
    none."""
    pointer = read_pointer(directory)
    if pointer is not None:
        place = Path(pointer["kind"]) / label_of(pointer)
        found = next((p / place for p in _artifacts(directory) if (p / place).is_dir()), None)
        if found is None:
            raise ConfigError(
                f"{directory}: an adapter whose base {place} is not in the store; `posttrain "
                "verify` says what is missing. An adapter leaves a store together with its base by "
                "`posttrain export`"
            )
        return found
    if (directory / BASE_FOLDER).is_dir():
        return directory / BASE_FOLDER
    named = parse_json_file(directory / CONFIG).get("base_model_name_or_path")
    for place in (directory / str(named), Path(str(named)).expanduser()):
        if named and place.is_dir():
            return place
    if isinstance(named, str) and HUB_ID.fullmatch(named):
        return Path(named)
    raise ConfigError(
        f"{directory / CONFIG}: base_model_name_or_path = {named!r} is neither a directory nor a "
        "Hub id; name the model that the adapter was trained on: r.model(adapter, base=...)"
    )


def _artifacts(directory: Path) -> list[Path]:
    """Where the artifacts of a store lie, seen from one of them (artifacts/KIND/LABEL) and from
    what is being made (work/NAME/out)."""
    *_, third = directory.absolute().parents[:3]
    return [directory.absolute().parents[1], third / ARTIFACTS]


def revision_of(directory: Path) -> str | None:
    """The revision of a base on the Hub that adapter_config.json names."""
    revision = parse_json_file(directory / CONFIG).get("revision")
    return revision if isinstance(revision, str) else None


def check_fits(
    directory: Path, tensors: Mapping[str, TensorHeader], base: Mapping[str, TensorHeader]
) -> None:
    """Refuse an adapter that belongs to another model than `base`, by names and shapes of tensors.

    Raises ConfigError with the first tensor that finds no place.
    """
    advice = "the adapter is of another model; name its own base with r.model(adapter, base=...)"
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        part = PART.search(name)
        module = name[: part.start()] if part else name.removesuffix(".weight")
        beside = base.get(f"{module}.weight")
        if beside is None:
            # A head is tied to the embedding, or a reward model's own.
            if part is None and module in ("lm_head", "score"):
                continue
            raise ConfigError(f"{directory / WEIGHTS}: {key}: its base has no {module}; {advice}")
        if part is None:
            expected: set[tuple[int, ...]] = {beside.shape}
            ok = tensor.shape in expected or name.endswith(".bias")
        elif part[2] == ".bias":
            ok = True
        else:
            # Of a GPT-2 like layer the weight lies the other way round.
            ok = bool(tensor.shape) and _meets(part[1], tensor.shape, beside.shape)
        if not ok:
            raise ConfigError(
                f"{directory / WEIGHTS}: {key} is {_said(tensor.shape)} and {module}.weight of its "
                f"base {_said(beside.shape)}; {advice}"
            )


def _meets(part: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a side of a low-rank product meets a side of the weight."""
    inner = shape[-1] if part in ("lora_A", "lora_embedding_A") else shape[0]
    return inner in weight


def _said(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def read_adapter_headers(directory: Path) -> dict[str, TensorHeader]:
    """Names and shapes of an adapter's tensors. Raises ConfigError where there are none."""
    path = directory / WEIGHTS
    if not path.is_file():
        other = " (adapter_model.bin can hold code and is not read)"
        found = other if (directory / "adapter_model.bin").is_file() else ""
        raise ConfigError(
            f"{directory}: an adapter without {WEIGHTS}{found}; save it with peft's "
            "save_pretrained, which writes safetensors"
        )
    return read_header(path)
