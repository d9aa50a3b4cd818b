"""Modules that compute in a form of their own: Linear-like ones factored, attention with one built weight."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_uora.adapters.functional import factored_flops, factored_linear, merged_flops
from lightning_uora.adapters.layers import AdaptedModule, this_thread

__all__ = ["AdaptedAttention", "AdaptedLinear"]


class AdaptedLinear(AdaptedModule):
    """A Linear-like module: factored where that costs less, else its own forward on W_eff."""

    @override
    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        x = cast(Tensor, input if x is None else x)
        self._uora_refuse_sharded()
        config = self._uora.owner.config
        drops = config.dropout > 0.0 and self.training
        if self._uora.owner.disabled or not (drops or self._uora_prefers_factored(x)):
            return cast(Tensor, super().forward(x))
        if self._uora_needs_grad():
            self._uora.owner.require_calibrated("training")
        self._uora.settle()
        (part,) = self._uora.parts.values()
        W, bias = cast(Tensor, self._parameters[part.name]), cast("Tensor | None", self.bias)
        dropped = nn.functional.dropout(x, config.dropout, self.training) if drops else None
        vectors = self._uora_sources(part.n)
        return factored_linear(x, W, bias, *vectors, dropped=dropped, transposed=part.transposed)

    def _uora_refuse_sharded(self) -> None:
        """See Note [Sharded weights]."""
        (name,) = self._uora.parts
        if isinstance(self._parameters[name], DTensor):
            raise ValueError(
                f"{name} of a {self.original_class.__name__} is still sharded in its forward (tensor "
                "parallelism?), so its adapter would have no effect; use fully_shard instead, and call "
                "the module that you gave to fully_shard."
            )

    def _uora_prefers_factored(self, x: Tensor) -> bool:
        adapter, config = self._uora, self._uora.owner.config
        (part,) = adapter.parts.values()
        if config.compute == "merged" or x.is_nested or adapter.owner.gradients is not None:
            return False
        if self._uora_keeps():
            return config.compute == "factored"
        return self.form(x.numel() // part.n) == "factored"

    @override
    def form(self, tokens: int) -> Literal["merged", "factored"]:
        """The cheaper by the counts of operations, unless the configuration or dropout decides."""
        config = self._uora.owner.config
        if config.dropout > 0.0:
            return "factored"
        if config.compute != "auto":
            return cast(Literal["merged", "factored"], config.compute)
        (part,) = self._uora.parts.values()
        sizes = (tokens, part.m, part.n, config.rank)
        return "factored" if factored_flops(*sizes) < merged_flops(*sizes) else "merged"


class AdaptedAttention(AdaptedModule):
    """``nn.MultiheadAttention`` reads its weight several times a forward: it is built once."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held, thread = self._uora.held, this_thread()
        held[thread] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del held[thread]
