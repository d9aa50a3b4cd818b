"""Modules whose weight cannot be read: quantised ones, of bitsandbytes, torchao and others by their shape."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_uora.adapters.offloaded import KEPT_FORWARD

__all__ = [
    "PACKS",
    "dequantised",
    "dtype_of",
    "is_opaque",
    "is_quantised",
    "packed_parts",
    "plain_linear",
    "require_linear",
    "settle_",
    "sizes",
    "tensors_of",
    "unreachable",
    "working_dtype",
]

LIBRARIES = ("bitsandbytes", "torchao")

# Note [What is opaque]
# A linear map that keeps its weight in a form of its own: a parameter of a quantising library's class, or of
# less than 16 bits, or packed numbers in buffers (GPTQ, AWQ and their like). Such a module computes by
# itself, forward and backward towards x; the adapter's product is added to what comes out. Nothing of its
# weight is read, but by the library's own way (or by the images of unit vectors) where it is to be merged.


def is_quantised(t: Tensor) -> bool:
    """Whether a weight is packed: of a quantising library's class, or of less than 16 bits."""
    if isinstance(t, DTensor):
        return False
    return type(t).__module__.startswith(LIBRARIES) or not t.is_floating_point() or t.element_size() < 2


def is_opaque(module: nn.Module) -> bool:
    """See Note [What is opaque]."""
    m, n = (getattr(module, name, None) for name in ("out_features", "in_features"))
    inside = [
        name for name in module._modules if not name.startswith("uora_")
    ]  # A and B, where it is the root
    if not (isinstance(m, int) and isinstance(n, int) and m > 0 and n > 0) or inside:
        return False
    weight = module._parameters.get("weight")
    if weight is not None:
        return not isinstance(weight, nn.parameter.UninitializedParameter) and is_quantised(weight)
    return any(is_quantised(t) for t in tensors_of(module).values())


def unreachable(name: str, module: nn.Module) -> str | None:
    """Why a module's forward on its instance keeps it from being adapted around; None where nothing does."""
    if "forward" not in module.__dict__ or KEPT_FORWARD in module.__dict__:
        return None
    return (
        f"module {name!r} ({type(module).__name__}) is quantised and its instance has a forward "
        "of its own, which would bypass the adapter; exclude it with exclude_modules."
    )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers that are there, but for the adapter's."""
    named = [*module._parameters.items(), *module._buffers.items()]
    return {name: t for name, t in named if t is not None and not name.startswith("uora_")}


def sizes(module: nn.Module) -> tuple[int, int]:
    """Out features m and in features n."""
    return cast(int, module.out_features), cast(int, module.in_features)


def dtype_of(module: nn.Module, otherwise: torch.dtype = torch.float32) -> torch.dtype:
    """Of the numbers that the weight stands for; ``otherwise`` where the module does not tell.

    Eight bits of bitsandbytes without a bias tell nothing: see :func:`working_dtype`.
    """
    weight: Any = module._parameters.get("weight")
    known = getattr(getattr(weight, "quant_state", None), "dtype", None) or getattr(weight, "dtype", None)
    floats = [t.dtype for t in tensors_of(module).values() if t.is_floating_point() and t.element_size() > 1]
    for dtype in (known, *floats):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return otherwise


def working_dtype(model: nn.Module) -> torch.dtype:
    """Of most of the numbers that are not packed, adapters left out; float32 where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if not is_opaque(module):
            for name, p in module._parameters.items():
                if p is not None and not name.startswith("uora_") and not is_quantised(p):
                    counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


# Note [Another packing on CPUs]
# Where a CPU has AVX-512 BF16, a 4-bit layer of bitsandbytes packs its weight otherwise at the first forward
# without gradients: scales are rounded, and from then on no gradient goes back to its input. Adapted layers
# keep the form they have; what was packed before is put back, as the library's own state dict does.

PACKS = "support_avx512bf16_for_cpu"


def settle_(module: nn.Module) -> None:
    """Put back a packing of which nothing can be trained, see Note [Another packing on CPUs]."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        module._save_to_state_dict({}, "", False)


TOLERANCE = 0.1
"""How far, of its norm, the image of a sum may be from the sum of images: inputs may be rounded to 8 bits."""


@torch.no_grad()
def require_linear(name: str, module: nn.Module, general: torch.dtype) -> None:
    """Raise ``ValueError`` where a packed module that no library vouches for is seen not to be a linear map.

    It is asked for the images of a few rows; not on ``meta``, offloaded, or where it refuses them.

    Args:
        name: Of the module.
        module: It is opaque.
        general: The model's working dtype.
    """
    (m, n), tensors = sizes(module), list(tensors_of(module).values())
    known = type(module) is nn.Linear or type(module).__module__.startswith(LIBRARIES)
    if known or KEPT_FORWARD in module.__dict__ or any(t.is_meta for t in tensors):
        return
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 4, n, generator=generator).to(tensors[0].device) for _ in range(2))
    x, y = (t.to(dtype_of(module, general)) for t in (x, y))
    training, packs = [(one, one.training) for one in module.modules()], module.__dict__.get(PACKS)
    module.eval()
    if packs is not None:
        module.__dict__[PACKS] = False
    try:
        images = [module.forward(t) for t in (x + y, x, y, torch.zeros_like(x))]  # past a user's hooks
    except Exception:  # kernels for other devices, inputs of another form: nothing can be told
        return
    finally:
        for one, was in training:
            one.training = was
        if packs is not None:
            module.__dict__[PACKS] = packs
    if not all(isinstance(image, Tensor) and image.shape == (1, 4, m) for image in images):
        found = [
            tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images
        ]
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) is quantised and not a linear map: inputs of "
            f"shape {tuple(x.shape)} give {found[0]}, but its out_features is {m}; exclude it with "
            "exclude_modules."
        )
    of_sum, of_x, of_y, of_zero = (image.float() for image in images)
    if (of_sum + of_zero - of_x - of_y).norm() > TOLERANCE * (of_sum - of_zero).norm():
        raise ValueError(
            f"module {name!r} ({type(module).__name__}) is quantised and not a linear map: f(x + y) + "
            "f(0) differs from f(x) + f(y); exclude it with exclude_modules."
        )


@torch.no_grad()
def dequantised(module: nn.Module, forward: Any) -> Tensor:
    """The weight that the module stands for, (m, n), float32.

    Args:
        module: The module.
        forward: Its own forward, without an adapter; asked for the images of unit vectors where the library
            has no way of its own.
    """
    settle_(module)
    weight: Any = module._parameters.get("weight")
    m, n = sizes(module)
    if getattr(weight, "quant_state", None) is not None:
        functional: Any = sys.modules["bitsandbytes"].functional
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state)).reshape(m, n).float()
    if weight is not None and type(weight).__module__.startswith("torchao"):
        return cast(Tensor, weight.dequantize()).float()
    if (
        weight is not None and weight.is_floating_point() and weight.shape == (m, n)
    ):  # to be packed when moved
        return cast(Tensor, weight.detach().as_subclass(Tensor)).float()
    device = next(iter(tensors_of(module).values())).device
    eye = torch.eye(n, dtype=dtype_of(module), device=device)
    images: Tensor = forward(eye) - forward(torch.zeros_like(eye[:1]))
    return images.t().float()


def plain_linear(module: nn.Module, weight: Tensor) -> nn.Linear:
    """An ``nn.Linear`` of that weight with the module's bias."""
    bias = module._parameters.get("bias", module._buffers.get("bias"))
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return linear.train(module.training)


def packed_parts(t: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight consists of; itself where it is plain."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None or not type(t).__module__.startswith(LIBRARIES):
        yield t
        return
    for name in flatten()[0]:
        inner = getattr(t, name)
        if isinstance(inner, Tensor):
            yield from packed_parts(inner)
