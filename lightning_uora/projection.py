"""The one owner of all A and B: a module at the root of the adapted model.

A tensor registered in two layers stops being shared at the first ``.to()``; a module that the layers merely
refer to does not. Layers reach their projections through the owner, which alone registers them, so state-dict
keys do not repeat and ``deepcopy``, ``pickle`` and ``.to()`` keep the sharing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.config import UORAConfig
from lightning_uora.functional import Init, draw_down, draw_up

__all__ = ["OWNER", "Projections", "seeded_generator"]

OWNER = "uora_projections"
"""Name under which the owner is registered at the root of an adapted model."""


def seeded_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``labels`` alone."""
    text = ":".join(map(str, (seed, *labels)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Projections(nn.Module):
    """A for every distinct width n and B for every distinct height m, drawn from the seed.

    The draw of ``A_n`` depends on (seed, r, n) only and that of ``B_m`` on (seed, m, r): adapting other
    layers as well changes nothing for those that were adapted before. Buffers follow the model's device and
    dtype.

    Args:
        config: Rank, draw and seed.
        widths: Distinct n of the adapted weights.
        heights: Distinct m of the adapted weights.
        device: Where the adapted weights are; on ``meta`` nothing is drawn until the model gets storage.
        dtype: The widest dtype of the adapted weights.
    """

    def __init__(
        self,
        config: UORAConfig,
        widths: Iterable[int],
        heights: Iterable[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.disabled = 0
        self.requires_grad_before: dict[str, bool] = {}
        for name in [f"A_{n}" for n in sorted(widths)] + [f"B_{m}" for m in sorted(heights)]:
            self.register_buffer(
                name, self._draw(name).to(device, dtype) if device.type != "meta" else self._meta(name, dtype)
            )

    def down(self, n: int) -> Tensor:
        """A for inputs of width n, shape (r, n)."""
        return cast(Tensor, self._buffers[f"A_{n}"])

    def up(self, m: int) -> Tensor:
        """B for outputs of height m, shape (m, r)."""
        return cast(Tensor, self._buffers[f"B_{m}"])

    def _draw(self, name: str) -> Tensor:
        rank, init, seed = self.config.rank, cast(Init, self.config.init), self.config.seed
        side, size = name.split("_")
        generator = seeded_generator(seed, side, size, rank)
        return (
            draw_down(rank, int(size), init, generator)
            if side == "A"
            else draw_up(int(size), rank, init, generator)
        )

    def _meta(self, name: str, dtype: torch.dtype) -> Tensor:
        side, size = name.split("_")
        shape = (self.config.rank, int(size)) if side == "A" else (int(size), self.config.rank)
        return torch.empty(shape, device="meta", dtype=dtype)

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Projections:
        """As in torch; what had no storage (``meta``) and gets some is drawn, never left undefined."""
        was_meta = [name for name, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in was_meta:
            buffer = cast(Tensor, self._buffers[name])
            if not buffer.is_meta:
                buffer.copy_(self._draw(name))
        return self

    @override
    def forward(self, x: Any) -> Any:
        """The input as it is: the owner is the last thing that an ``nn.Sequential`` root calls."""
        return x

    @override
    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, init={self.config.init!r}, seed={self.config.seed}"
