"""What a training step keeps for its backward, found by running the model without numbers."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_uora.adapters import AdaptedExperts, AdaptedModule

__all__ = ["saved_bytes"]

# Note [Saved without numbers]
# On ``meta`` a forward makes graphs of the right shapes and no numbers; what autograd saves there is what it
# would save anywhere: each memory once, parameters and buffers not counted. Attention alone is computed
# otherwise on ``meta`` (every score is kept): in its place stands a function that keeps query, key, value and
# output, as fused kernels do. A model that looks at numbers on its way cannot be run like this. Experts have
# grouped products on ``meta`` in bfloat16 alone: a float32 model is run in that, and its bytes doubled.


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _Attention(TorchFunctionMode):
    """Fused attention, see Note [Saved without numbers]."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Fused.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


def saved_bytes(model: nn.Module, tokens: int) -> int | None:
    """Bytes that a training step of that many tokens keeps for its backward; None where it cannot be run.

    Args:
        model: On ``meta``, adapted: a model of timm (on images of its own size) or of transformers that
            takes ``input_ids`` or ``pixel_values``. See Note [Saved without numbers].
        tokens: Rows that an adapted layer sees. Texts are as long as the model takes them, images counted in
            parts.
    """
    found = _saved(model, tokens)
    single = any(p.dtype == torch.float32 for p in model.parameters())
    if found is None and single and any(isinstance(m, AdaptedExperts) for m in model.modules()):
        half = _saved(copy.deepcopy(model).to(torch.bfloat16), tokens)
        found = None if half is None else 2 * half
    return found


def _saved(model: nn.Module, tokens: int) -> int | None:
    given = _inputs(model, tokens)
    if given is None:
        return None
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}
    rows: list[int] = []

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return t

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            rows.append(inputs[0].numel() // cast(AdaptedModule, layer).adapted_parts[0].n)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, AdaptedModule)]
    training = model.training
    try:
        with warnings.catch_warnings(), saved_tensors_hooks(keep, lambda t: t), _Attention():
            warnings.simplefilter("ignore")
            _loss(model.train()(**given) if isinstance(given, dict) else model.train()(given))
    except Exception:  # whatever a model raises that looks at numbers
        return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    total = sum(int(storage.nbytes()) for storage in kept.values())
    seen = (
        given["input_ids"].numel()
        if isinstance(given, dict) and "input_ids" in given
        else max(rows, default=tokens)
    )
    return round(total * tokens / seen)


def _loss(out: Any) -> Tensor:
    first = out if isinstance(out, Tensor) else next(iter(out.values() if hasattr(out, "values") else out))
    return cast(Tensor, first).float().square().mean()


def _inputs(model: nn.Module, tokens: int) -> Any:
    """What the model takes, on ``meta``."""
    timm = getattr(model, "default_cfg", None)
    if isinstance(timm, dict) and "input_size" in timm:
        return torch.empty(1, *timm["input_size"], device="meta", dtype=next(model.parameters()).dtype)
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        longest = getattr(config, "max_position_embeddings", None)
        length = min(tokens, longest if isinstance(longest, int) and longest > 0 else tokens)
        return {"input_ids": torch.zeros(tokens // length, length, dtype=torch.long, device="meta")}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, int):
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.empty(1, channels, size, size, device="meta")}
    return None
