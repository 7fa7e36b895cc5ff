"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on models that share the weights below.

peft makes and computes the layers. What stands here is how several models have one base. A model is
a tree of modules that hold tensors. `twin` makes a second tree with the very same tensors, which
costs next to nothing, and `attach` puts adapter layers into that tree alone. So a student and N
teachers are N + 1 trees over one base, each with an adapter of its own: nothing is switched on or
off, and they may be read side by side.

A layer computes `W x + scale * B (A x)`. As one matrix that is `W + scale * B A`: `merged_weight`,
a new tensor, in float32 and rounded once. The base is never written to, so there is nothing to undo
after sampling, and not a bit of it changes.

Legend: F outputs, D inputs, R rank.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.backends.base import LoraSettings
from posttrain.backends.outside.adapters import (
    PREFIX,
    WEIGHTS,
    read_adapter_config,
)
from posttrain.engine.errors import ConfigError, choices_text

NAME = "default"
"""What peft calls the one adapter of a model."""
SCORE = "score"
"""The layer of a reward model that learns as a whole, beside the adapter."""
MARK = f".{NAME}"


def peft() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    # peft imports it where it is there, and it warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft as package
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs the package peft ({error}); install it with pip install 'posttrain[lora]'"
        ) from None
    return package


def twin(model: Any, *, keep: tuple[Any, ...] = ()) -> Any:
    """A second tree of modules over the same parameters and buffers; `keep` are modules that both
    trees have. The score layer of a reward model is copied."""
    own = {id(t) for t in model.score.parameters()} if hasattr(model, SCORE) else set()
    shared = [*model.parameters(), *model.buffers(), *keep]
    return copy.deepcopy(model, {id(one): one for one in shared if id(one) not in own})


def is_layer(module: Any) -> bool:
    """Whether a module is a linear layer with an adapter."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, by name."""
    for name, module in model.named_modules():
        if is_layer(module):
            yield name, module


def has_adapter(model: Any) -> bool:
    """Whether a model computes with an adapter beside its weights."""
    return any(True for _ in layers(model))


def attach(model: Any, settings: LoraSettings) -> dict[str, Any]:
    """Put new adapter layers into `model`, in place, and return their adapter_config.json.
    Their numbers are float32.

    A is drawn from the seed of the settings, as peft draws it (Kaiming), and B is 0, so that the
    model computes what it did. All else is frozen, but for the score layer of a reward model.
    Raises ConfigError for `targets` that no layer has.
    """
    scalar = hasattr(model, SCORE)
    config = peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_targets(model, settings.targets),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        # peft fits the form of GPT-2's layers by itself, and says so.
        fan_in_fan_out=_is_turned(model),
    )
    # peft draws from the generator of the process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        _inject(config, model)
    _freeze(model, torch.float32)
    return config_of(config, scalar=scalar)


def attach_saved(model: Any, directory: Path, *, dtype: torch.dtype) -> dict[str, Any]:
    """Put the adapter of a directory into `model`, in place; returns its adapter_config.json.

    For adapters that `is_separable` accepts. Raises ConfigError for tensors that find no place.
    """
    config = peft().LoraConfig.from_pretrained(str(directory))
    # The score layer is there already, in every tree its own.
    config.modules_to_save = None
    _inject(config, model)
    tensors = load_file(directory / WEIGHTS)
    _freeze(model, torch.float32)
    put_in(model, tensors, where=str(directory / WEIGHTS))
    _freeze(model, dtype)
    return config_of(config, scalar=hasattr(model, SCORE))


def _inject(config: Any, model: Any) -> None:
    with _quiet():
        peft().inject_adapter_in_model(config, model, adapter_name=NAME)
    model.eval()


def _freeze(model: Any, dtype: torch.dtype) -> None:
    """Let the adapter alone learn, in numbers of this type."""
    for name, parameter in model.named_parameters():
        learns = _is_own(name)
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.to(dtype)


def _is_own(name: str) -> bool:
    """Whether a parameter of that name is the adapter's, not the base's."""
    return ".lora_" in name or name.startswith(f"{SCORE}.")


def own_parameters(model: Any) -> dict[str, Tensor]:
    """The parameters of the adapter, by name."""
    return {name: p for name, p in model.named_parameters() if _is_own(name)}


class Masters(torch.nn.Module):
    """The parameters of an adapter as they learn, in float32, beside a model that computes with
    them or, in another type, with copies of them."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """Those of `model`, which computes in `dtype` from now on."""
        super().__init__()
        for name, parameter in own_parameters(model).items():
            kept = parameter
            if dtype != torch.float32:
                kept = torch.nn.Parameter(parameter.detach().float())
                parameter.data = parameter.data.to(dtype)
            # Names of parameters have no dots.
            self.register_parameter(name.replace(".", "/"), kept)


def master_name(name: str) -> str:
    """The name in the model of what is called `name` in `Masters`."""
    return name.replace("/", ".")


def _is_turned(model: Any) -> bool:
    """Whether the linear layers hold `weight_DF`, as those of GPT-2 do."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _targets(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The names of the layers that get an adapter; "all-linear" is all but the output layer.

    Raises ConfigError for a name that no linear layer has, and for the output layer, from which the
    losses compute as it is.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    outer = {n for n, module in linear.items() if module is head or n == SCORE}
    known = sorted({name.rpartition(".")[2] for name in set(linear) - outer})
    if targets == ("all-linear",):
        return known
    for target in targets:
        ends = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not ends:
            raise ConfigError(
                f"lora.targets: {target!r} is the name of no linear layer of the model; "
                f"{choices_text(target, known)}; or all-linear"
            )
        if set(ends) & outer:
            raise ConfigError(
                f"lora.targets: {target!r} is the output layer, which stays as it is; leave it out"
            )
    return sorted(targets)


def config_of(config: Any, *, scalar: bool) -> dict[str, Any]:
    """adapter_config.json of a peft config, as JSON data in a fixed order."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        value = sorted(value) if isinstance(value, set | frozenset) else value
        found[name] = getattr(value, "value", value)
    found |= {"inference_mode": True, "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM"}
    return found | {"modules_to_save": [SCORE] if scalar else None}


def same_settings(config: Mapping[str, Any], settings: LoraSettings, model: Any) -> str | None:
    """What an adapter has otherwise than these settings say, in words; None if nothing."""
    theirs = {
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "targets": sorted(_names(config["target_modules"], model)),
        "dora": bool(config.get("use_dora")),
        "rslora": bool(config.get("use_rslora")),
    }
    ours = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": _targets(model, settings.targets),
        "dora": settings.dora,
        "rslora": settings.rslora,
    }
    for name, value in theirs.items():
        if value != ours[name]:
            return f"lora.{name} = {ours[name]} and the start's adapter has {value}"
    for name in ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules"):
        if config.get(name):
            return f"the start's adapter has {name}, which no setting says"
    return None


def _names(targets: Any, model: Any) -> list[str]:
    if targets == "all-linear":
        return _targets(model, ("all-linear",))
    return [targets] if isinstance(targets, str) else list(targets)


# What is saved


def saved_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of an adapter by the names that peft's files have."""
    found = {}
    for name, tensor in tensors.items():
        # As peft: the vector of DoRA is saved without its `.weight`.
        key = name.replace(f"lora_magnitude_vector{MARK}.weight", "lora_magnitude_vector")
        found[PREFIX + key.replace(MARK, "")] = tensor.detach().cpu().contiguous()
    return found


@torch.no_grad()
def put_in(model: Any, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Put saved tensors into the adapter of a model. Raises ConfigError unless they are its own,
    name by name and shape by shape."""
    # Keys of some peft versions have `.weight` behind the vector of DoRA, and some have not.
    given = {key.replace("vector.weight", "vector"): t for key, t in tensors.items()}
    own = own_parameters(model)
    keys = {next(iter(saved_tensors({name: p}))): p for name, p in own.items()}
    # A language model's adapter has no score yet: it begins with zeros.
    keys = {k: p for k, p in keys.items() if k in given or not k.startswith(f"{PREFIX}{SCORE}.")}
    strange = sorted(set(keys) ^ set(given))
    if strange:
        raise ConfigError(
            f"{where}: {strange[0]} is {'missing' if strange[0] in keys else 'of no layer'}; the "
            "adapter is of another model than its base"
        )
    for key, parameter in keys.items():
        if parameter.shape != given[key].shape:
            raise ConfigError(
                f"{where}: {key} has the shape {tuple(given[key].shape)} and the base asks for "
                f"{tuple(parameter.shape)}; the adapter is of another model"
            )
        parameter.copy_(given[key])


def is_separable(directory: Path) -> bool:
    """Whether an adapter can compute beside a base that others have too: nothing but low-rank
    layers, and perhaps a score. One that brings whole modules or biases is merged into a copy."""
    config = read_adapter_config(directory)
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return False
    if set(config.get("modules_to_save") or ()) - {SCORE}:
        return False
    names = str(config.get("target_modules"))
    return not any(part in names for part in ("embed", "lm_head", "wte", "embd"))


# As one matrix


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a layer with its adapter in it, a new tensor of the type of the base's weight.

    `weight_FD`, or `weight_DF` in models like GPT-2.
    """
    weight = layer.get_base_layer().weight
    precise = weight.to(torch.float32, copy=True)
    if NAME in layer.lora_variant:
        merged: Tensor = layer.lora_variant[NAME].merge_safe(layer, NAME, precise)
        # What peft keeps to be able to undo it.
        layer._caches.pop(f"{NAME}-weight_norm", None)
        return merged.to(weight.dtype)
    down_RD, up_FR = layer.lora_A[NAME].weight.float(), layer.lora_B[NAME].weight.float()
    if layer.fan_in_fan_out:
        precise.addmm_(down_RD.T, up_FR.T, alpha=layer.scaling[NAME])
    else:
        precise.addmm_(up_FR, down_RD, alpha=layer.scaling[NAME])
    return precise.to(weight.dtype)


class AsMerged(torch.nn.Module):
    """A layer with an adapter, to who looks at its `weight` a plain one with the merged matrix.

    Made anew at each look, for who copies it anyway: so no merged model stands in memory.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """See `merged_weight`."""
        return merged_weight(self.layer)

    @property
    def bias(self) -> Tensor | None:
        """That of the base, which an adapter leaves as it is."""
        bias: Tensor | None = self.layer.get_base_layer().bias
        return bias

    def forward(self, input: Tensor) -> Tensor:
        """What the layer computes with its adapter beside the weight."""
        output: Tensor = self.layer(input)
        return output


def seen_merged(model: Any) -> Any:
    """A twin of a model in which the layers with an adapter are `AsMerged`; follows the model."""
    found = dict(layers(model))
    view = twin(model, keep=tuple(found.values()))
    for name, layer in found.items():
        view.set_submodule(name, AsMerged(layer))
    return view


def merged_twin(model: Any) -> Any:
    """A twin of a model with plain layers that hold the merged weights of this moment."""
    found = dict(layers(model))
    other = twin(model, keep=tuple(found.values()))
    for name, layer in found.items():
        plain = copy.copy(layer.get_base_layer())
        plain._parameters = dict(plain._parameters)
        plain.weight = torch.nn.Parameter(merged_weight(layer), requires_grad=False)
        other.set_submodule(name, plain)
    return other


def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a model would have without adapter layers, by name: those of the base,
    and new tensors where an adapter is."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            yield name, parameter.detach()
            continue
        path, _, rest = name.partition(".base_layer.")
        merged = rest == "weight"
        yield f"{path}.{rest}", merged_weight(model.get_submodule(path)) if merged else parameter


def merged_whole(model: Any, directory: Path) -> Any:
    """`model`, which nobody else has, with the adapter of a directory in its weights.

    By peft itself, for adapters that bring more than low-rank layers as well.
    """
    config = read_adapter_config(directory)
    if not config.get("ensure_weight_tying"):
        _untie(model, config)
    with _quiet():
        made = peft().PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    # Not merged in low precision twice: peft adds in the type of the weight, rounding once.
    return made.merge_and_unload().eval().requires_grad_(True)


def _untie(model: Any, config: Mapping[str, Any]) -> None:
    """Give the output layer weights of its own where the adapter changes those of the embedding
    alone, as it did while it was trained."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    changed = str(config.get("target_modules")), str(config.get("modules_to_save"))
    if any(part in text for part in ("embed", "wte") for text in changed):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


@contextmanager
def _quiet() -> Iterator[None]:
    """peft warns of what transformers is to drop one day, and of entries that are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
