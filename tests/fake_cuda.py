"""A CUDA device that is only pretended: tensors say that they are there, and are not.

All is computed on the CPU, so no GPU is needed and numbers can be compared. What is found out is
whether every tensor is where it has to be: an operation on tensors of two places fails as it would
on a real device. Kernels, memory and speed are not tested; nor is what happens inside a backward
pass, where autograd keeps to the places of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda")
MARK = "_pretended_on_cuda"
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
MOVES = (Tensor.copy_, Tensor.__deepcopy__, torch._has_compatible_shallow_copy_type)


def is_there(value: Any) -> bool:
    """Whether a tensor pretends to be on CUDA."""
    return getattr(value, MARK, False)


class FakeCuda(TorchFunctionMode):
    """While it is entered, the device "cuda" can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        """Tensors that were sent there."""
        self.linear: set[torch.dtype] = set()
        """Types in which linear layers computed there."""

    def __enter__(self) -> FakeCuda:
        # The one way to make a tensor of another that no mode can see.
        self._deepcopy = Parameter.__deepcopy__

        def deepcopy(parameter: Parameter, memo: Any) -> Parameter:
            copied = self._deepcopy(parameter, memo)
            self._mark(copied, is_there(parameter))
            return copied

        Parameter.__deepcopy__ = deepcopy  # type: ignore[method-assign]
        self._memory = torch.cuda.mem_get_info
        # Of a card of 16 GiB, all of it free.
        torch.cuda.mem_get_info = lambda device=None: (2**34, 2**34)
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        Parameter.__deepcopy__ = self._deepcopy  # type: ignore[method-assign]
        torch.cuda.mem_get_info = self._memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        place = getattr(func, "__self__", None)
        name = getattr(func, "__name__", "")
        if name == "__get__" and place is Tensor.device:  # type: ignore[comparison-overlap]
            return CUDA if is_there(args[0]) else func(*args)
        if name == "__set__":
            func(*args)
            if place is Tensor.data:  # type: ignore[comparison-overlap]
                self._mark(args[0], is_there(args[1]))
            return None
        if func is Tensor.cpu:
            return args[0].clone() if is_there(args[0]) else args[0]
        if func is Tensor.__iter__:
            return self._iterate(args[0])
        wanted = _device_of(args, kwargs)
        there = self._place(func, args, kwargs) if wanted is None else wanted == "cuda"
        if wanted == "cuda":
            self.moved += func is Tensor.to and not is_there(args[0])
            args = tree_map(_on_cpu, args)
            kwargs = {key: _on_cpu(value) for key, value in kwargs.items()}
        if func is Tensor.to and wanted is not None and is_there(args[0]) != there:
            kwargs["copy"] = True
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._mark(leaf, there)
        # GPT-2 calls the second one by name.
        if there and func in (torch.nn.functional.linear, torch.addmm):
            self.linear.add(result.dtype)
        return result

    def _place(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Where the result of an operation is; fails where its operands are in two places."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in MOVES:
            return is_there(args[0])
        if func in INDEXING:
            owner, index, *value = args
            if not is_there(owner):
                tensors = [owner, *(t for t in tree_leaves(index) if isinstance(t, Tensor)), *value]
            else:
                tensors = [owner, *value]  # CUDA tensors take indices of either place
            tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        # Numbers from the CPU, tensors without an axis, mix with anything.
        places = {is_there(tensor) for tensor in tensors if tensor.dim() > 0 or is_there(tensor)}
        if places == {True, False}:
            shapes = [(is_there(tensor), tuple(tensor.shape)) for tensor in tensors]
            raise RuntimeError(f"{func}: tensors on cuda (True) and on the cpu (False): {shapes}")
        return True in places

    def _iterate(self, owner: Tensor) -> Iterator[Tensor]:
        parts = owner.unbind(0)
        for part in parts:
            self._mark(part, is_there(owner))
        return iter(parts)

    @staticmethod
    def _mark(tensor: Tensor, there: bool) -> None:
        if there or is_there(tensor):
            setattr(tensor, MARK, there)


def _device_of(args: Any, kwargs: Any) -> str | None:
    """The type of the device that a call asks for, if it does."""
    for value in (kwargs.get("device"), *args[1:]):
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "meta"):
            return value.partition(":")[0]
    return None


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_cuda or value == "cuda" else value
