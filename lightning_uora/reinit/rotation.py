"""How rows turn: a rotation towards fresh directions, at unchanged norm, orthogonal where there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "among_others",
    "basis",
    "cosine",
    "drawn_directions",
    "fresh_rows",
    "orthonormal",
    "turned_rows",
    "unit_rows",
    "without",
]


def cosine(interpolation: float) -> float:
    """Cosine of the angle θ by which a row turns, ``tan θ = λ / (1 - λ)``."""
    return math.cos(math.atan2(interpolation, 1.0 - interpolation))


def turned_rows(
    rows: Tensor,
    chosen: Sequence[int],
    interpolation: float,
    generator: torch.Generator,
    pool: int = 0,
    picked: Sequence[int] | None = None,
    directions: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """New values of the chosen rows: ``cos θ a + sin θ |a| R`` at the old norm, R fresh unit rows.

    R is orthogonal to every row, and the new rows to all others, where rows + chosen fit into the dimension;
    else R is orthogonal to its own row and, as far as there is room, to the rows that stay. Rows beyond the
    dimension are taken in the blocks in which they were drawn.

    Args:
        rows: The projection's rows.
        chosen: Ascending indices of those to turn.
        interpolation: λ; ``tan θ = λ / (1 - λ)``.
        generator: Source of R.
        pool: Draw that many directions and use those of ``picked``; 0: as many as are needed.
        picked: Indices into the pool, one for each chosen row.
        directions: Given a block's orthonormal basis and a count, up to that many unit directions that come
            before drawn ones.

    Shape:
        - ``rows``: (k, n), float32, on the CPU. Returns (len(chosen), n).

    Source: METHOD decision 3, *ours*.
    """
    n = rows.shape[1]
    new = rows[list(chosen)].clone()
    if n < 2:
        return new
    drawn = drawn_directions(n, chosen, generator, pool, picked)
    angle = math.atan2(interpolation, 1.0 - interpolation)
    for start in range(0, rows.shape[0], n):
        here = [k for k, i in enumerate(chosen) if start <= i < start + n]
        if not here:
            continue
        block, local = rows[start : start + n], [chosen[k] - start for k in here]
        old = block[local]
        norm = old.norm(dim=1, keepdim=True)
        wanted = drawn[here]
        if directions is not None:
            known = directions(basis(block), len(here)).to(wanted.dtype)
            wanted = torch.cat([known, wanted[len(known) :]])
        turned = math.cos(angle) * old + math.sin(angle) * norm * _fresh(block, local, wanted)
        new[here] = turned * (norm / turned.norm(dim=1, keepdim=True))
    return new


def drawn_directions(
    n: int, chosen: Sequence[int], generator: torch.Generator, pool: int, picked: Sequence[int] | None
) -> Tensor:
    """A drawn direction for each chosen row, of those of a pool that were picked."""
    drawn = torch.randn(max(pool, len(chosen)), n, generator=generator)
    return drawn[list(picked)] if picked is not None else drawn[: len(chosen)]


def _fresh(block: Tensor, local: list[int], drawn: Tensor) -> Tensor:
    """Unit rows made of ``drawn``, as orthogonal to ``block`` as its dimension allows."""
    k, n = block.shape
    if k + len(local) <= n:
        return fresh_rows(drawn, basis(block))
    stay = [i for i in range(k) if i not in set(local)]
    return among_others(without(drawn, basis(block[stay])) if stay else drawn, block[local], drawn)


def among_others(R: Tensor, old: Tensor, drawn: Tensor) -> Tensor:
    """Unit rows made of R, each orthogonal to its own old row; where nothing is left, of what was drawn."""
    own = unit_rows(old)
    R = R - (R * own).sum(1, keepdim=True) * own
    lost = R.norm(dim=1, keepdim=True) < 1e-3 * drawn.norm(dim=1, keepdim=True)
    R = torch.where(lost, drawn - (drawn * own).sum(1, keepdim=True) * own, R)
    return unit_rows(R)


def fresh_rows(drawn: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows made of ``drawn``, in their order, orthogonal to the columns of ``basis``."""
    return orthonormal(without(drawn, basis))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows made of ``rows``, in their order."""
    Q, triangle = torch.linalg.qr(rows.t())
    unit: Tensor = (Q * triangle.diagonal().sign()).t()
    return unit


def unit_rows(rows: Tensor) -> Tensor:
    """``rows`` at length 1."""
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def basis(rows: Tensor) -> Tensor:
    """Orthonormal columns that span ``rows``, at most n of them."""
    basis: Tensor = torch.linalg.qr(rows.t())[0]
    return basis


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows`` less their parts in ``basis``; twice, because once leaves rounding behind."""
    for _ in range(2):
        rows = rows - (rows @ basis) @ basis.t()
    return rows
