"""The best factors of a lower rank, found from the factors alone, and what that loses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Loss", "norm_squared", "shorten"]


class Loss(NamedTuple):
    """What a lower rank loses: relative errors in the Frobenius norm. Written out, one line."""

    max_rank: int
    shorter: int
    layers: int
    overall: float
    worst: float
    name: str

    @classmethod
    def of(cls, max_rank: int, shorter: int, squares: dict[str, tuple[float, float]]) -> Loss:
        """From the squared error and the squared norm of each layer's update."""
        each = {name: (error / norm) ** 0.5 if norm else 0.0 for name, (error, norm) in squares.items()}
        errors, norms = (sum(pair[side] for pair in squares.values()) for side in (0, 1))
        worst = max(each, key=lambda name: each[name])
        overall = (errors / norms) ** 0.5 if norms else 0.0
        return cls(max_rank, shorter, len(squares), overall, each[worst], worst)

    def __str__(self) -> str:
        if not self.shorter:
            return f"max_rank={self.max_rank}: no layer has a higher rank; the export is exact."
        return (
            f"max_rank={self.max_rank}: {self.shorter} of {self.layers} layers were reduced to a "
            f"lower rank; relative error of the updates {self.overall:.2e} over all layers, "
            f"{self.worst:.2e} in the worst ({self.name})."
        )


def shorten(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of the best approximation of ``up @ down`` of that rank, and its squared error.

    QR of both factors and an SVD of what lies between, in float64 (float32 on Apple's GPUs); the product
    itself is never formed. Exact where ``rank`` is min(m, n) or the rank of the product.

    Args:
        up: (m, r).
        down: (r, n).
        rank: At most r, m and n.

    Returns:
        (m, rank) and (rank, n) in the dtype of the factors, and the squared Frobenius norm of what is lost.

    Raises:
        ValueError: A factor has a non-finite value.

    Source: Eckart and Young (1936).
    """
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError("the update has non-finite values")
    left, upper = torch.linalg.qr(_wide(up))
    right, lower = torch.linalg.qr(_wide(down).t())
    U, s, V = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    root = s[:rank].sqrt()
    shorter_up, shorter_down = left @ (U[:, :rank] * root), (root[:, None] * V[:rank]) @ right.t()
    return shorter_up.to(up.dtype), shorter_down.to(down.dtype), s[rank:].square().sum().item()


def norm_squared(up: Tensor, down: Tensor) -> float:
    """Squared Frobenius norm of ``up @ down``, from (r, r) products."""
    up, down = _wide(up), _wide(down)
    return ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0.0).item()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)
