"""From a GGUF file to a Hugging Face directory: blocks become numbers, once.

transformers does the work. Weights of blocks (Q4_K, Q8_0, ...) are saved in bfloat16: a block of 32
weights shares a scale, and its numbers have two to eight bits. Weights that are plain numbers keep
their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from posttrain.backends.checkpoint import load
from posttrain.backends.memory import is_out_of_memory
from posttrain.backends.outside.gguf import check_packages, read_head
from posttrain.backends.outside.headers import TensorHeader
from posttrain.engine.errors import ConfigError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(path: Path, out: Path) -> int:
    """Write the model and the tokenizer of the file `path` into the directory `out`.

    Returns the number of parameters. Raises ConfigError for a file that transformers cannot make a
    model of.
    """
    check_packages(path)
    head = read_head(path)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=saved_type(head.tensors),
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    # What a file can be wrong in shows as any error of the libraries that read it.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{path}: transformers makes no model of it ({type(error).__name__}: {error}); name "
            "the safetensors checkpoint that it was made from"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = sorted(told["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} tensors of the model are not in it, such as {missing[0]}, and "
            "would start at random; fetch the file again"
        )
    # What the file calls the model means nothing to who reads the config, and would keep it from
    # being merged with its like.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(parameter.numel() for parameter in load(out).model.parameters())


def saved_type(tensors: Mapping[str, TensorHeader]) -> torch.dtype:
    """The type of the saved weights: that of the file's matrices where all are plain numbers, else
    bfloat16."""
    types = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    return PLAIN.get(types.pop(), torch.bfloat16) if len(types) == 1 else torch.bfloat16
