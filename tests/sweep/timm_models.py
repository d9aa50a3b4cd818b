"""timm: one member of each architecture family, the smallest, with one batch for it."""

from __future__ import annotations

import timm
import torch
from torch import nn

from tests.families import wake


def families() -> list[str]:
    """Names of the model files, each one family."""
    return [name for name in timm.list_modules() if timm.list_models(module=name)]


def smallest(family: str) -> str:
    """The member with the fewest parameters, counted on the meta device."""
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            sizes[sum(p.numel() for p in timm.create_model(name).parameters()), name] = name
    return sizes[min(sizes)]


def build(member: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(member, pretrained=False).eval()
    return wake(model) if device == "cpu" else model


def batch(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *model.pretrained_cfg["input_size"], generator=generator)
