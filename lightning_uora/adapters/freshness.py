"""Whether a kept effective weight is still right: proof that nothing it was made from has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters.watching import Watch

__all__ = ["Kept", "keepable"]

SAMPLE = 128
WHOLE = 2_048
OF_WEIGHT = 32
"""Fewer: each number is a miss of the processor's caches, and the watch finds most writes without them."""

# Note [When the effective weight is kept]
# With gradients it is built for each read: its graph belongs to one backward. In training without gradients
# (reentrant checkpointing) it is built too: keeping it would hold a second copy of every adapted weight. Of
# sharded weights nothing is kept: FSDP2 gathers them into the same memory without moving a version. Else it
# is kept until something it was made from has changed: another object, data pointer or version; and because
# fused optimizers, `.data` and other views write without moving a version, the numbers are compared as
# well. d and b are compared whole. A, B and W up to WHOLE numbers too, larger ones by SAMPLE numbers spread
# over them: bulk writes (loading, averaging, scaling) show there. What does not show is a write through
# `.data` to a few single numbers of a large frozen weight between two evaluations. train(), eval() and
# casts drop what was kept. On an accelerator a comparison would wait for the device at every layer, so
# nothing is kept there. The memory that is handed out is the kept weight's own: a write there is found out
# by its watch, or by numbers as of A, B and W, and goes to the base. The weight is built outside inference
# mode: one made inside could not be used by autograd later.


def keepable(t: Tensor) -> bool:
    """Whether what is made from ``t`` can be proved fresh later.

    See Note [When the effective weight is kept]. Not where a compiler, a tracer or a
    transform of torch.func looks on.
    """
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    transforms: bool = torch._C._are_functorch_transforms_active()
    return not transforms


def _probe(t: Tensor, whole: bool, sample: int = SAMPLE) -> Tensor:
    """A view of the numbers by which a change of ``t`` shows."""
    t, count = t.detach(), t.numel()
    dense = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) == count
    if whole or count <= WHOLE or not dense:
        return t
    return t.as_strided((sample,), ((count - 1) // (sample - 1),), t.storage_offset())


def _key(sources: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version) for t in sources)


@dataclass
class Kept:
    """An effective weight with what it was made from: W, A, B, d, b and own rows, in this order, at a dtype.

    Attributes:
        dtype: Of the products.
        sources: What it was made from.
        key: Where they were in memory, at which versions.
        probes: Views of them, and the numbers that were there.
        weight: The effective weight.
        version: Of the weight.
        probe: As of the sources, of the weight.
        watch: Of the weight.
    """

    dtype: torch.dtype
    sources: tuple[Tensor, ...]
    key: tuple[Any, ...]
    probes: list[tuple[Tensor, Tensor]]
    weight: Tensor | None = None
    version: int = 0
    probe: tuple[Tensor, Tensor] | None = None
    watch: Watch | None = None

    @classmethod
    def of(cls, dtype: torch.dtype, sources: tuple[Tensor, ...]) -> Kept | None:
        """Taken before the weight is built; None where a change could not be seen."""
        try:
            key = _key(sources)
        except RuntimeError:  # inference tensors have no version, functorch's and fake ones no pointer
            return None
        views = [_probe(t, whole=place in (3, 4)) for place, t in enumerate(sources)]
        return cls(dtype, sources, key, [(view, view.clone()) for view in views])

    def hold(self, weight: Tensor, watch: Watch) -> None:
        """Keep the weight that was built."""
        self.watch = watch
        self.weight, self.version = weight, weight._version
        view = _probe(weight.detach(), whole=False, sample=OF_WEIGHT)
        self.probe = view, view.clone()

    def fresh(self, dtype: torch.dtype, sources: tuple[Tensor, ...]) -> Tensor | None:
        """The weight where nothing has changed, else None."""
        same = self.dtype == dtype and len(self.sources) == len(sources)  # own rows may have come
        same = same and all(a is b for a, b in zip(self.sources, sources, strict=True))
        if not same or self.weight is None or self.weight._version != self.version:
            return None
        try:
            same = self.key == _key(sources)
        except RuntimeError:
            return None
        same = same and all(torch.equal(now, before) for now, before in self.probes)  # in the same memory
        if same and self.watch is not None and self.probe is not None and not torch.equal(*self.probe):
            self.watch.hand_on()  # written to past its version
            return None
        return self.weight if same else None
