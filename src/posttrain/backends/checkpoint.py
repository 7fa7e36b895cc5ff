"""Hugging Face directories in and out: the only form in which a model is kept.

`save` writes what `AutoModelForCausalLM.from_pretrained` and inference servers read as it is:
config, safetensors, tokenizer, generation config. Never pickle, never remote code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from posttrain.backends import lora
from posttrain.backends.architecture import check_plain, path_of
from posttrain.backends.base import Head
from posttrain.backends.chat import Chat
from posttrain.backends.memory import is_out_of_memory
from posttrain.backends.outside.adapters import (
    BASE,
    CONFIG,
    WEIGHTS,
    base_of,
    base_pointer,
    canonical_config,
    is_adapter,
    read_adapter_config,
)
from posttrain.backends.outside.files import vocabulary_files
from posttrain.backends.outside.positions import positions_of, text_config
from posttrain.backends.saved_types import Types, read_types, recast
from posttrain.backends.turn_end import TurnEnd, turn_end
from posttrain.backends.vocabulary import TokenIds, drawable
from posttrain.engine.errors import ConfigError

PROBED = 16
"""Tokens that a tokenizer is asked for to see that it has any."""
NEVER = -1e9
"""The bias of an id without a token. Its probability is exactly 0, and finite: 0 times an infinite
logarithm would be no number."""
SCALAR = "ForSequenceClassification"
"""How the class of a model with a score in place of logits is called."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter that a model computes with."""

    config: Mapping[str, Any]
    """Content of adapter_config.json."""
    base: Path
    """The checkpoint whose weights it stands beside."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model and its tokenizer; see `scalar.py` for one with a score."""

    model: Any
    """A transformers causal LM."""
    tokenizer: Any
    """A transformers tokenizer."""
    types: Types = field(default_factory=dict)
    """The types of its tensors in the files it was loaded from, by name."""
    left_out: tuple[str, ...] = ()
    """Tensors in these files that are no part of the model, such as those that read pictures."""
    adapter: Adapter | None = None
    """What learns, or has learned, beside weights that others have too; see `lora.py`."""
    below: Any = None
    """The frozen weights that it shares with others (`shared.Frozen`); None where all are its
    own."""

    @property
    def ids(self) -> TokenIds:
        """The token ids that the model may say. Raises ConfigError where there is none."""
        # A model with a score has no output layer; it reads what a policy writes.
        layer = self.model.get_output_embeddings() or self.model.get_input_embeddings()
        return drawable(token_ids(self.tokenizer), int(layer.weight.shape[0]))

    @property
    def turn_end(self) -> TurnEnd:
        """What ends a response; without ids where nothing would ever stop."""
        return turn_end_of(
            self.tokenizer, self.model.generation_config, self.model.config, self.ids
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response; the first is the one that is learned. Raises ConfigError
        where there is none."""
        return stops(self.turn_end, self.model.config.name_or_path or "model")

    @property
    def pad_id(self) -> int:
        """The id that fills rows; any id serves, since padding is never attended to."""
        return padding(self.tokenizer, self.ids, self.stop_ids)


def token_ids(tokenizer: Any) -> set[int]:
    """The ids that a tokenizer has a token for."""
    return set(tokenizer.get_vocab().values())


def turn_end_of(tokenizer: Any, generation: Any, config: Any, ids: TokenIds) -> TurnEnd:
    """What ends a turn by a tokenizer, its chat template, a generation config and a config."""
    added = dict(tokenizer.get_added_vocab())
    if tokenizer.eos_token is not None and tokenizer.eos_token_id is not None:
        added[str(tokenizer.eos_token)] = tokenizer.eos_token_id

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))

    return turn_end(
        eos=tokenizer.eos_token_id,
        generation=generation.eos_token_id,
        config=getattr(text_config(config), "eos_token_id", None),
        added=added,
        usable=ids.__contains__,
        render=None if tokenizer.chat_template is None else render,
    )


def stops(end: TurnEnd, where: str) -> tuple[int, ...]:
    """The ids that end a turn. Raises ConfigError where there is none."""
    if not end.ids:
        raise ConfigError(
            f"{where}: nothing would ever end a response: neither generation_config.json nor the "
            "tokenizer names an end-of-sequence token that the model has, and its chat template "
            "writes none after an assistant message; set eos_token_id in generation_config.json"
        )
    return end.ids


def padding(tokenizer: Any, ids: TokenIds, stop_ids: Sequence[int]) -> int:
    """The tokenizer's padding where the model has a row for it, else a stop token."""
    pad: int | None = tokenizer.pad_token_id
    return stop_ids[0] if pad is None or pad not in ids else pad


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a Hugging Face directory onto a device; an adapter is merged into its base.

    Raises ConfigError for a checkpoint that is not a causal LM, that lacks weights or has damaged
    ones, whose logits are not a plain linear map of the last hidden state (the losses work from
    hidden states and head), or which `check_plain` refuses.
    """
    path, what = Path(path), "a causal language model"
    if is_adapter(path):
        return load_merged(load(checked_base(path, scalar=False), dtype=dtype, device=device), path)
    config = read_config(path, what=what)
    if is_scalar(config):
        raise ConfigError(
            f"{path}: this is a reward model ({config.architectures[0]}): it scores responses "
            "and writes none; name a language model here"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(text_config(config), name, None)
        if value not in (None, 1, 1.0):
            raise ConfigError(
                f"{path}/config.json: {name} = {value}: models that change their "
                "logits after the output projection are not supported; choose a model without it"
            )
    read = read_weights(AutoModelForCausalLM, path, dtype=dtype, what=what)
    model = read.model
    if path_of(model) == "plain":
        check_plain(model, str(path))
    _allow_saving(model.generation_config, path)
    return replace(read, model=model.to(device))


def checked_base(path: Path, *, scalar: bool) -> Path:
    """The base of an adapter. Raises ConfigError for an adapter of a reward model where a language
    model is wanted, and as `base_of`."""
    if not scalar and read_adapter_config(path).get("task_type") == "SEQ_CLS":
        raise ConfigError(
            f"{path}: this is the adapter of a reward model: it scores responses and writes none; "
            "name a language model here"
        )
    return base_of(path)


def load_merged(base: LanguageModel, path: Path) -> LanguageModel:
    """`base`, which nobody else has, with the adapter of a directory in its weights and with its
    tokenizer. Raises ConfigError for an adapter that does not fit."""
    with _readable(path, "an adapter"):
        model = lora.merged_whole(base.model, path)
    return replace(base, model=model, tokenizer=read_tokenizer(path, what="an adapter"))


def read_config(path: Path, *, what: str) -> Any:
    """The config of a checkpoint that is to be `what`, of an adapter that of its base. Raises
    ConfigError where there is none."""
    if is_adapter(path):
        return read_config(base_of(path), what=what)
    with _readable(path, what):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def read_weights(auto: Any, path: Path, *, dtype: torch.dtype, what: str) -> LanguageModel:
    """A model, `what` transformers' class `auto` makes of it, and its tokenizer.

    Raises ConfigError for files that cannot be read and for weights that are not there.
    """
    _without_bars()
    with _readable(path, what):
        model, loading = auto.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    tokenizer = read_tokenizer(path, what=what)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(
            f"{path}: its weight files lack {len(missing)} of the tensors that config.json asks "
            f"for, such as {missing[0]}; they would start at random. Complete the checkpoint, or "
            "mend config.json"
        )
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        types=read_types(path),
        left_out=tuple(sorted(loading["unexpected_keys"])),
    )


def read_tokenizer(path: Path, *, what: str) -> Any:
    """The tokenizer of a checkpoint that is to be `what`.

    Raises ConfigError where there is none, and for one without tokens: of some classes transformers
    makes an empty one where their file is missing, to which every text is unknown. An adapter
    without one has that of its base.
    """
    if is_adapter(path) and not vocabulary_files(p.name for p in path.iterdir()):
        return read_tokenizer(base_of(path), what=what)
    with _readable(path, what):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        special = set(tokenizer.all_special_ids)
        ids = sorted(set(tokenizer.get_vocab().values()) - special)
        probe = ids[:: max(1, len(ids) // PROBED)]
        texts = [str(tokenizer.decode([i])) for i in probe]
        read = [
            set(tokenizer.encode(text, add_special_tokens=False)) - {tokenizer.unk_token_id}
            for text in texts
            if text.strip()
        ]
    if not any(read):
        there = ", ".join(vocabulary_files(sorted(p.name for p in path.iterdir()))) or "none"
        raise ConfigError(
            f"{path}: transformers makes a {type(tokenizer).__name__} of its tokenizer files "
            f"({there}) that knows {len(ids)} tokens besides the special ones and reads none of "
            "them; put the vocabulary that this class needs beside the weights, or mend "
            "tokenizer_class in tokenizer_config.json"
        )
    return tokenizer


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises over a directory's files into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    # The files are a stranger's: there is nothing that could not be raised over them.
    except Exception as error:
        if is_out_of_memory(error):
            # Nothing is wrong with the files.
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        named = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        raise ConfigError(
            f"{path}: transformers cannot load this checkpoint as {what} "
            f"({named}{lines[0]}); it must be a directory with config.json, model.safetensors and "
            f"tokenizer files (tokens: {', '.join(vocabulary_files(names)) or 'no file'})"
        ) from error


def is_scalar(config: Any) -> bool:
    """Whether a checkpoint's config says that it is a reward model."""
    names = config.architectures if isinstance(config.architectures, list) else []
    return any(isinstance(name, str) and name.endswith(SCALAR) for name in names)


def _allow_saving(generation_config: Any, path: Path) -> None:
    """Refuse before training what `save_pretrained` would refuse after it.

    Many published checkpoints give a temperature without `do_sample`; they mean to sample.
    """
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"{path}/generation_config.json: transformers would not save it again: "
            f"{' '.join(str(error).split())}"
        ) from error


def save(language_model: LanguageModel, out: Path, *, types: Types | str | None = None) -> None:
    """Write model, tokenizer and generation config to `out` (created if missing).

    The weights are of the types they have in memory, or of `types`: one for all, or one for each
    tensor. config.json ties the output layer to the embedding where they are one, and the
    generation config names all that ends a turn, so that servers do as posttrain does.
    """
    out.mkdir(parents=True, exist_ok=True)
    name_ends(language_model.model.generation_config, language_model.turn_end)
    _without_bars()
    tell_ties(language_model.model)
    language_model.model.save_pretrained(out, safe_serialization=True)
    language_model.tokenizer.save_pretrained(out)
    if types:
        recast(out, types)


def save_adapter(
    language_model: LanguageModel,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    types: Types | str | None = None,
) -> None:
    """Write an adapter to `out` (created if missing): peft's two files, the tokenizer, and which
    artifact is the base. `tensors` are its parameters by name.

    Of the type they have in memory, or of `types`. Of a base outside of a store
    adapter_config.json says the path.
    """
    adapter = language_model.adapter
    assert adapter is not None, "a model without an adapter"
    out.mkdir(parents=True, exist_ok=True)
    saved = lora.saved_tensors(tensors)
    for name, tensor in saved.items():
        dtype = types if isinstance(types, str) else (types or {}).get(name)
        saved[name] = tensor if dtype is None else tensor.to(getattr(torch, dtype))
    save_file(saved, out / WEIGHTS, metadata={"format": "pt"})
    pointer = base_pointer(adapter.base)
    if pointer is None:
        named = {**adapter.config, "base_model_name_or_path": str(adapter.base.absolute())}
        (out / CONFIG).write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")
    else:
        (out / CONFIG).write_bytes(canonical_config(adapter.config))
        write_pointer(pointer, out)
    language_model.tokenizer.save_pretrained(out)


def write_pointer(pointer: Mapping[str, str], out: Path) -> None:
    """Write `adapter_base.json`; see `base_pointer`."""
    (out / BASE).write_text(json.dumps(pointer, indent=1, sort_keys=True) + "\n")


def tell_ties(model: Any) -> None:
    """Let the config say that output layer and embedding are two where they are.

    transformers goes by the bytes: a file with two different ones is not tied whatever its config
    says. Servers go by the config.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    for config in (model.config, text_config(model.config)):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def name_ends(generation: Any, end: TurnEnd) -> None:
    """Let a generation config stop at all that ends a turn; as it is where it does already."""
    named = generation.eos_token_id
    named = set(named) if isinstance(named, list | tuple) else {named}
    if set(end.ids) - named:
        generation.eos_token_id = list(end.ids) if len(end.ids) > 1 else end.ids[0]


def _without_bars() -> None:
    """Loading and saving are quick and show no bars. The semaphore of a bar, moreover, is told as
    leaked where a stage is stopped."""
    messages: Any = transformers_logging
    messages.disable_progress_bar()


def chat_of(language_model: LanguageModel) -> Chat:
    """Text to tokens of this model, and back. Raises ConfigError without a stop token."""
    model = language_model.model
    return _chat(
        language_model.tokenizer,
        language_model.ids,
        generation=model.generation_config,
        config=model.config,
        where=model.config.name_or_path or "model",
    )


def read_chat(path: str | Path) -> Chat:
    """Text to tokens of a checkpoint, and back, without its weights. Raises ConfigError for files
    that cannot be read, and without a stop token."""
    path, what = Path(path), "a language model"
    config = read_config(path, what=what)
    tokenizer = read_tokenizer(path, what=what)
    while is_adapter(path):
        path = base_of(path)
    generation = (
        GenerationConfig.from_pretrained(path)
        if (path / "generation_config.json").exists()
        else GenerationConfig.from_model_config(config)
    )
    known = token_ids(tokenizer)
    ids = drawable(known, int(getattr(text_config(config), "vocab_size", max(known) + 1)))
    return _chat(tokenizer, ids, generation=generation, config=config, where=str(path))


def _chat(tokenizer: Any, ids: TokenIds, *, generation: Any, config: Any, where: str) -> Chat:
    stop_ids = stops(turn_end_of(tokenizer, generation, config, ids), where)
    return Chat(
        tokenizer,
        stop_ids=stop_ids,
        pad_id=padding(tokenizer, ids, stop_ids),
        ids=ids,
        max_positions=positions_of(config),
    )


def has_score(model: Any) -> bool:
    """Whether a model gives one number per position in place of logits; see `scalar.py`."""
    return hasattr(model, "score")


def output_head(model: Any, ids: TokenIds) -> Head:
    """The output projection of a causal LM, shared with the embedding where the model ties them,
    for the ids that may be drawn: rows beyond them are cut off, rows between them are never likely.

    Where nothing is cut it is the model's own tensor. A cut one is a view that is part of one
    backward pass; make another for the next. Of a model with a score the head is that, of one row.
    """
    if has_score(model):
        return Head(weight_VD=model.score.weight, bias_V=getattr(model.score, "bias", None))
    layer = model.get_output_embeddings()
    return drawn_head(layer.weight, getattr(layer, "bias", None), ids)


def drawn_head(weight_VD: Tensor, bias_V: Tensor | None, ids: TokenIds) -> Head:
    """An output layer for the ids that may be drawn; see `output_head`."""
    if ids.size < len(weight_VD):
        weight_VD = weight_VD[: ids.size]
        bias_V = None if bias_V is None else bias_V[: ids.size]
    if ids.holes:
        never_V = weight_VD.new_zeros(ids.size)
        never_V[sorted(ids.holes)] = NEVER
        bias_V = never_V if bias_V is None else bias_V + never_V
    return Head(weight_VD=weight_VD, bias_V=bias_V)
