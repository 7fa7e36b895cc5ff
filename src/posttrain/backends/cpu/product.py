"""Products with a fixed weight, for few rows at a time: what a decode step spends its time on.

For up to some hundred rows the usual matrix product lays the weight out anew in every call. oneDNN
can keep the laid-out form: 4 to 32 rows by 512 x 2752 then took .4 to .7 of the time. Below a few
million multiplications, and for a single row, a plain product in float32 is faster. In bfloat16 the
laid-out form serves every call, so it is the only one that is kept.

Legend: L rows, D inputs, F outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORTH_LAYING_OUT = 3_000_000
"""Multiplications in one product from which the kept form is the faster one."""
ROWS = 16
"""For how many rows the layout is chosen; it serves any number."""


class Product:
    """`input @ weight_FD.T + bias_F` without gradients. Copies the weight once or twice."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        self.bias_F = bias_F
        self.laid_out = _laid_out(weight_FD)
        # In float32 both forms are kept: which is faster depends on the rows of a call.
        self.weight_DF = None
        if self.laid_out is None or weight_FD.dtype == torch.float32:
            self.weight_DF = weight_FD.T.contiguous()

    def __call__(self, input_LD: Tensor) -> Tensor:
        """`[L, F]`."""
        weight_DF = self.weight_DF
        if self.laid_out is not None and (
            weight_DF is None or len(input_LD) * weight_DF.numel() >= WORTH_LAYING_OUT
        ):
            linear: Any = torch.ops.mkldnn._linear_pointwise
            product_LF: Tensor = linear(input_LD, self.laid_out, self.bias_F, "none", [], "")
            return product_LF
        assert weight_DF is not None
        if self.bias_F is None:
            return torch.mm(input_LD, weight_DF)
        return torch.addmm(self.bias_F, input_LD, weight_DF)


def is_bfloat16_on_cpu(tensor: Tensor) -> bool:
    """Whether products of it are the processor's own in bfloat16, through oneDNN."""
    # torch's own compiler asks and uses these; they are not part of its public interface.
    supported: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.bfloat16
        and supported is not None
        and bool(supported())
    )


def _laid_out(weight_FD: Tensor) -> Tensor | None:
    """oneDNN's form of a weight; None where torch has none, or does as well without it."""
    lay_out: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if lay_out is None or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    if not is_bfloat16_on_cpu(weight_FD):
        if weight_FD.device.type != "cpu" or weight_FD.dtype != torch.float32:
            return None
        if ROWS * weight_FD.numel() < WORTH_LAYING_OUT:
            return None
    with torch.inference_mode(False), torch.no_grad():
        laid_out: Tensor = lay_out(weight_FD.detach().clone().contiguous(), ROWS)
    return laid_out
