"""From hidden states to logits and back, a chunk of tokens at a time.

Matrix products want many tokens in a chunk; elementwise passes want few, so that what one pass
writes the next still finds in the cache. So a chunk is projected whole, and what happens to its
logits happens in blocks of rows.

Logits, and the gradients that take their place, have the type of the hidden states, in which the
products are computed. Softmaxes and sums are float32 at least: a block of bfloat16 is widened, and
its gradient rounded where the next product would round it.

Shape suffixes: N flat response tokens of all rows, D hidden size, V vocabulary, C tokens of one
chunk, R tokens of one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_ELEMENTS = 2**26
"""Default bound on tokens * vocabulary of one chunk: 256 MiB of float32."""

_GEMM_TOKENS = 256
"""Fewer tokens multiply slowly, and read and write a head's gradient more often."""
_CHUNK_ELEMENTS = 2**20
"""With a small vocabulary a chunk has more tokens, up to 4 MiB of float32. Both numbers are twice
as large in a type of half the size."""
_HEAD_ROWS = 8192
"""Rows of a head's gradient that are multiplied before they are added to a wider sum."""
_PART_ELEMENTS = 2**18
"""What is widened at a time where a sum has a wider type: 1 MiB of float32."""
_BLOCK_ELEMENTS = 2**18
"""1 MiB of float32: a few such blocks fit the last-level cache, and an elementwise pass over one
is long enough for several threads to share."""
_BLOCK_ROWS = 4
"""Blocks have at least this many rows: threads share a softmax out by rows."""


def token_chunks(
    num_tokens: int, vocabulary: int, max_elements: int, dtype: torch.dtype = torch.float32
) -> Iterator[slice]:
    """Consecutive slices of the tokens that are projected together.

    A slice has `max(256, 2^20 // vocabulary)` tokens (twice as many for a `dtype` of two bytes),
    but at most `max_elements // vocabulary`, and at least one. Raises ValueError if `max_elements`
    is below 1.
    """
    if max_elements < 1:
        raise ValueError(f"max_elements: {max_elements} must be at least 1")
    step = per_four_bytes(dtype) * max(_GEMM_TOKENS, _CHUNK_ELEMENTS // vocabulary)
    step = min(max_elements // vocabulary, step)
    yield from _slices(num_tokens, max(1, step))


def per_four_bytes(dtype: torch.dtype) -> int:
    """How many numbers of this type fit where one of float32 does, one at least."""
    return max(1, 4 // dtype.itemsize)


def row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Consecutive slices of a chunk's rows whose elementwise passes stay in the cache.

    Not on a GPU: launching a kernel costs more there than memory does.
    """
    num_rows, vocabulary = logits_CV.shape
    on_cpu = logits_CV.device.type == "cpu"
    step = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // vocabulary) if on_cpu else max(1, num_rows)
    yield from _slices(num_rows, step)


def _slices(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def chunk_buffer(like_ND: Tensor, vocabulary: int, max_elements: int) -> Tensor:
    """An uninitialised `[C, V]` buffer for the logits of the largest chunk."""
    # The first slice is the longest, and ends at its own length.
    chunks = token_chunks(like_ND.shape[0], vocabulary, max_elements, like_ND.dtype)
    longest = next(chunks, slice(0, 0))
    return like_ND.new_empty(longest.stop, vocabulary)


def block_buffer(logits_CV: Tensor) -> Tensor:
    """An uninitialised `[R, V]` buffer for the largest block of this chunk, in the softmax type."""
    longest = next(row_blocks(logits_CV), slice(0, 0))
    return torch.empty_like(logits_CV[longest], dtype=softmax_dtype(logits_CV))


def softmax_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The type in which softmaxes and sums are computed: at least float32."""
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def project(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> Tensor:
    """Fill `out_CV` with the product `hidden @ head.T` and return it; `finish` makes it logits."""
    # `out` of mm must have the type of its operands; a product of another type is copied.
    if hidden_CD.dtype == out_CV.dtype:
        return torch.mm(hidden_CD, head_VD.T, out=out_CV)
    return out_CV.copy_(hidden_CD @ head_VD.T)


def finish(
    product_RV: Tensor, bias_V: Tensor | None, temperature: float, wide: Tensor | None
) -> Tensor:
    """Logits `(product + bias) / temperature` of a block of rows in the softmax type.

    In place, or in the buffer `wide` (`wide_buffer`), from where `narrow_into` brings back what
    becomes of them.
    """
    z_RV = product_RV if wide is None else wide[: len(product_RV)].copy_(product_RV)
    if bias_V is not None:
        z_RV.add_(bias_V)
    if temperature != 1.0:
        z_RV.div_(temperature)
    return z_RV


def wide_buffer(logits_CV: Tensor) -> Tensor | None:
    """A block buffer where logits have to be widened, None where they have the softmax type."""
    return None if logits_CV.dtype == softmax_dtype(logits_CV) else block_buffer(logits_CV)


def narrow_into(logits_RV: Tensor, z_RV: Tensor) -> None:
    """Round a block that `finish` widened into its place; nothing where it is in its place."""
    if z_RV.dtype != logits_RV.dtype:
        logits_RV.copy_(z_RV)


def add_widened(sum: Tensor, addend: Tensor) -> None:
    """`sum += addend` for an addend of a narrower type, of the same shape.

    torch copies the addend in the type of the sum first. A part at a time, that copy stays in the
    cache.
    """
    rows = max(1, _PART_ELEMENTS // max(1, sum[:1].numel())) if sum.dim() else 1
    for part in _slices(len(sum), rows) if sum.dim() else [...]:
        sum[part] += addend[part]


def check_projection(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> None:
    """Raise ValueError, naming the shapes, unless `hidden @ head.T + bias` is well formed."""
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)} must be [N, D] and head {tuple(head_VD.shape)} [V, D]"
        )
    if bias_V is not None and tuple(bias_V.shape) != (head_VD.shape[0],):
        raise ValueError(
            f"bias {tuple(bias_V.shape)} must have one entry per row of head {tuple(head_VD.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0")


class HeadGradients:
    """Sums the gradients that flow from logits into hidden states, head and bias, chunk by chunk.

    Head and bias gradients are summed in the softmax type, so that many bfloat16 chunks lose
    nothing; one chunk alone needs no wider sum. A token's weight multiplies its hidden state and
    that state's gradient, `[C, D]` each, rather than its logits, `[C, V]`.
    """

    def __init__(
        self, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        """`wanted` says for hidden, head and bias whether its gradient is needed."""
        self._hidden_ND, self._head_VD, self._bias_V = hidden_ND, head_VD, bias_V
        # Not zeroed: together the chunks write all tokens, and the first one writes the head.
        self._grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self._grad_VD = torch.empty_like(head_VD) if wanted[1] else None
        self._grad_V = None
        if bias_V is not None and wanted[2]:
            self._grad_V = torch.zeros_like(bias_V, dtype=softmax_dtype(hidden_ND))
        self._empty = True

    def add(self, chunk: slice, grad_CV: Tensor, scale_C: Tensor) -> None:
        """Add what these tokens' `hidden @ head.T + bias` contributes.

        Its gradient is `scale_C[:, None] * grad_CV`. Chunks must not overlap and must together be
        all tokens.
        """
        scale_C1 = scale_C.to(softmax_dtype(grad_CV))[:, None]
        # The large products run in the type of the hidden states, in which the head is, too.
        grad_like_hidden_CV = grad_CV.to(self._hidden_ND.dtype)
        if self._grad_ND is not None:
            grad_CD = self._grad_ND[chunk]
            torch.mm(grad_like_hidden_CV, self._head_VD, out=grad_CD)
            grad_CD.mul_(scale_C1)
        if self._grad_VD is not None:
            hidden_CD = (self._hidden_ND[chunk] * scale_C1).to(self._hidden_ND.dtype)
            self._grad_VD = self._with_head(self._grad_VD, grad_like_hidden_CV, hidden_CD)
        if self._grad_V is not None:
            if grad_CV.dtype == self._grad_V.dtype:
                self._grad_V.addmv_(grad_CV.T, scale_C1[:, 0])
            else:
                self._grad_V += torch.mv(grad_CV.T, scale_C1[:, 0].to(grad_CV.dtype))
        self._empty = False

    def _with_head(self, grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> Tensor:
        if self._empty:
            # The first chunk writes: zeros would cost a pass over [V, D].
            return torch.mm(grad_CV.T, hidden_CD, out=grad_VD)
        dtype = softmax_dtype(hidden_CD)
        if dtype == hidden_CD.dtype:
            return grad_VD.addmm_(grad_CV.T, hidden_CD)
        grad_VD = grad_VD.to(dtype)
        for rows in _slices(len(grad_VD), _HEAD_ROWS):
            add_widened(grad_VD[rows], grad_CV[:, rows].T @ hidden_CD)
        return grad_VD

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, head and bias in the type of each, None where not wanted."""
        grad_VD = self._grad_VD
        if grad_VD is not None:
            # No chunk, so no token: nothing has been written yet.
            grad_VD = grad_VD.zero_() if self._empty else grad_VD
            grad_VD = grad_VD.to(self._head_VD.dtype)
        grad_V = self._grad_V
        if grad_V is not None and self._bias_V is not None:
            grad_V = grad_V.to(self._bias_V.dtype)
        return self._grad_ND, grad_VD, grad_V
