"""Products with a fixed weight, for few rows at a time: what a decode step spends its time on.

For up to some hundred rows the usual matrix product lays the weight out anew in every call. oneDNN
can keep the laid-out form: 4 to 32 rows by 512 x 2752 then took .4 to .7 of the time. Below a few
million multiplications, and for a single row, a plain product is faster.

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
        # Both forms are kept: which is faster depends on the rows of a call.
        self.weight_DF = weight_FD.T.contiguous()
        self.laid_out = _laid_out(weight_FD)

    def __call__(self, input_LD: Tensor) -> Tensor:
        """`[L, F]`."""
        if self.laid_out is not None and len(input_LD) * self.weight_DF.numel() >= WORTH_LAYING_OUT:
            linear: Any = torch.ops.mkldnn._linear_pointwise
            product_LF: Tensor = linear(input_LD, self.laid_out, self.bias_F, "none", [], "")
            return product_LF
        if self.bias_F is None:
            return torch.mm(input_LD, self.weight_DF)
        return torch.addmm(self.bias_F, input_LD, self.weight_DF)


def _laid_out(weight_FD: Tensor) -> Tensor | None:
    """oneDNN's form of a weight; None where torch has none, or does as well without it."""
    if weight_FD.device.type != "cpu" or weight_FD.dtype != torch.float32:
        return None
    # torch's own compiler uses these; they are not part of its public interface.
    lay_out: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if lay_out is None or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    if ROWS * weight_FD.numel() < WORTH_LAYING_OUT:
        return None
    with torch.inference_mode(False), torch.no_grad():
        laid_out: Tensor = lay_out(weight_FD.detach().clone().contiguous(), ROWS)
    return laid_out
