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

from lightning_uora.adapters import AdaptedModule, facts, named_adapters, trained_names
from lightning_uora.distributed import is_sharded
from lightning_uora.storage.adapter_files import write_folder

__all__ = ["export_peft"]

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
        ValueError: The model is not adapted or not calibrated, or holds what the format cannot say exactly;
            the module is named, and what to do instead.

    Source: formats of PEFT (huggingface.co/docs/peft); VeRA's from arXiv:2310.11454.
    """
    adapters = dict(named_adapters(model))
    if not adapters:
        raise ValueError(f"model ({type(model).__name__}) holds no adapter; call attach_uora first.")
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    if is_sharded(model):
        raise ValueError("model is sharded; save a checkpoint and export that file with `uora export`.")
    layers = {name: facts(module) for name, module in adapters.items()}
    heads = _heads(model, adapters)
    trained = {f"{head}.{k}": v for head in heads for k, v in model.get_submodule(head).state_dict().items()}
    write_peft(adapters, layers, heads, trained, directory, format, base_model_name_or_path)


def write_peft(
    adapters: dict[str, AdaptedModule],
    layers: dict[str, dict[str, Any]],
    heads: list[str],
    trained: dict[str, Tensor],
    directory: str | Path,
    format: str,
    base_model_name_or_path: str | None,
) -> None:
    """Write adapters, of a model or of a skeleton, with the facts of the layers that they were trained on."""
    if format not in ("lora", "vera"):
        raise ValueError(f"format={format!r} is not allowed; format must be 'lora' or 'vera'.")
    for module in adapters.values():
        module._uora.owner.require_calibrated("an export")
    tensors, settings = (_lora if format == "lora" else _vera)(adapters, layers)
    config = {
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": any(part[4] for layer in layers.values() for part in layer["parts"]),
        "inference_mode": True,
        "modules_to_save": heads or None,
        "target_modules": "|".join(re.escape(name) for name in adapters),
        "task_type": None,
        **settings,
    }
    tensors |= {f"base_model.model.{name}": value for name, value in trained.items()}
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_folder(directory, "adapter_model.safetensors", kept, "adapter_config.json", lambda _: config)


def _lora(
    adapters: dict[str, AdaptedModule], layers: dict[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for name, module in adapters.items():
        A, B, d, b = _factors(name, module, layers[name])
        kernel = layers[name]["kernel"]
        down, up = d[:, None] * A, b[:, None] * B
        if kernel:
            down, up = down.reshape(len(d), -1, *kernel), up.reshape(*up.shape, *(1 for _ in kernel))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    rank = next(iter(adapters.values())).uora_d.numel()
    return tensors, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}


# Note [Two names for saved projections]
# PEFT 0.21 reads base_model.vera_A; 0.19 and 0.20 ignore that name in silence and read
# base_model.vera_A.default. Both are written.


def _vera(
    adapters: dict[str, AdaptedModule], layers: dict[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    shared: list[Tensor] = []
    for name, module in adapters.items():
        if layers[name]["kernel"]:
            raise ValueError(
                f"module {name!r} is a convolution, which PEFT's VeRA does not know; use format='lora'."
            )
        A, B, d, b = _factors(name, module, layers[name])
        if shared and not (_same(shared[0], A) and _same(shared[1], B)):
            raise ValueError(
                f"module {name!r} has other projections than those before it (another shape, or rows "
                "refreshed for one layer), and VeRA knows one A and one B; use format='lora'."
            )
        shared = [A, B]
        tensors[f"base_model.model.{name}.vera_lambda_d"] = d
        tensors[f"base_model.model.{name}.vera_lambda_b"] = b
    for side, projection in zip("AB", shared, strict=True):  # see Note [Two names for saved projections]
        tensors[f"base_model.vera_{side}"] = projection
        tensors[f"base_model.vera_{side}.default"] = projection.clone()
    rank = shared[0].shape[0]
    return tensors, {"peft_type": "VERA", "r": rank, "save_projection": True, "projection_prng_key": 0}


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _factors(name: str, module: AdaptedModule, layer: dict[str, Any]) -> tuple[Tensor, ...]:
    """float32 A, B, d, b of a module that PEFT can say exactly."""
    kind = layer["kind"]
    if layer["parts"][0][0] != "weight" or kind == "NonDynamicallyQuantizableLinear":
        raise ValueError(
            f"module {name!r} ({kind}) is fused attention, which PEFT's format lacks; {USE_MERGE}."
        )
    if not layer["product"]:
        raise ValueError(
            f"module {name!r} ({kind}) computes more than a product, PEFT would not; {USE_MERGE}."
        )
    if not layer["direct"]:
        raise ValueError(
            f"module {name!r} is a grouped, dilated or non-zero-padded convolution, which PEFT's LoRA does "
            f"not compute exactly; {USE_MERGE}."
        )
    tensors = module._uora_tensors(module.adapted_parts[0].n)
    return tuple(t.detach().float() for t in tensors)


def _heads(model: nn.Module, adapters: dict[str, AdaptedModule]) -> list[str]:
    """Modules that were trained whole. Raises for trained parameters that have no place in PEFT's format."""
    heads: list[str] = []
    trained = trained_names(model)
    ids = {id(p) for p in trained.values()}
    for name in trained:
        owner = name.rpartition(".")[0]
        whole = owner and all(id(p) in ids for p in model.get_submodule(owner).parameters())
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
