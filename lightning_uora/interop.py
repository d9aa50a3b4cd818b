"""Export to Hugging Face PEFT: LoRA, exact for any mixture of shapes; VeRA where A and B are shared.

LoRA: ``lora_A = diag(d) A``, ``lora_B = diag(b) B``, ``lora_alpha = r``; no decomposition, no rounding beyond
float32. VeRA: the vectors and, in the same file, A and B themselves.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uora.checkpoint import write_folder
from lightning_uora.injection import named_adapters
from lightning_uora.layers import AdaptedModule, has_plain_forward

__all__ = ["export_peft"]

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
USE_MERGE = "detach_uora(model, merge=True) keeps it exactly"


def export_peft(
    model: nn.Module,
    directory: str | Path,
    format: Literal["lora", "vera"] = "lora",
    base_model_name_or_path: str | None = None,
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, directory)`` loads with equal outputs.

    Args:
        model: An adapted model, or the part of one that will be the base there (``lightning_module.model``).
        directory: Made if it does not exist; written whole or not at all.
        format: ``"lora"`` works for every Linear, Conv1D and plain undilated ungrouped convolution, each
            layer with its own projections. ``"vera"`` needs one A and one B for all layers
            (``share="model"``, one shape).
        base_model_name_or_path: Written into the configuration; default: what a transformers model calls
            itself.

    Raises:
        ValueError: The model is not adapted, or holds what the format cannot say exactly; the module is
            named, and what to do instead.

    Source: formats of PEFT (huggingface.co/docs/peft); VeRA's from arXiv:2310.11454.
    """
    adapters = dict(named_adapters(model))
    if not adapters:
        raise ValueError(f"model ({type(model).__name__}) holds no adapter; call attach_uora first.")
    if format not in ("lora", "vera"):
        raise ValueError(f"format={format!r} is not allowed; format must be 'lora' or 'vera'.")
    heads = _heads(model, adapters)
    tensors, settings = (_lora if format == "lora" else _vera)(adapters)
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    config = {
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": any(part.transposed for m in adapters.values() for part in m.adapted_parts),
        "inference_mode": True,
        "modules_to_save": heads or None,
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "task_type": None,
        **settings,
    }
    for head in heads:
        for name, value in model.get_submodule(head).state_dict().items():
            tensors[f"base_model.model.{head}.{name}"] = value
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_folder(directory, "adapter_model.safetensors", kept, "adapter_config.json", lambda _: config)


def _lora(adapters: dict[str, AdaptedModule]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, module in adapters.items():
        A, B, d, b = _factors(name, module)
        down, up = d[:, None] * A, b[:, None] * B
        if isinstance(module, PLAIN_CONVOLUTIONS):
            down = down.reshape(len(d), *module._parameters["weight"].shape[1:])  # type: ignore[union-attr]
            up = up.reshape(*up.shape, *(1 for _ in module.kernel_size))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    rank = next(iter(adapters.values())).uora_d.numel()
    return tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}


def _vera(adapters: dict[str, AdaptedModule]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    shared: tuple[Tensor, Tensor] | None = None
    for name, module in adapters.items():
        if isinstance(module, PLAIN_CONVOLUTIONS):
            raise ValueError(
                f"module {name!r} is a convolution, which PEFT's VeRA does not know; use format='lora'."
            )
        A, B, d, b = _factors(name, module)
        if shared is not None and not (_same(shared[0], A) and _same(shared[1], B)):
            raise ValueError(
                f"module {name!r} has other projections than those before it (another shape, or rows "
                "refreshed for one "
                "layer), and VeRA knows one A and one B; use format='lora'."
            )
        shared = (A, B)
        tensors[f"base_model.model.{name}.vera_lambda_d"] = d
        tensors[f"base_model.model.{name}.vera_lambda_b"] = b
    assert shared is not None
    # Note [Two names for saved projections]: PEFT 0.21 reads base_model.vera_A; 0.19 and 0.20 ignore that
    # name in silence and read base_model.vera_A.default. Both are written.
    for side, projection in zip("AB", shared, strict=True):
        tensors[f"base_model.vera_{side}"] = projection
        tensors[f"base_model.vera_{side}.default"] = projection.clone()
    rank = len(d)
    return tensors, {"peft_type": "VERA", "r": rank, "save_projection": True, "projection_prng_key": 0}


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _factors(name: str, module: AdaptedModule) -> tuple[Tensor, ...]:
    """float32 A, B, d, b of a module that PEFT can say exactly."""
    kind = module.original_class
    if isinstance(module, nn.MultiheadAttention) or (name.endswith("out_proj") and kind is not nn.Linear):
        raise ValueError(
            f"module {name!r} ({kind.__name__}) is fused attention, which PEFT's format lacks; {USE_MERGE}."
        )
    if kind in PLAIN_CONVOLUTIONS:
        if module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros":  # type: ignore[arg-type]
            raise ValueError(
                f"module {name!r} is a grouped, dilated or non-zero-padded convolution, which PEFT's LoRA "
                "does not compute "
                f"exactly; {USE_MERGE}."
            )
    elif not has_plain_forward(kind):
        raise ValueError(
            f"module {name!r} ({kind.__name__}) computes more than a product, PEFT would not; {USE_MERGE}."
        )
    (part,) = module.adapted_parts
    return tuple(t.detach().float() for t in module._uora_tensors(part.n))


def _heads(model: nn.Module, adapters: dict[str, AdaptedModule]) -> list[str]:
    """Modules that were trained whole. Raises for trained parameters that have no place in PEFT's format."""
    heads: list[str] = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not parameter.requires_grad or leaf in ("uora_d", "uora_b"):
            continue
        whole = owner and all(p.requires_grad for p in model.get_submodule(owner).parameters())
        if owner in adapters or not whole:
            raise ValueError(
                f"{name} was trained by itself, and PEFT's format has no place for it; {USE_MERGE}."
            )
        if owner not in heads:
            heads.append(owner)
    names = [name for name, _ in model.named_modules()]
    for head in heads:
        others = [name for name in names if name.endswith(head) and name != head]
        if others:
            raise ValueError(
                f"PEFT would take {others[0]!r} for the trained module {head!r} too; {USE_MERGE}."
            )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        warnings.warn(
            "PEFT's format has no place for BatchNorm statistics; if training moved them, outputs will "
            "differ.",
            stacklevel=3,
        )
    return heads
