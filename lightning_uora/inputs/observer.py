"""Which rows every adapted weight multiplies, seen where the product is computed.

A module's argument is not it: ``nn.MultiheadAttention`` never calls its ``out_proj``, some blocks read
``qkv.weight`` past the module, some convolutions pad by themselves. So the functions are watched, not the
modules: whoever hands an adapted weight to ``linear``, a convolution, ``addmm`` or
``multi_head_attention_forward`` shows its other operand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_uora.adapters import (
    AdaptedAround,
    AdaptedExperts,
    AdaptedModule,
    Attachment,
    Part,
    seeded_generator,
)
from lightning_uora.inputs.patches import patches

__all__ = ["PATCH_ROWS", "Observer"]

PATCH_ROWS = 8192
"""Rows of patches looked at for each call of a convolution."""
SIGNATURES: dict[Any, tuple[str, ...]] = {
    functional.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys(
        (functional.conv1d, functional.conv2d, functional.conv3d),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
}
ADDMM = {"mat1": "input", "mat2": "weight"}
CONVOLUTION = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
ATTENTION = inspect.signature(functional.multi_head_attention_forward)

Use = tuple[AdaptedModule, Part]


class Observer(TorchFunctionMode):
    """Inside ``with``, hands every adapted weight's inputs to ``see`` as rows (any, n).

    A weight is known by identity; inside an adapted module's own forward also a tensor of its shape, for
    modules that standardise their weight first.

    Args:
        one: The adapted model.
        see: Called with the module, the part, and the rows.
    """

    def __init__(self, one: Attachment, see: Callable[[AdaptedModule, Part, Tensor], None]) -> None:
        super().__init__()
        self.owner, self.see = one.owner, see
        self.layers = [module for _, module in one.layers]
        self.weights: dict[int, tuple[Tensor, Use]] = {}
        self.inside: list[AdaptedModule] = []
        self.calls: dict[int, int] = {}
        self.undo = ExitStack()

    @override
    def __enter__(self) -> Observer:
        for layer in self.layers:
            if isinstance(layer, AdaptedAround):
                receiving = layer.register_forward_pre_hook(self._receive)
                self.undo.callback(receiving.remove)
                continue
            if isinstance(layer, AdaptedExperts):  # their products tell
                continue
            for part in layer.adapted_parts:
                self._know(cast(Tensor, layer._parameters[part.name]), layer, part.name)
            if not isinstance(layer, nn.MultiheadAttention):
                before = layer.register_forward_pre_hook(partial(self._push, layer))
                after = layer.register_forward_hook(self._pop, always_call=True)
                self.undo.callback(before.remove)
                self.undo.callback(after.remove)
        self.owner.on_read = cast(Any, self._know)
        self.owner.on_input = cast(Any, self._receive_rows)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.owner.on_read = self.owner.on_input = None
        self.undo.close()
        self.weights.clear()

    def _know(self, weight: Tensor, layer: AdaptedModule, name: str) -> None:
        self.weights[id(weight)] = (weight, (layer, layer._uora.parts[name]))

    def _receive(self, layer: nn.Module, given: tuple[Any, ...]) -> None:
        """Of a module whose weight cannot be read: nobody else multiplies by it."""
        self._receive_rows(cast(AdaptedAround, layer), given[0])

    def _receive_rows(self, layer: AdaptedModule, x: Tensor) -> None:
        (part,) = layer.adapted_parts
        with torch.no_grad():
            self.see(layer, part, x.detach().reshape(-1, part.n))

    def _push(self, layer: AdaptedModule, *_: Any) -> None:
        self.inside.append(layer)

    def _pop(self, *_: Any) -> None:
        self.inside.pop()

    def _use(self, weight: Any) -> Use | None:
        """The layer and part that a tensor is the weight of."""
        if id(weight) in self.weights:
            return self.weights[id(weight)][1]
        if self.inside and isinstance(weight, Tensor):
            (part,) = self.inside[-1].adapted_parts
            if weight.shape == cast(Tensor, self.inside[-1]._parameters[part.name]).shape:
                return self.inside[-1], part
        return None

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._attention(ATTENTION.bind(*args, **kwargs).arguments)
        out = func(*args, **kwargs)
        if func in SIGNATURES:
            given = dict(zip(SIGNATURES[func], args, strict=False))
            given |= {ADDMM.get(name, name): value for name, value in kwargs.items()}
            use = self._use(given["weight"])
            if use is not None:
                self._show(use, given)
        return out

    def _show(self, use: Use, given: dict[str, Any]) -> None:
        layer, part = use
        x, W = given["input"].detach(), cast(Tensor, layer._parameters[part.name])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if W.dim() > 2:
                settings = {name: given.get(name, default) for name, default in CONVOLUTION.items()}
                x = patches(x, W.shape[2:], **settings, most=PATCH_ROWS, generator=self._generator(layer))
            self.see(layer, part, x.reshape(-1, part.n))

    def _generator(self, layer: AdaptedModule) -> torch.Generator:
        """Another one for each call of a layer, the same ones for each observer."""
        index = layer.layer_index
        self.calls[index] = self.calls.get(index, 0) + 1
        return seeded_generator(self.owner.config.seed, "patches", index, self.calls[index])

    # Note [The output projection of attention]
    # multi_head_attention_forward multiplies by the output projection inside, where no mode sees it. With the
    # identity in its place the function returns that product's input, and the product is made here.

    def _attention(self, given: dict[str, Any]) -> Any:
        """See Note [The output projection of attention]."""
        q, k, v = (given[name] for name in ("query", "key", "value"))
        read = {
            "in_proj_weight": (q, k, v),
            "q_proj_weight": (q,),
            "k_proj_weight": (k,),
            "v_proj_weight": (v,),
        }
        for name, inputs in read.items():
            use = self._use(given.get(name))
            for x in {id(x): x for x in inputs}.values() if use is not None else ():
                self._show(cast(Use, use), {"input": x})
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        use = self._use(weight)
        if use is None:
            return functional.multi_head_attention_forward(**given)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        x, attention = functional.multi_head_attention_forward(
            **{**given, "out_proj_weight": identity, "out_proj_bias": None}
        )
        self._show(use, {"input": x})
        return functional.linear(x, weight, bias), attention
