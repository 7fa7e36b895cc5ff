"""Stages that make models without training, and domains: taken in from outside, and merged.

Files of a checkpoint from outside are linked, not copied, and hashed. A large file that the plan
hashed, and that the file system calls unchanged since, is not read again for that
(`engine/hashes.py`).

Merging makes one checkpoint out of the weights of several (`backends/merging.py`): averages of runs
that differ in data or settings (Llama 3, arXiv 2407.21783, section 4.1.7), soups, and sums of what
several specialists learned on top of one base.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.backends.checkpoint import (
    LanguageModel,
    load,
    load_merged,
    read_chat,
    read_tokenizer,
    save,
)
from posttrain.backends.merging import TensorFiles, merged, untie
from posttrain.backends.outside.adapters import (
    CONFIG,
    canonical_config,
    hash_without_place,
    is_adapter,
    read_adapter_config,
)
from posttrain.backends.outside.files import vocabulary_files
from posttrain.backends.saved_types import Types, read_types, widest
from posttrain.backends.vocabulary import tokenizer_difference
from posttrain.engine.errors import ConfigError
from posttrain.engine.fingerprint import file_digest, files_digest
from posttrain.engine.graph import named
from posttrain.engine.hashes import FileHashes, HashFile
from posttrain.engine.process import Job
from posttrain.engine.store import CACHE
from posttrain.stages.context import Context
from posttrain.stages.settings.models import Merge
from posttrain.suites.build import build_domain
from posttrain.suites.checked import remember_built
from posttrain.suites.messages import shape_facts

POSITIONS = "max_position_embeddings"
FREE = frozenset(
    {
        "transformers_version", "architectures", "dtype", "use_cache", "_name_or_path", "id2label",
        "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
        POSITIONS, "initializer_range", "attention_dropout", "pretraining_tp",
        "return_dict", "output_hidden_states", "output_attentions", "problem_type",
        "tie_word_embeddings",
    }
)  # fmt: skip
"""Entries of config.json that may differ: they do not change what a weight means. Learned positions
are compared by the shape of their tensor."""


def run_domain(job: Job, ctx: Context) -> dict[str, Any]:
    """Write the problems of a domain; returns what `build_domain` counts."""
    counted = build_domain(job.config, job.runtime, ctx.out, job.data)
    if "constant_score" in counted:
        ctx.warn(
            f"its verifier gives {counted['constant_score']:g} to right and to wrong responses "
            'alike, so it is no reward and no measure; mend it, or set verifier = "none"'
        )
    cache = Path(job.hashes).parent / CACHE
    # As the plan found them.
    facts = dict(job.runtime.get("facts") or {}) | shape_facts(job.runtime.get("asked") or {})
    remember_built(cache, job.config, job.data, facts)
    return counted


def run_model(job: Job, ctx: Context) -> dict[str, Any]:
    """Take in the checkpoint that the job's `runtime` names; returns its number of parameters.

    A GGUF file is converted, everything else linked. Raises ConfigError if the bytes are no longer
    those that the plan has seen.
    """
    if "gguf" in job.runtime:
        path = Path(job.runtime["gguf"])
        if file_digest(path) != job.data["gguf"]:
            raise ConfigError(f"{path}: it changed since this run was planned; run again")
        # Not at the top: it is of no use to a run without such a file.
        from posttrain.backends.gguf_convert import convert

        return {"parameters": convert(path, ctx.out)}
    directory, files = Path(job.runtime["directory"]), job.runtime["files"]
    return link_model(directory, files, job.data["files"], ctx, FileHashes(Path(job.hashes)).digest)


def link_model(
    directory: Path,
    files: Sequence[str],
    sha256: str,
    ctx: Context,
    hash_file: HashFile = file_digest,
) -> dict[str, float]:
    """Link `files` of `directory` into the artifact and check that they load as a model.

    Raises ConfigError if they are no longer the files whose digest `sha256` the plan has seen.
    """
    adapted = is_adapter(directory)
    hashed = hash_without_place(hash_file) if adapted else hash_file
    if files_digest(directory, files, hashed) != sha256:
        raise ConfigError(f"{directory}: its files changed since this run was planned; run again")
    if adapted:
        files = [name for name in files if name != CONFIG]
        place_adapter(directory, files, ctx.inputs["base"], ctx.out)
    for name in files:
        target = ctx.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to((directory / name).resolve())
    language_model = load_merged(load(ctx.inputs["base"]), ctx.out) if adapted else load(ctx.out)
    if language_model.left_out:
        ctx.warn(left_out(directory, language_model))
    if "tokenizer.json" not in files:
        # The plan cannot read the others, and so has not told.
        for warning in language_model.turn_end.warnings:
            ctx.warn(warning)
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    return {"parameters": parameters}


def place_adapter(directory: Path, files: Sequence[str], base: Path, out: Path) -> None:
    """Write what an adapter in a store has otherwise than where it was found: a config that says
    nothing of a place, and the base's tokenizer if it has none. Its record will name the base."""
    (out / CONFIG).write_bytes(canonical_config(read_adapter_config(directory)))
    if not vocabulary_files(files):
        read_tokenizer(base, what="the base of an adapter").save_pretrained(out)


def left_out(directory: Path, language_model: LanguageModel) -> str:
    """What to tell of tensors that the model does not have, such as those that read pictures."""
    names = language_model.left_out
    return (
        f"{directory}: {len(names)} of its tensors, such as {names[0]}, are no part of "
        f"{type(language_model.model).__name__}, which reads and writes text; what is trained from "
        "it is saved as such a model, without them"
    )


def run_merge(settings: Merge, ctx: Context) -> dict[str, float]:
    """Merge the models of the edges `models.NAME`, relative to `base` where `how` has one.

    Configuration, tokenizer and chat template are those of the first model by name; what ends a
    turn for any of them ends one for the result. Raises ConfigError for models
    that differ in architecture, tokens, or names or shapes of their tensors.
    """
    paths = named(ctx.inputs, "models")
    names = sorted(paths)
    with tempfile.TemporaryDirectory(dir=ctx.work) as directory:
        whole = [_whole(paths[name], Path(directory) / name) for name in names]
        sources = {name: Source.read(path) for name, path in zip(names, whole, strict=True)}
        base = None
        if "base" in ctx.inputs:
            base = Source.read(_whole(ctx.inputs["base"], Path(directory) / ".base"))
        return _merge(settings, ctx, paths, sources, base)


def _whole(path: Path, beside: Path) -> Path:
    """A checkpoint of whole weights: itself, or of an adapter one with the adapter in its weights,
    which is written to `beside` in float32."""
    if not is_adapter(path):
        return path
    save(load(path), beside)
    return beside


def _merge(
    settings: Merge,
    ctx: Context,
    paths: Mapping[str, Path],
    sources: Mapping[str, Source],
    base: Source | None,
) -> dict[str, float]:
    """`run_merge` of checkpoints of whole weights; `paths` are what they were made of."""
    names = list(sources)
    untie([source.tensors for source in (*sources.values(), base) if source is not None])
    first = sources[names[0]]
    for name in names[1:]:
        check_alike(ctx.name, names[0], first, name, sources[name])
    warn_of_first(ctx, names[0], [sources[name] for name in names])
    if base is not None:
        check_alike(ctx.name, names[0], first, "base", base)
    tensors = dict(
        merged(
            [sources[name].tensors for name in names],
            [settings.weights.get(name, 1.0) for name in names],
            how=settings.how.kind,
            **settings.how.arguments(),
            base=None if base is None else base.tensors,
            seed=settings.seed,
        )
    )
    with tempfile.TemporaryDirectory(dir=ctx.work) as directory:
        beside = Path(directory)
        for path in first.path.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                (beside / path.name).symlink_to(path.resolve())
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        # Loaded and saved again, the checkpoint is checked, and of the form that all others have.
        del tensors
        language_model = load(beside)
    own = language_model.stop_ids
    more = sorted({i for source in sources.values() for i in source.stop_ids} - set(own))
    if more:
        language_model.model.generation_config.eos_token_id = [*own, *more]
    types: Types | str = settings.save_dtype
    if types == "base":
        types = widest([read_types(paths[name]) for name in names])
    save(language_model, ctx.out, types=types)
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    return {"parameters": parameters, "models": len(names)}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint without its weights in memory."""

    path: Path
    config: dict[str, Any]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    tensors: TensorFiles

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read all but the weights of a Hugging Face directory."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        chat = read_chat(path)
        return cls(
            path=path,
            config=config.to_dict(),
            tokenizer=chat.tokenizer,
            stop_ids=chat.stop_ids,
            tensors=TensorFiles(path, tied=dict(model.all_tied_weights_keys)),
        )


def check_alike(stage: str, one: str, first: Source, two: str, other: Source) -> None:
    """Raise ConfigError unless the weights of both mean the same, number by number."""

    def refuse(what: str, mine: object, theirs: object, advice: str) -> None:
        if mine != theirs:
            raise ConfigError(
                f"stage {stage!r} (merge): {two!r} and {one!r} cannot be merged: {what} is "
                f"{theirs!r} in {two!r} and {mine!r} in {one!r}; {advice}"
            )

    advice = "all models of a merge have one architecture, best from one start"
    # Some scaled positions are computed from the number of all positions.
    scaled = any(
        (s.config.get("rope_parameters") or {}).get("rope_type", "default") != "default"
        for s in (first, other)
    )
    free = FREE - {POSITIONS} if scaled else FREE
    for key in sorted({*first.config, *other.config} - free):
        what = f"{key} of config.json"
        refuse(what, first.config.get(key), other.config.get(key), advice)
    for name in sorted({*first.tensors, *other.tensors}):
        shapes = [s.tensors.shape(name) if name in s.tensors else None for s in (first, other)]
        refuse(f"the shape of tensor {name}", *shapes, advice)
    advice = "all models of a merge have one tokenizer"
    found = tokenizer_difference(first.tokenizer, other.tokenizer)
    if found is not None:
        raise ConfigError(
            f"stage {stage!r} (merge): {two!r} and {one!r} cannot be merged: "
            f"{found.said(f'in {two!r}', f'in {one!r}')}; {advice}"
        )


def warn_of_first(ctx: Context, name: str, sources: Sequence[Source]) -> None:
    """Tell what the result has of the first model alone, where the others differ in it."""
    facts: dict[str, list[Any]] = {
        "chat template": [source.tokenizer.chat_template for source in sources],
        POSITIONS: [source.config.get(POSITIONS) for source in sources],
        "tokenizer": [source.tokenizer.get_vocab() for source in sources],
    }
    for what, values in facts.items():
        if any(value != values[0] for value in values[1:]):
            ctx.warn(
                f"the models differ in their {what}; the merged model has that of {name!r}, the "
                "first by name"
            )
