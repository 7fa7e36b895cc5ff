"""How fast this machine is at models of one shape: a layer, an output layer and AdamW, in torch.

Everything that is slow here is slow in a stage: matrix products of these shapes and of this type,
memory, and the calls of small operations. A layer is measured at few and at many tokens, which
tells what a pass costs anyway from what a token costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.estimate.rates import Rates, Setting

FEW, MANY = 128, 1024
"""Tokens of the two passes that are measured."""
ROW = 64
"""Tokens of a row in them."""
FEW_ROWS, MANY_ROWS = 4, 64
"""Rows that are sampled at once in the two steps that are measured."""
SHORT, LONG = 64, 512
"""Positions of a row in the cache of these."""
MOST_MULTIPLIED = 2e11
"""Multiplications of a pass; a larger layer is measured with fewer tokens."""
MEASUREMENTS = 14
"""How many make the rates of a setting."""
REPETITIONS = 5


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    scale: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.qkv, self.out, self.gate_up, self.down, self.scale]


def measure(setting: Setting, *, seconds: float) -> Rates:
    """The rates of a setting, in about so many seconds; a large model takes what one repetition of
    everything takes. The number of threads is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        return _Measurement(setting, seconds / MEASUREMENTS).rates()
    finally:
        torch.set_num_threads(before)


class _Measurement:
    def __init__(self, setting: Setting, seconds: float) -> None:
        self.seconds = seconds
        self.s, self.device = setting, torch.device(setting.device)
        self.dtype = getattr(torch, setting.precision)
        s = setting
        self.queries, self.keys = s.heads * s.head_width, s.key_heads * s.head_width
        self.layer = _Layer(
            qkv=self._weight(self.queries + 2 * self.keys, s.hidden),
            out=self._weight(s.hidden, self.queries),
            gate_up=self._weight(2 * s.inner, s.hidden),
            down=self._weight(s.hidden, s.inner),
            scale=torch.ones(s.hidden, dtype=self.dtype, device=self.device, requires_grad=True),
        )
        self.head = self._weight(s.vocabulary, s.hidden)
        numbers = sum(weight.numel() for weight in self.layer.tensors)
        self.many = max(2 * FEW, min(MANY, int(MOST_MULTIPLIED / (6 * numbers)) // FEW * FEW))

    def rates(self) -> Rates:
        """All of them."""
        learn = self._line(self._learn, FEW, self.many)
        score = self._line(self._score, FEW, self.many)
        draw = self._line(self._draw, FEW_ROWS, MANY_ROWS)
        few, many, long = (
            self._time(partial(self._decode, rows, positions))
            for rows, positions in ((FEW_ROWS, SHORT), (MANY_ROWS, SHORT), (MANY_ROWS, LONG))
        )
        decode, longer = _line(FEW_ROWS, few, MANY_ROWS, many), long - many
        position = max(0.0, longer / (MANY_ROWS * (LONG - SHORT)))
        return Rates(
            learn_fixed=learn[0],
            learn_token=learn[1],
            score_fixed=score[0],
            score_token=score[1],
            decode_fixed=decode[0],
            decode_row=max(0.0, decode[1] - position * SHORT),
            decode_position=position,
            head_learn=self._time(self._head_learn) / FEW,
            head_pair=self._time(self._head_pair) / FEW,
            head_score=self._time(self._head_score) / FEW,
            draw_fixed=draw[0],
            draw_row=draw[1],
            adam=self._adam(),
            operation=self._time(self._small) / 100,
        )

    # -- what is measured ------------------------------------------------------------------------

    def _learn(self, tokens: int) -> None:
        hidden_BTD = self._states(tokens).requires_grad_()
        self._pass(hidden_BTD).sum().backward()
        for weight in self.layer.tensors:
            weight.grad = None

    @torch.no_grad()
    def _score(self, tokens: int) -> None:
        self._pass(self._states(tokens))

    def _pass(self, hidden_BTD: Tensor) -> Tensor:
        """A layer of a decoder: attention and a gated MLP, each after a norm."""
        width = self.s.head_width
        normed = self._normalised(hidden_BTD)
        query, key, value = functional.linear(normed, self.layer.qkv).split(
            [self.queries, self.keys, self.keys], dim=-1
        )
        query, key, value = (
            x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key, value)
        )
        query, key = (torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1) + x
                      for x in (query, key))  # fmt: skip
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.keys != self.queries
        )
        inner = attended.transpose(1, 2).flatten(2)
        hidden_BTD = hidden_BTD + functional.linear(inner, self.layer.out)
        gate, up = functional.linear(self._normalised(hidden_BTD), self.layer.gate_up).chunk(2, -1)
        return hidden_BTD + functional.linear(functional.silu(gate) * up, self.layer.down)

    def _normalised(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        size = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (wide * size).to(self.dtype) * self.layer.scale

    @torch.inference_mode()
    def _decode(self, rows: int, positions: int) -> None:
        width = self.s.head_width
        hidden_LD = torch.zeros(rows, self.s.hidden, dtype=self.dtype, device=self.device)
        cache = self._cache(rows, positions)
        qkv = functional.linear(self._normalised(hidden_LD), self.layer.qkv)
        query_LHGC = qkv[:, : self.queries].view(rows, self.s.key_heads, -1, width)
        weight = torch.softmax(torch.matmul(query_LHGC, cache.transpose(2, 3)), dim=-1)
        attended = torch.matmul(weight, cache).flatten(1)
        hidden_LD = hidden_LD + functional.linear(attended, self.layer.out)
        gate, up = functional.linear(self._normalised(hidden_LD), self.layer.gate_up).chunk(2, -1)
        functional.linear(functional.silu(gate) * up, self.layer.down)

    def _cache(self, rows: int, positions: int) -> Tensor:
        key = (rows, positions)
        if getattr(self, "_kept", (None, None))[0] != key:
            shape = (rows, self.s.key_heads, positions, self.s.head_width)
            self._kept = key, torch.ones(shape, dtype=self.dtype, device=self.device)
        return self._kept[1]

    @torch.inference_mode()
    def _draw(self, rows: int) -> None:
        hidden_LD = torch.zeros(rows, self.s.hidden, dtype=self.dtype, device=self.device)
        logits_LV = functional.linear(hidden_LD, self.head).float()
        logp_LV = torch.log_softmax(logits_LV, dim=-1)
        logp_LV.double().exp_().cumsum_(dim=-1)

    def _head_learn(self) -> None:
        hidden_ND = self._states(FEW).flatten(0, 1).requires_grad_()
        logits = functional.linear(hidden_ND, self.head).float()
        functional.cross_entropy(logits, torch.zeros(FEW, dtype=torch.int64, device=self.device)
                                 ).backward()  # fmt: skip
        self.head.grad = None

    def _head_pair(self) -> None:
        hidden_ND = self._states(FEW).flatten(0, 1).requires_grad_()
        logp = torch.log_softmax(functional.linear(hidden_ND, self.head).float(), dim=-1)
        with torch.no_grad():
            other = torch.log_softmax(functional.linear(hidden_ND, self.head).float(), dim=-1)
        (logp.exp() * (logp - other)).sum().backward()
        self.head.grad = None

    @torch.no_grad()
    def _head_score(self) -> None:
        hidden_ND = self._states(FEW).flatten(0, 1)
        torch.logsumexp(functional.linear(hidden_ND, self.head).float(), dim=-1)

    def _adam(self) -> float:
        weights = [weight.detach().float().clone() for weight in self.layer.tensors]
        for weight in weights:
            weight.requires_grad_().grad = torch.zeros_like(weight)
        optimizer: Any = torch.optim.AdamW(weights, fused=True)
        return self._time(optimizer.step) / sum(weight.numel() for weight in weights)

    def _small(self) -> None:
        number = torch.zeros(1, device=self.device)
        for _ in range(100):
            number = number + 1.0

    # -- how -------------------------------------------------------------------------------------

    def _weight(self, rows: int, columns: int) -> Tensor:
        weight = torch.full((rows, columns), 1e-3, dtype=self.dtype, device=self.device)
        return weight.requires_grad_()

    def _states(self, tokens: int) -> Tensor:
        shape = (tokens // ROW, ROW, self.s.hidden)
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def _line(self, run: Callable[[int], None], few: int, many: int) -> tuple[float, float]:
        return _line(few, self._time(lambda: run(few)), many, self._time(lambda: run(many)))

    def _time(self, run: Callable[[], Any]) -> float:
        """The least time of some repetitions, after one that warms up where there is time."""
        found: list[float] = []
        began = time.monotonic()
        while len(found) <= REPETITIONS and (not found or time.monotonic() - began < self.seconds):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - start)
        return min(found)


def _line(few: float, at_few: float, many: float, at_many: float) -> tuple[float, float]:
    """What it takes anyway, and for each unit. Never less than nothing."""
    each = max(0.0, (at_many - at_few) / (many - few))
    return max(0.0, at_few - each * few), each
