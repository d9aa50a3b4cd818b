"""The effective weight as a tensor: what is written to it in place reaches the base, so that it reads back.

An ordinary tensor made for one read would swallow ``layer.weight.copy_(...)`` and ``nn.init`` without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EffectiveWeight", "effective", "mixed_weight"]

# Note [Writing to an effective weight]
# What is read is W + ΔW. Whoever writes X there means the layer to compute with X, so the base becomes X - ΔW
# and X reads back. torch's functions see a plain tensor (as of nn.Parameter, their override is switched off);
# only the methods that write are replaced, and `.data` and `.detach()`, which hand out the same memory. While
# torch compiles, traces or transforms, reads are plain tensors.


class EffectiveWeight(Tensor):
    """W + ΔW of a module's parameter. See Note [Writing to an effective weight]."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    uora_sink: Callable[[Tensor], None]

    def _again(self, alias: Tensor) -> EffectiveWeight:
        return effective(alias, self.uora_sink)

    @property
    def data(self) -> Tensor:
        """The same memory without a graph; writes to it reach the base."""
        return self._again(Tensor.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        self.uora_sink(value)

    def detach(self) -> Tensor:
        """The same memory without a graph; writes to it reach the base."""
        return self._again(super().detach())

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain tensor with memory of its own."""
        return super().detach().as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain tensor."""
        return super().detach().as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def effective(weight: Tensor, sink: Callable[[Tensor], None]) -> EffectiveWeight:
    """``weight`` as one that hands what is written to it to ``sink``."""
    result = weight.as_subclass(EffectiveWeight)
    result.uora_sink = sink
    return result


# Note [Weights in a mixed batch]
# There is no one effective weight there. A module computes by row in its own forward; another module that
# takes its weight gets a tensor that says what it is (dtype, device, shape), and refuses to be computed with
# instead of being the base's in silence. Fused paths of torch step aside for such a tensor.


class MixedWeight(Tensor):
    """A base weight that may be looked at. See Note [Weights in a mixed batch]."""

    uora_of: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only what describes a tensor."""
        name = getattr(func, "__name__", "")
        if name in DESCRIBE or (name == "__get__" and func.__self__.__name__ in DESCRIBE):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        named = next((a.uora_of for a in args if isinstance(a, MixedWeight)), "an adapted module")
        raise ValueError(
            f"the weight of {named!r} is read by another module, and in a mixed batch every sample has its "
            "own; exclude it from the adapters by exclude_modules, or give use_adapters one name at a time."
        )


_IS = "is_leaf is_meta is_cuda is_cpu is_sparse is_quantized is_nested is_mkldnn is_xpu is_mps is_sparse_csr"
_HAS = "dtype device shape layout ndim requires_grad grad_fn _version size dim numel stride nelement"
_TELLS = "is_floating_point is_contiguous is_complex element_size get_device __len__ __hash__"
DESCRIBE = frozenset(f"{_IS} {_HAS} {_TELLS}".split())


def mixed_weight(W: Tensor, of: str) -> MixedWeight:
    """``W`` as one that refuses to be computed with."""
    found = W.detach().as_subclass(MixedWeight)
    found.uora_of = of
    return found


def _writing(name: str) -> Callable[..., Any]:
    write = getattr(Tensor, name)

    def method(self: EffectiveWeight, *args: Any, **kwargs: Any) -> Any:
        result = write(self, *args, **kwargs)
        self.uora_sink(self)
        return self if isinstance(result, Tensor) else result

    method.__name__ = name
    return method


_NONE = (
    "requires_grad_ detach_ share_memory_ rename_ resize_ resize_as_ set_ t_ transpose_ swapaxes_ swapdims_"
)
_SHAPES = "squeeze_ unsqueeze_ as_strided_ sparse_resize_ sparse_resize_and_clear_ resize_as_sparse_"
NO_WRITES = frozenset(f"{_NONE} {_SHAPES}".split())
"""Methods with a trailing underscore that change no number."""
_IN_PLACE = [name for name in dir(Tensor) if name[-1] == "_" and name[0] != "_" and name not in NO_WRITES]
_OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
for _name in [*_IN_PLACE, "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)]:
    if hasattr(Tensor, _name):
        setattr(EffectiveWeight, _name, _writing(_name))
