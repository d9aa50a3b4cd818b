"""Two numbers that tell one tensor from another: what a base, A and B are recognised by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_uora.adapters import packed_parts
from lightning_uora.distributed import whole

__all__ = ["fingerprint", "near", "sample"]

STRIDE = 4099

# Note [Fingerprints]
# Two numbers for each tensor: a sum with fixed signs and the norm. Another base moves the signed sum by about
# the norm of the difference. They are compared within rounding, not hashed: the same base in another dtype,
# or A drawn by another LAPACK, is the same.


def fingerprint(t: Tensor) -> list[float]:
    """Signed sum and norm, see Note [Fingerprints]; in chunks: no second copy of a large weight."""
    several = list(packed_parts(t))
    if len(several) > 1:
        prints = torch.tensor([fingerprint(one) for one in several], dtype=torch.float64)
        return [float(prints[:, 0].sum()), float(prints[:, 1].norm())]
    flat = whole(t.detach()).reshape(-1)
    if not flat.is_floating_point():
        flat = flat.float()
    signs = torch.randint(0, 2, (STRIDE,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = signs.mul_(2).sub_(1).to(flat.device)
    full = flat.numel() // STRIDE * STRIDE
    columns = flat[:full].reshape(-1, STRIDE).sum(0, dtype=torch.float64)
    total = (columns * signs).sum() + (flat[full:].double() * signs[: flat.numel() - full]).sum()
    return [float(total), float(torch.linalg.vector_norm(flat, dtype=torch.float64))]


def sample(t: Tensor) -> tuple[float, ...]:
    """A few numbers spread over a tensor: they tell of a write that moved no version."""
    flat = next(packed_parts(t)).detach().reshape(-1)
    return tuple(flat[:: max(1, flat.numel() // 16)].double().tolist())


def near(found: list[float], expected: list[float], tolerance: float) -> bool:
    """Whether two fingerprints agree within ``tolerance``, as a share of the expected norm."""
    room = tolerance * max(expected[1], 1e-30)
    return abs(found[0] - expected[0]) <= room and abs(found[1] - expected[1]) <= room
