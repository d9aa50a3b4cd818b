"""Modules that are adapted around their own forward: the adapter's product is added to what they compute."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.adapters.functional import factored_delta
from lightning_uora.adapters.layers import AdaptedModule
from lightning_uora.adapters.opaque import dequantised, tensors_of

__all__ = ["AdaptedAround"]


class AdaptedAround(AdaptedModule):
    """A module whose weight cannot be read, see Note [What is opaque]; always factored."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output plus ``b * (B (d * (A x)))``; x comes first, or as ``x`` or ``input``."""
        out = super().forward(*args, **kwargs)
        if self._uora.put_out is None and not torch.compiler.is_compiling():
            self._uora.put_out = out.dtype
        x: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["x"]
        owner = self._uora.owner
        if owner.disabled:
            return out
        if self._uora_needs_grad():
            owner.require_calibrated("training")
        (part,) = self._uora.parts.values()
        drops = nn.functional.dropout(x, owner.config.dropout, self.training)
        return out + factored_delta(drops, *self._uora_sources(part.n)).to(out.dtype)

    @override
    def _uora_needs_grad(self) -> bool:
        return torch.is_grad_enabled() and (self.uora_d.requires_grad or self.uora_b.requires_grad)

    @override
    def delta_weight(self) -> Tensor:
        (part,) = self._uora.parts.values()
        zeros = torch.zeros(part.m, part.n, device=self.uora_d.device)
        return part.delta(zeros, *self._uora_sources(part.n))

    @override
    def merged_weights(self) -> Any:
        raise ValueError(
            f"the weight of a {self.original_class.__name__} is quantised, and rounding would lose "
            "the update; call detach_uora(model, merge=True, dequantize=True), which leaves plain "
            "Linear layers."
        )

    @property
    def put_out(self) -> torch.dtype | None:
        """Of its first output."""
        return self._uora.put_out

    def dequantised(self) -> Tensor:
        """The frozen weight, (m, n), in float32."""
        return dequantised(cast(nn.Module, self), super().forward)

    @override
    def base_norm(self) -> Tensor:
        if self._uora.norm is None:  # frozen, and dear to find
            self._uora.norm = self.dequantised().norm()
        return self._uora.norm

    @override
    def form(self, tokens: int) -> Literal["merged", "factored"]:
        return "factored"

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """The library's own business."""
        super(AdaptedModule, self).__setattr__(name, value)

    @override
    def __delattr__(self, name: str) -> None:
        super(AdaptedModule, self).__delattr__(name)

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super(AdaptedModule, self).register_parameter(name, param)

    @override
    def _uora_device(self) -> torch.device | None:
        base = tensors_of(cast(nn.Module, self))
        return next(iter(base.values())).device if base else None
