"""Principal axes of rows that stream by: the second moment summed exactly, or sketched where it is wide.

The second moment of rows x (T of them, n entries each) is ``C = sum x x^T``, (n, n), uncentred, because the
adapter multiplies the inputs as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_uora.adapters import draw_down, one_thread
from lightning_uora.reinit import fresh_rows, without

__all__ = [
    "EXACT_WIDTH",
    "Axes",
    "ExactMoment",
    "Moment",
    "SketchedMoment",
    "is_exact",
    "principal_rows",
    "sketch_size",
]

EXACT_WIDTH = 256
"""Up to this width the second moment is summed as it is: 256 KiB in float32."""
CHUNK = 2048
"""Rows that are brought to float32 at once."""
RANK_TOLERANCE = 2e-7
"""Axes with less than this share of the largest second moment count as absent: float32 sums reach to 7e-8."""


@dataclass(frozen=True)
class Axes:
    """Orthonormal principal axes as rows (k, n), and their second moments (k,), falling; float64, CPU."""

    rows: Tensor
    values: Tensor

    def present(self) -> Tensor:
        """The rows whose second moment stands above rounding."""
        if not self.values.numel():
            return self.rows
        return self.rows[self.values > RANK_TOLERANCE * self.values[0]]

    def away_from(self, basis: Tensor) -> Axes:
        """Axes of the same moment restricted to what is orthogonal to the columns of ``basis``.

        Shape:
            - ``basis``: (n, any), orthonormal columns.
        """
        floor = RANK_TOLERANCE * (self.values[0] if self.values.numel() else self.values.sum())
        F = without(self.rows * self.values.sqrt()[:, None], basis)
        _, sizes, rows = torch.linalg.svd(F, full_matrices=False)
        kept = sizes.square() > floor
        return Axes(_signed(rows[kept]), sizes.square()[kept])


class ExactMoment:
    """``C`` itself: one pass, n x n numbers in float32 on the device of the rows."""

    passes = 1

    def __init__(self, n: int, device: torch.device) -> None:
        self.sum = torch.zeros(n, n, device=device, dtype=torch.float32)

    def add(self, x: Tensor) -> None:
        """Add rows (T, n) of any dtype."""
        for part in _chunks(x):
            self.sum.addmm_(part.t(), part)

    def next_pass(self) -> None:
        """Nothing to prepare."""

    def axes(self) -> Axes:
        """The principal axes, all n."""
        values, vectors = torch.linalg.eigh(_wide(self.sum))
        return Axes(_signed(vectors.flip(1).t().cpu()), values.flip(0).clamp_min(0.0).cpu())


# Note [The sketch]
# A randomised range finder (Halko, Martinsson, Tropp, arXiv:0909.4061): the first pass applies C to a
# Gaussian test matrix, the second to an orthonormal basis Q of what came out, Z = C Q. The Nystrom
# approximation Z (Q^T Z)^-1 Z^T is then nearer to C than Q^T C Q, for the same two passes: on spectra that
# fall like 1/i its leading axes were off by a third as much. It asks nothing of Q but what it spans, so Q is
# kept in float16: n x l numbers of 2 bytes and n x l sums of 4 for each sketch. The small algebra after the
# last pass is in float64.


class SketchedMoment:
    """``C`` applied to l directions: two passes over the same rows, see Note [The sketch].

    Args:
        test: (n, l) Gaussian test matrix; may be shared by sketches of one width.
    """

    passes = 2

    def __init__(self, test: Tensor) -> None:
        self.basis = test
        self.sum = torch.zeros_like(test)

    def add(self, x: Tensor) -> None:
        """Add rows (T, n) of any dtype."""
        for part in _chunks(x):
            self.sum.addmm_(part.t(), part @ self.basis.float())

    def next_pass(self) -> None:
        """From the first pass to the second."""
        self.basis = torch.linalg.qr(self.sum)[0].half()
        self.sum.zero_()

    def axes(self) -> Axes:
        """The leading principal axes, at most l."""
        Q, Z = _wide(self.basis), _wide(self.sum)
        values, vectors = torch.linalg.eigh(Q.t() @ Z)
        kept = values > RANK_TOLERANCE * values[-1].clamp_min(0.0)
        F = Z @ (vectors[:, kept] * values[kept].rsqrt())
        values, vectors = torch.linalg.eigh(F.t() @ F)
        kept = values > RANK_TOLERANCE * values[-1:].clamp_min(0.0)
        rows = (F @ (vectors[:, kept] * values[kept].rsqrt())).t()
        return Axes(_signed(rows.flip(0).cpu()), values[kept].flip(0).cpu())


Moment = ExactMoment | SketchedMoment


def sketch_size(count: int) -> int:
    """Directions l of a sketch for ``count`` axes: three quarters more, at least 8 and at most 128."""
    return count + max(8, min(3 * count // 4, 128))


def is_exact(n: int, count: int) -> bool:
    """Whether to sum the whole second moment: where it is small, or at most a third more than the sketch."""
    return n <= EXACT_WIDTH or n <= 2 * sketch_size(count)


def principal_rows(axes: Axes, r: int, n: int, generator: torch.Generator) -> Tensor:
    """A from the inputs: leading axes as orthogonal rows of norm sqrt(2), the norm of the random draw's.

    Where fewer than r axes are present, the rest is drawn uniformly orthogonal to them; where r exceeds n,
    independent blocks of n random rows follow, as in :func:`draw_down`. Every entry is a float16 number.

    Args:
        axes: Principal axes of the inputs.
        r: Rows wanted.
        n: Entries of a row.
        generator: Source of what is drawn, on the CPU.

    Shape:
        - Returns (r, n), float32, on the CPU.

    Source: METHOD decision 7, after EVA (arXiv:2410.07170), *ours*.
    """
    with one_thread():
        lead = axes.present()[: min(r, n)]
        missing = min(r, n) - len(lead)
        if missing:
            drawn = torch.randn(missing, n, generator=generator, dtype=lead.dtype)
            lead = torch.cat([lead, fresh_rows(drawn, lead.t())])
    blocks = [lead.float() * math.sqrt(2.0)]
    if r > n:
        blocks.append(draw_down(r - n, n, "orthogonal", generator))
    return torch.cat(blocks).half().float()


def _signed(rows: Tensor) -> Tensor:
    """The entry of largest magnitude of every row made positive: an axis has no sign of its own."""
    if not rows.numel():
        return rows
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -rows, rows)


def _wide(t: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _chunks(x: Tensor) -> Iterator[Tensor]:
    for part in torch.split(x, CHUNK):
        yield part.float()
