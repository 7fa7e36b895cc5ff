"""Where stages compute, and what the hardware there can do.

Imports no transformers: the command line asks before any stage begins.
"""

from __future__ import annotations

from typing import Literal

import torch

from posttrain.engine.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]

BFLOAT16_CAPABILITY = (8, 0)
"""CUDA compute capability from which bfloat16 is computed by the hardware: Ampere."""


def choose_device(wanted: Device, *, compile: bool = False) -> torch.device:
    """The device that is meant; `auto` is CUDA where torch sees one, else the CPU.

    Raises ConfigError for `cuda` where torch sees none, and for `compile` on the CPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu, or "
            "install a torch with CUDA and a driver (`python -c 'import torch; "
            "print(torch.cuda.is_available())'` must say True)"
        )
    on_cuda = wanted != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    if compile and device.type == "cpu":
        reason = "" if wanted == "cpu" else f" (--device {wanted}: torch sees no CUDA device)"
        raise ConfigError(
            f"--compile: the stages would compute on the CPU{reason}, where compiled steps were "
            "measured slower than plain ones; leave it out, or use --device cuda"
        )
    return device


def device_name(device: torch.device) -> str:
    """For people and records: `cpu`, or `cuda` with the name of the card."""
    return "cpu" if device.type == "cpu" else f"cuda ({torch.cuda.get_device_name(device)})"


def check_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError for bfloat16 where the hardware has no instructions for it."""
    if dtype != torch.bfloat16 or has_bfloat16(device):
        return
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{device_name(device)} has compute capability {major}.{minor} and 8.0 is needed"
    else:
        found = "this CPU has neither AVX512_BF16 nor AMX"
    raise ConfigError(
        f'precision = "bfloat16": {found}; it would be slower than float32. Use '
        'precision = "float32", or other hardware'
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 numbers itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    # torch has no public question for it.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
