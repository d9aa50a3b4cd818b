"""The effective weight as a tensor: what is written to it in place reaches the base, so that it reads back.

An ordinary tensor made for one read would swallow ``layer.weight.copy_(...)`` and ``nn.init`` without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters.watching import Watch

__all__ = ["EffectiveWeight", "effective", "mixed_weight"]

# Note [Writing to an effective weight]
# What is read is W + ΔW. Whoever writes X there means the layer to compute with X, so the base becomes X - ΔW
# and X reads back. torch's functions see a plain tensor (as of nn.Parameter, their override is switched off).
# The methods that write hand on at once; the methods that return a view return one of this class, which does
# too; all other writes are found out, see Note [Who writes to an effective weight]. Two reads in training are
# two copies: of what is written to both, the later counts, whole. While torch compiles, traces or transforms,
# reads are plain tensors.


class EffectiveWeight(Tensor):
    """W + ΔW of a module's parameter, or a view of it. See Note [Writing to an effective weight]."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    uora_watch: Watch

    @property
    def data(self) -> Tensor:
        """The same memory without a graph; writes to it reach the base."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._uora_become(value)

    def detach(self) -> Tensor:
        """The same memory without a graph; writes to it reach the base."""
        return watched(super().detach(), self.uora_watch)

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused, as parametrisations do it."""
        raise ValueError(
            "an adapted layer's weight cannot be given other memory (set_), and cannot be "
            "parametrised, pruned or removed: call detach_uora(model, merge=True) first, or do it "
            "before attach_uora and exclude the layer."
        )

    def _uora_part(self, found: Tensor) -> Tensor:
        """A view of it as one that knows; a copy stays plain."""
        return watched(found, self.uora_watch) if found._is_view() else found

    def __iter__(self) -> Any:
        """Over its rows."""
        return iter(self.unbind(0))

    def _uora_become(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(
                f"an adapted layer's weight of shape {tuple(self.shape)} cannot take shape "
                f"{tuple(value.shape)}; call detach_uora(model, merge=True) first."
            )
        with torch.no_grad():
            self.copy_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """The same memory, or with ``force`` maybe a copy; writes to it reach the base."""
        array = super().numpy(force=force)
        self.uora_watch.expose()
        owner = array if array.base is None else array.base
        if isinstance(owner, Tensor):
            owner.uora_watch = self.uora_watch
        return array

    def untyped_storage(self) -> torch.UntypedStorage:
        """The same memory; writes to it reach the base before the layer is read again."""
        self.uora_watch.expose(until_read=True)
        return super().untyped_storage()

    def data_ptr(self) -> int:
        """Of the memory, which stays until the layer is read again."""
        self.uora_watch.expose(until_read=True)
        return super().data_ptr()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """The same memory; writes to it reach the base."""
        self.uora_watch.expose()
        return super().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A plain tensor with memory of its own."""
        return super().detach().as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain tensor."""
        return super().detach().as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def effective(weight: Tensor, watch: Watch | Callable[[Tensor], None]) -> EffectiveWeight:
    """``weight`` as one whose watch, or a new one on it, hands what is written to it to a sink."""
    return watched(weight, watch if isinstance(watch, Watch) else Watch(weight, watch))


def watched(weight: Tensor, watch: Watch) -> EffectiveWeight:
    """The watch lives as long as anything that shows this memory."""
    result = weight.as_subclass(EffectiveWeight)
    result.uora_watch = watch
    owner = result._base
    if owner is not None:
        owner.uora_watch = watch  # type: ignore[attr-defined]
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
            f"another module reads the weight of {named!r}, and in a mixed batch that weight differs "
            "by sample; exclude that layer with exclude_modules, or give use_adapters one name at a "
            "time."
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
        self.uora_watch.flush()
        return self if isinstance(result, Tensor) else result

    method.__name__ = name
    return method


def _viewing(name: str) -> Callable[..., Any]:
    view = getattr(Tensor, name)

    def method(self: EffectiveWeight, *args: Any, **kwargs: Any) -> Any:
        result = view(self, *args, **kwargs)
        if isinstance(result, Tensor):
            return self._uora_part(result)
        return type(result)(map(self._uora_part, result))

    method.__name__ = name
    return method


def _viewing_as(name: str) -> Callable[[EffectiveWeight], Tensor]:
    get = getattr(Tensor, name).__get__

    def turned(self: EffectiveWeight) -> Tensor:
        return self._uora_part(get(self))

    return turned


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: EffectiveWeight, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{name} would change the shape of an adapted layer's weight; call detach_uora(model, "
            "merge=True) first."
        )

    method.__name__ = name
    return method


KEEP = frozenset(["requires_grad_", "detach_", "share_memory_", "rename_", "set_"])
"""Methods with a trailing underscore that change neither number nor shape, or are written above."""
_RESHAPES = "t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_ resize_ resize_as_"
_SPARSE = "sparse_resize_ sparse_resize_and_clear_ resize_as_sparse_"
SHAPES = frozenset(f"{_RESHAPES} {_SPARSE}".split())
_IN_PLACE = [n for n in dir(Tensor) if n[-1] == "_" and n[0] != "_" and n not in KEEP | SHAPES]
_OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
_VIEWS = (
    "__getitem__ view view_as reshape reshape_as flatten unflatten ravel t transpose swapaxes "
    "swapdims permute movedim moveaxis adjoint narrow select squeeze unsqueeze expand expand_as "
    "diagonal unfold as_strided split split_with_sizes tensor_split hsplit vsplit dsplit chunk "
    "unbind"
)
for _name in [*_IN_PLACE, "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS)]:
    if hasattr(Tensor, _name):
        setattr(EffectiveWeight, _name, _writing(_name))
for _name in _VIEWS.split():
    setattr(EffectiveWeight, _name, _viewing(_name))
for _name in ("T", "mT", "H", "mH"):
    setattr(EffectiveWeight, _name, property(_viewing_as(_name)))
for _name in SHAPES:
    if hasattr(Tensor, _name):
        setattr(EffectiveWeight, _name, _refusing(_name))
