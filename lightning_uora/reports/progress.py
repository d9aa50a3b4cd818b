"""How far adapters have moved a model, in a few numbers."""

from __future__ import annotations

import torch
from torch import nn

from lightning_uora.adapters import named_adapters

__all__ = ["progress"]


@torch.no_grad()
def progress(model: nn.Module) -> dict[str, float]:
    """How far the adapters have moved the model, as means over the adapted modules.

    Returns:
        ``update_ratio``, the Frobenius norm of the update over that of the frozen weight; ``norm_d`` and
        ``norm_b``, the lengths of the vectors.
    """
    rows = []
    for _, module in named_adapters(model):
        ratio = module.update_norm() / module.base_norm().clamp_min(1e-30)
        rows.append(torch.stack([ratio, module.uora_d.norm(), module.uora_b.norm()]).cpu())
    means = torch.stack(rows).mean(0).tolist()
    return dict(zip(("update_ratio", "norm_d", "norm_b"), means, strict=True))
