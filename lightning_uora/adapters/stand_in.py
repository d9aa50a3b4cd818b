"""What reading an experts' parameter returns: a weight that is never built, whose products are factored."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from lightning_uora.adapters.by_row import delta_by_row
from lightning_uora.adapters.effective import effective
from lightning_uora.adapters.freshness import keepable
from lightning_uora.adapters.functional import base_product, factored_linear

__all__ = ["ExpertsWeight"]

# Note [A weight that is never built]
# All experts' effective weights at once would be a copy of the layer, and those that a step has hit would
# live until its backward. So what is read stands in for the weight: it is no tensor, but torch's functions
# take it (``__torch_function__``). Indexing picks experts, and linear, matmul, bmm and grouped_mm compute the
# base's product and the factored update. Whatever else is done with it gets the effective weight, built: it
# is right, and as large as what was picked. What is written to that in place reaches the base.

MIXED = "grouped_mm", "_grouped_mm", "grouped_mm_fallback"
SHAPES = {"shape", "dtype", "device", "ndim", "layout", "size", "dim", "numel", "nelement", "stride"}
SHAPES |= {"is_cuda", "is_meta", "is_sparse", "is_contiguous", "is_floating_point", "element_size"}
"""What can be asked without the numbers."""


class ExpertsWeight:
    """The effective weight of experts, or of one, or of a choice; see Note [A weight that is never built].

    Args:
        layer: The adapted experts, an ``AdaptedExperts``.
        base: The frozen numbers of those that were picked.
        index: Which: one expert, an index of several along the first axis, or None for all.
        swapped: The last two axes are (n, m).
    """

    def __init__(self, layer: Any, base: Tensor, index: int | Tensor | None, swapped: bool) -> None:
        self._layer, self._base, self._index, self._swapped = layer, base, index, swapped

    def _like(self, base: Tensor, swapped: bool) -> Self:
        return type(self)(self._layer, base, self._index, swapped)

    def __getitem__(self, key: Any) -> Any:
        """An expert by its number, several by an index, a mask or a slice."""
        if self._index is not None:
            return self.built()[key]
        if isinstance(key, Tensor) and key.dim() == 0 and key.dtype != torch.bool:
            key = int(key)
        if isinstance(key, int) or (hasattr(key, "__index__") and not isinstance(key, Tensor)):
            number = operator.index(key)
            return type(self)(self._layer, self._base[number], number % len(self._base), self._swapped)
        if isinstance(key, (list, slice)) or (isinstance(key, Tensor) and key.dim() == 1):
            index = torch.arange(len(self._base), device=self._base.device)[key]
            return type(self)(self._layer, self._base[key], index, self._swapped)
        return self.built()[key]

    def __len__(self) -> int:
        return len(self._base)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """As of a tensor."""
        return tuple(self) if dim == 0 else self.built().unbind(dim)

    def transpose(self, one: int, two: int) -> Any:
        """As of a tensor."""
        last = {self._base.dim() - 1, self._base.dim() - 2}
        if {one % self._base.dim(), two % self._base.dim()} == last:
            return self._like(self._base.transpose(-1, -2), not self._swapped)
        return self.built().transpose(one, two)

    def t(self) -> Any:
        """As of a tensor."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:  # noqa: N802 (torch's name)
        """As of a tensor."""
        return self.transpose(-1, -2)

    @property
    def T(self) -> Any:  # noqa: N802 (torch's name)
        """As of a tensor."""
        return self.t() if self._base.dim() == 2 else self.built().T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor; on another device it is one."""
        moved = self._base.to(*args, **kwargs)
        if moved.device == self._base.device:
            return self._like(moved, self._swapped)
        return moved if moved.is_meta else self.built().to(*args, **kwargs)

    def contiguous(self, *args: Any, **kwargs: Any) -> Self:
        """As of a tensor."""
        return self._like(self._base.contiguous(*args, **kwargs), self._swapped)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to the vectors, or to the base."""
        return bool(self._layer._uora_needs_grad())

    def data_ptr(self) -> int:
        """How the memory would be aligned; a pointer to it there is none: a kernel would miss the update."""
        if self._base.device.type != "cpu":
            raise ValueError(
                f"a kernel reads the memory of adapted experts ({type(self._layer.host).__name__}), which "
                "lacks their update; call model.set_experts_implementation('grouped_mm'), or 'eager'."
            )
        return self._base.data_ptr() % 64

    def built(self) -> Tensor:
        """The effective weight as a tensor, differentiable."""
        layer = self._layer
        if layer.off or self._base.is_meta:  # offloaded: a hook looks at it
            return self._base
        layer.warn_of_dropout()
        part, *sources = layer.picked(self._index)
        turned = part.transposed != self._swapped
        made: Tensor = part.delta(self._base.transpose(-1, -2) if turned else self._base, *sources)
        made = made.transpose(-1, -2) if turned else made
        return effective(made, self._write) if keepable(made) else made

    def _write(self, written: Tensor) -> None:
        part = self._layer.adapted_parts[0]
        turned = part.transposed != self._swapped
        self._layer.write(self._index, written.transpose(-1, -2) if turned else written)

    def __getattr__(self, name: str) -> Any:
        if name in SHAPES:
            return getattr(self._base, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.built(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self._base.shape)}, of={type(self._layer.host).__name__})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products are factored; everything else gets the effective weight."""
        kwargs, result = kwargs or {}, NotImplemented
        if func in PRODUCTS:
            result = PRODUCTS[func](*args, **kwargs)
        elif getattr(func, "__name__", "") in MIXED:
            result = _grouped(func, *args, **kwargs)
        if result is NotImplemented:
            args, kwargs = tree_map_only(ExpertsWeight, ExpertsWeight.built, (args, kwargs))
            result = func(*args, **kwargs)
        return result

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of one expert: x W^T + bias, x (..., n)."""
        self._layer.saw(x)
        if self._layer.off:
            return base_product(x, self._base, bias, self._swapped)
        sources, dropped = self._layer.picked(self._index)[1:], self._layer.dropped(x)
        return factored_linear(x, self._base, bias, *sources, dropped=dropped, transposed=self._swapped)

    def batch(self, x: Tensor, product: Tensor) -> Tensor:
        """Of several: the base's ``product`` (K, T, m) of x (K, T, n), and the update."""
        index = torch.arange(len(x), device=x.device) if self._index is None else cast(Tensor, self._index)
        return self._updated(product, x, index.repeat_interleave(x.shape[1]))

    def groups(self, x: Tensor, product: Tensor, ends: Tensor) -> Tensor:
        """Of all: the base's ``product`` (T, m) of rows x (T, n) sorted by expert, and the update.

        Rows beyond the last end belong to no expert; what they get means nothing, as in the base's product.
        """
        places = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        index = torch.searchsorted(ends, places, right=True).clamp_max(len(self) - 1)
        return self._updated(product, x, index)

    def _updated(self, product: Tensor, x: Tensor, index: Tensor) -> Tensor:
        self._layer.saw(x)
        if self._layer.off:
            return product
        sources, dropped = self._layer.picked(None)[1:], self._layer.dropped(x)
        delta = delta_by_row(x if dropped is None else dropped, index, *sources)
        return product + delta.to(product.dtype)

    def is_seen_as(self, dim: int, swapped: bool) -> bool:
        """Whether products may be factored, and the axes stand as one needs them."""
        return self._layer.factors and self._base.dim() == dim and self._swapped == swapped


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, ExpertsWeight) and isinstance(input, Tensor) and weight.is_seen_as(2, False):
        return weight.rows(input, bias)
    return NotImplemented


def _addmm(bias: Any, x: Any, w: Any, **more: Any) -> Any:
    if not more and isinstance(w, ExpertsWeight) and isinstance(x, Tensor) and w.is_seen_as(2, True):
        return w.rows(x, bias)
    return NotImplemented


def _matmul(one: Any, two: Any) -> Any:
    if isinstance(two, ExpertsWeight) and isinstance(one, Tensor) and two.is_seen_as(2, True):
        return two.rows(one, None)
    several = {one.dim(), two.dim()} == {3}
    return _bmm(one, two) if several else NotImplemented


def _bmm(one: Any, two: Any) -> Any:
    if isinstance(two, ExpertsWeight) and isinstance(one, Tensor) and two.is_seen_as(3, True):
        return two.batch(one, torch.bmm(one, two._base))
    if isinstance(one, ExpertsWeight) and isinstance(two, Tensor) and one.is_seen_as(3, False):
        return one.batch(two.transpose(1, 2), torch.bmm(one._base, two).transpose(1, 2)).transpose(1, 2)
    return NotImplemented


def _grouped(product: Callable[..., Tensor], x: Any, w: Any, **named: Any) -> Any:
    """``product`` is one of MIXED; its rows are sorted by expert, ``offs`` says where each one's end."""
    ends, asked = named.pop("offs", None), any(value is not None for value in named.values())
    fits = isinstance(w, ExpertsWeight) and isinstance(ends, Tensor) and isinstance(x, Tensor) and not asked
    if fits and x.dim() == 2 and w._index is None and w.is_seen_as(3, True):
        return w.groups(x, product(x, w._base, offs=ends), ends)
    return NotImplemented


PRODUCTS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
}
"""What is factored, see Note [A weight that is never built]."""


def _binary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)
    return lambda self, other: function(self.built(), other)


def _reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)
    return lambda self, other: function(other, self.built())


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(ExpertsWeight, f"__{_name}__", _binary(_name))
    setattr(ExpertsWeight, f"__r{_name}__", _reflected(_name))
