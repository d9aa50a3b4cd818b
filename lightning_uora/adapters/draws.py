"""Random draws of A and B: from their own generator, on the CPU, the same everywhere within rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Init", "draw_down", "draw_up", "haar_rows_", "one_thread"]

Init = Literal["orthogonal", "kaiming_uniform"]


def draw_down(
    r: int, n: int, init: Init, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw A: entries of variance ``2 / n``; with ``"orthogonal"``, orthogonal rows of norm ``sqrt(2)``.

    ``"orthogonal"`` is uniform over the Stiefel manifold (Haar). Where r exceeds n, independent blocks of n
    rows are stacked. Drawn on the CPU from ``generator`` alone; the global random state is not touched.

    Shape:
        - Returns (r, n), contiguous.

    Source: *ours* (METHOD decision 1): QR of a Gaussian with the signs of R's diagonal fixed (Mezzadri,
    arXiv:math-ph/0609050), scaled to the variance of VeRA's Kaiming-uniform draw.
    """
    return _draw(r, n, 2.0 / n, init, generator, dtype)


def draw_up(
    m: int, r: int, init: Init, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw B: entries of variance ``2 / r``; under ``"orthogonal"`` its columns are orthogonal, at one norm.

    As :func:`draw_down`, of the transposed shape: where r exceeds m, independent blocks of m columns are
    stacked. Column i of B belongs to row i of A, so B is laid out with its columns contiguous: both halves of
    a direction are.

    Shape:
        - Returns (m, r), column-major.
    """
    return _draw(r, m, 2.0 / r, init, generator, dtype).t()


def _draw(
    rows: int, length: int, variance: float, init: Init, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """``rows`` random rows of ``length`` entries with the given variance."""
    out = torch.empty(rows, length, dtype=dtype, device="cpu")
    if init == "kaiming_uniform":
        bound = math.sqrt(3.0 * variance)
        return out.uniform_(-bound, bound, generator=generator)
    with one_thread():
        for block in torch.split(out, length):
            haar_rows_(block, generator)
    return out.mul_(math.sqrt(length * variance))


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's last bits depend on the number of threads; one makes a draw repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def haar_rows_(out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill ``out`` with orthonormal rows, uniform over the Stiefel manifold, in its own memory.

    Works on the transpose, which LAPACK reads as column-major, so that nothing of the size of ``out`` is
    allocated.

    Shape:
        - ``out``: (k, n), k <= n, contiguous, on the CPU. Returned.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups",
    arXiv:math-ph/0609050.
    """
    columns = out.normal_(generator=generator).t()
    tau = out.new_empty(out.shape[0])
    torch.geqrf(columns, out=(columns, tau))
    signs = columns.diagonal().sign()
    torch.linalg.householder_product(columns, tau, out=columns)
    columns.mul_(signs)
    return out
