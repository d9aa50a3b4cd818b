"""The turn of rows that are known to be orthogonal: as by decomposition, in a fraction of its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_uora.adapters import Projections
from lightning_uora.reinit.rotation import among_others, basis, drawn_directions, orthonormal, without
from lightning_uora.reinit.weakness import Slot

__all__ = ["KnownRows", "rows_around"]

# Note [Orthogonal by construction]
# An orthogonal draw has orthogonal rows of one norm in each block, and a turn keeps that where there is room.
# In a full block the turned rows stay in the span of those that turned, so that they are orthogonal to all
# that never did. Either way the projection off the staying rows needs no decomposition of them: products
# with the shared rows, or a decomposition of the few rows that were ever turned. Where the rows take up half
# the dimension or less, one product leaves 1e-7; where more, what is left is small and a second is needed. In
# 16 bits the rows are orthogonal within rounding only: four converge there, and full blocks are decomposed.


@dataclass(frozen=True)
class KnownRows:
    """The rows of a projection as one layer has them, on the CPU in float32.

    Attributes:
        shared: (k, n).
        own: Rows that were ever turned, as they are now, (t, n).
        at: Their places, ascending.
        exact: Whether they are orthogonal in more than 16 bits.
    """

    shared: Tensor
    own: Tensor
    at: list[int]
    exact: bool

    def turned(
        self,
        chosen: Sequence[int],
        interpolation: float,
        generator: torch.Generator,
        pool: int,
        picked: Sequence[int] | None,
    ) -> Tensor:
        """As :func:`~lightning_uora.reinit.rotation.turned_rows`, to rounding."""
        n = self.shared.shape[1]
        drawn = drawn_directions(n, chosen, generator, pool, picked)
        place = {row: number for number, row in enumerate(self.at)}
        old = self.shared[list(chosen)]
        again = [number for number, i in enumerate(chosen) if i in place]
        old[again] = self.own[[place[chosen[number]] for number in again]]
        norm = old.norm(dim=1, keepdim=True)
        angle = math.atan2(interpolation, 1.0 - interpolation)
        new = old.clone()
        for start in range(0, self.shared.shape[0], n):
            here = [number for number, i in enumerate(chosen) if start <= i < start + n]
            if not here:
                continue
            R = self._fresh(start, [chosen[number] for number in here], old[here], drawn[here])
            turned = math.cos(angle) * old[here] + math.sin(angle) * norm[here] * R
            new[here] = turned * (norm[here] / turned.norm(dim=1, keepdim=True))
        return new

    def _fresh(self, start: int, chosen: list[int], old: Tensor, drawn: Tensor) -> Tensor:
        block = self.shared[start : start + self.shared.shape[1]]
        mine = [number for number, i in enumerate(self.at) if start <= i < start + len(block)]
        if len(block) + len(chosen) <= block.shape[1]:
            return orthonormal(self._off(drawn, block, [self.at[i] - start for i in mine], self.own[mine]))
        leaving = set(chosen)
        stay = self.own[[number for number in mine if self.at[number] not in leaving]]
        free = without(old, basis(stay)) if len(stay) else old
        span = basis(free)
        return among_others((drawn @ span) @ span.t(), old, drawn)

    def _off(self, drawn: Tensor, block: Tensor, touched: list[int], own: Tensor) -> Tensor:
        """``drawn`` less its parts along the rows of a block."""
        square, squares = block[0].square().sum(), own.square().sum(1)
        passes = 4 if not self.exact else 1 if 2 * len(block) <= block.shape[1] else 2
        for _ in range(passes):
            along = drawn @ block.t() / square
            along[:, touched] = 0.0
            left = torch.addmm(drawn, along, block, alpha=-1.0)
            drawn = torch.addmm(left, drawn @ own.t() / squares, own, alpha=-1.0) if touched else left
        return drawn


def rows_around(owner: Projections, slot: Slot, chosen: Sequence[int]) -> KnownRows | None:
    """The rows of a slot where their orthogonality is known; None where it is not.

    See Note [Orthogonal by construction].
    """
    ever = [entry["rows"] for entry in owner.record]
    mixed = not chosen or slot.key.endswith(":rows") or any(f"{slot.buffer}:rows" in rows for rows in ever)
    if owner.config.init != "orthogonal" or owner.resized or mixed:
        return None
    name = "_".join(slot.buffer.split("_")[:2])
    M = slot.rows(owner.current(name).detach())
    (k, n), exact = M.shape, M.dtype in (torch.float32, torch.float64)
    for start in range(0, k, n):
        rows, turning = min(n, k - start), sum(start <= i < start + n for i in chosen)
        if rows + turning > n and (rows < n or not exact):
            return None
    if n < 2:
        return None
    if slot.buffer == name:  # shared rows turn in place
        at = sorted({i for rows in ever for i in rows.get(slot.key, ())})
        own = M[at]
    else:
        own, at = owner.own_rows(slot.buffer) or (M[:0], [])
    return KnownRows(M.to("cpu", torch.float32), own.to("cpu", torch.float32), at, exact)
