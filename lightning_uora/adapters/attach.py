"""Adapting a model in place and undoing it exactly: attach, detach, list, switch off; freezing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_uora.adapters.kinds import named_parts
from lightning_uora.adapters.layers import AdaptedModule, adapted_modules
from lightning_uora.adapters.projections import OWNER, Projections, projections_of, require_no_inference_mode
from lightning_uora.adapters.specialise import specialise, unspecialise
from lightning_uora.adapters.targets import Selection, select
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import is_sharded

__all__ = [
    "adapters_disabled",
    "attach_uora",
    "detach_uora",
    "find_owner",
    "find_root",
    "is_adapted",
    "named_adapters",
    "param_groups",
    "projections_of",
]


# Note [Equal bits]
# On some processors torch computes a layer differently in the last bits when its weight wants a gradient, in
# no_grad too (a plain nn.TransformerEncoderLayer differs from itself after requires_grad_(False)). A fresh
# adapter equals the base in the same grad mode and with the same requires_grad of its weights: without a
# graph, and in the factored form, the frozen base; where a graph goes through a merged weight, the base whose
# weight wants a gradient.


def attach_uora(model: nn.Module, config: UORAConfig) -> list[str]:
    """Adapt ``model`` in place and freeze the rest.

    Promises: a fresh adapter leaves every output bit-equal, see Note [Equal bits]; module objects,
    parameters, their names and hooks stay; nothing of the base is copied; the global random state is not
    touched; after an error the model is as it was.

    Args:
        model: Any module, not adapted yet. May be on ``meta``: A and B are then drawn when it gets storage.
        config: What to adapt and how.

    Returns:
        Names of the adapted modules, in model order.

    Raises:
        ValueError: The model is adapted already; targets match nothing (near misses are named), cannot be
            adapted, or hold non-finite weights; the adapted weights are on more than one device.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> attach_uora(model, UORAConfig(rank=4, target_modules=["0"]))
        ['0']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.uora_d', '0.uora_b']

    Source: VeRA (arXiv:2310.11454) and UORA (arXiv:2505.20154); adapting the effective weight in place is
    *ours*.
    """
    require_no_inference_mode("attach_uora")
    if is_adapted(model):
        raise ValueError(
            "model is adapted already; call detach_uora(model) first, or keep the adapters it has."
        )
    selection = select(model, config)
    modules = {name: model.get_submodule(name) for name in selection.adapted}
    parts = {name: named_parts(module) for name, module in modules.items()}
    weights = {(name, part): modules[name]._parameters[part] for name in modules for part in parts[name]}
    device, dtype = _one_device_and_widest_dtype(cast("dict[tuple[str, str], Tensor]", weights))
    widths = {part.n for found in parts.values() for part in found.values()}
    heights = {sum(part.m for part in found.values()) for found in parts.values()}
    owner = Projections(config, widths, heights, device, dtype)
    owner.left = selection.left
    owner.requires_grad_before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.register_module(OWNER, owner)
    try:
        for index, module in enumerate(modules.values()):
            specialise(module, owner, index)
        _freeze(model, selection, config)
    except BaseException:
        detach_uora(model)
        raise
    return list(selection.adapted)


def detach_uora(model: nn.Module, merge: bool = False) -> None:
    """Undo :func:`attach_uora`: classes, state-dict keys and ``requires_grad`` are exactly as before.

    Args:
        model: The adapted model, the same root as was given to :func:`attach_uora`.
        merge: Leave the effective weight in each adapted parameter. It is computed in float32 at least, and
            every one is checked to be finite before any parameter changes.

    Raises:
        ValueError: The model is not adapted, or is sharded, or a merged weight is not finite (it names the
            module).
    """
    owner = projections_of(model)
    if is_sharded(model):
        raise ValueError(
            "model is sharded, and its shards know its adapters; save a checkpoint and detach where "
            "load_from_checkpoint brings it back whole, or merge the file with `uora merge`."
        )
    adapters = dict(adapted_modules(model))
    if merge:
        _merge(adapters)
    for module in adapters.values():
        unspecialise(module)
    del model._modules[OWNER]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(owner.requires_grad_before.get(name, parameter.requires_grad))


def _merge(adapters: dict[str, AdaptedModule]) -> None:
    merged: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for name, module in adapters.items():
            for parameter, weight in module.merged_weights():
                if not weight.isfinite().all():
                    raise ValueError(
                        f"merging would put non-finite values into the weight of module {name!r}; nothing "
                        "was merged."
                    )
                merged.append((parameter, weight))
        for parameter, weight in merged:
            parameter.copy_(weight)


def named_adapters(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """(module name, adapted module) in model order.

    Each module has ``.uora_d`` (r,), ``.uora_b`` (m,) and ``.delta_weight()``, shaped like its weight.
    """
    yield from adapted_modules(model)


def param_groups(
    model: nn.Module, lr: float, vector_lr: float, weight_decay: float | None = None
) -> list[dict[str, object]]:
    """What trains, as groups for an optimizer: the vectors d and b at a rate of their own, not decayed.

    The first group, ``"others"``, is what trains besides the vectors; the second, ``"uora_vectors"``, d and
    b. Of a model without adapters, one group of what trains; so one ``configure_optimizers`` serves both.

    Args:
        model: Any module, most often ``self`` in ``configure_optimizers``.
        lr: Learning rate of what trains besides the vectors (the head, biases).
        vector_lr: Learning rate of d and b: about 1e-2 under AdamW, whatever ``lr`` is.
        weight_decay: For all but the vectors; None: the optimizer's own.

    Raises:
        ValueError: Nothing trains.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> _ = attach_uora(model, UORAConfig(rank=4, target_modules=["0"], trainable_modules=["2"]))
        >>> [(len(group["params"]), group["lr"]) for group in param_groups(model, 1e-3, 3e-2)]
        [(2, 0.001), (2, 0.03)]
    """
    vectors = {id(v) for _, module in adapted_modules(model) for v in (module.uora_d, module.uora_b)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"name": "others", "params": [p for p in trained if id(p) not in vectors], "lr": lr},
        {
            "name": "uora_vectors",
            "params": [p for p in trained if id(p) in vectors],
            "lr": vector_lr,
            "weight_decay": 0.0,
        },
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    if not trained:
        raise ValueError("no parameter of the model trains; call attach_uora or name trainable_modules.")
    return [group for group in groups if group["params"]]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The frozen base's weights inside the ``with``: adapted modules compute as if they had no adapter.

    Bit-equal to the base whose weights want no gradient either, see Note [Equal bits]. Re-entrant;
    restored after exceptions. Heads and biases that were trained stay trained.

    Raises:
        ValueError: The model is not adapted.
    """
    owner = projections_of(model)
    owner.disabled += 1
    try:
        yield
    finally:
        owner.disabled -= 1


def is_adapted(model: nn.Module) -> bool:
    """Whether ``model`` or anything in it has adapters."""
    return any(True for _ in adapted_modules(model))


def find_owner(module: nn.Module) -> tuple[str, Projections | None]:
    """Prefix and owner of A and B of the first adapted root in ``module``; None where there is none."""
    for name, part in module.named_modules():
        owner = part._modules.get(OWNER)
        if isinstance(owner, Projections):
            return f"{name}." if name else "", owner
    return "", None


def find_root(module: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the adapted root in ``module``: itself or the part that was attached to."""
    for name, part in module.named_modules():
        if OWNER in part._modules:
            return name, part
    raise ValueError(f"{type(module).__name__} holds no adapted model; call attach_uora first.")


def _one_device_and_widest_dtype(weights: dict[tuple[str, str], Tensor]) -> tuple[torch.device, torch.dtype]:
    """Where A and B go. Raises for weights on several devices and for non-finite ones."""
    devices = {W.device for W in weights.values()}
    if len(devices) > 1:
        raise ValueError(
            f"adapted weights are on several devices ({', '.join(sorted(map(str, devices)))}); attach "
            "before moving."
        )
    (device,) = devices
    dtype = functools.reduce(torch.promote_types, (W.dtype for W in weights.values()))
    if device.type != "meta":
        finite = torch.stack([torch.stack(W.detach().aminmax()).isfinite().all() for W in weights.values()])
        if not finite.all():
            bad = list(weights)[int(finite.logical_not().nonzero()[0])]
            raise ValueError(
                f"{bad[1]} of module {bad[0]!r} has non-finite values; UORA needs a finite base weight."
            )
    return device, dtype


def _freeze(model: nn.Module, selection: Selection, config: UORAConfig) -> None:
    """Only the vectors, the modules trained as they are and the biases of ``config.bias`` train."""
    adapted = {
        f"{name}.{parameter}" if name else parameter
        for name in selection.adapted
        for parameter in ("uora_d", "uora_b")
    }
    biased = {name for name, _ in adapted_modules(model)}
    heads = tuple(f"{name}." for name in selection.trained)
    bare = set(selection.trained)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        bias = leaf in ("bias", "in_proj_bias") and (
            config.bias == "all" or (config.bias == "adapted" and owner in biased)
        )
        parameter.requires_grad_(name in adapted or name in bare or name.startswith(heads) or bias)
