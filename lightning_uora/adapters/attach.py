"""Adapting a model in place and undoing it exactly: attach, detach, list, switch off; freezing."""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast, overload

import torch
from torch import Tensor, nn

from lightning_uora.adapters.attachments import (
    Attachment,
    is_adapted,
    recorded_ids,
    require_attachments,
    trained_parameters,
    vectors_in,
    whole_of,
)
from lightning_uora.adapters.kinds import Part, named_parts
from lightning_uora.adapters.layers import AdaptedModule, adapted_modules
from lightning_uora.adapters.merged import exchange, merged, updates_of, updates_on, whose_heads_stay
from lightning_uora.adapters.names import SHELF, named_modules, named_parameters, unwrapped
from lightning_uora.adapters.norm_statistics import settle_statistics
from lightning_uora.adapters.offloaded import runs_on
from lightning_uora.adapters.opaque import dtype_of, is_opaque, require_linear, tensors_of, working_dtype
from lightning_uora.adapters.projections import OWNER, Projections, require_no_inference_mode
from lightning_uora.adapters.resizing import forget_resizing, watch_resizing
from lightning_uora.adapters.several_layers import LayerOf, layers_of, trained_with
from lightning_uora.adapters.shelf import require_known, switch, the_only
from lightning_uora.adapters.specialise import specialise, unspecialise
from lightning_uora.adapters.stacked import home, named_layers
from lightning_uora.adapters.targets import Selection, select
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import is_sharded

__all__ = [
    "adapters_disabled",
    "attach_beside",
    "attach_to",
    "attach_uora",
    "detach_uora",
    "named_adapters",
    "param_groups",
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
    touched; after an error the model is unchanged. What trains is decided and recorded here: a later
    ``freeze()`` does not change what is saved.

    Args:
        model: Any module without adapters, compiled or not. It may be on ``meta``: A and B are then drawn
            when it gets storage.
        config: What to adapt and how.

    Returns:
        Names of the adapted modules, in model order, without what ``torch.compile`` and other wrappers add.

    Raises:
        ValueError: The model is already adapted; targets match nothing (near misses are named), cannot be
            adapted, or hold non-finite weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> attach_uora(model, UORAConfig(rank=4, target_modules=["0"]))
        ['0']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.uora_d', '0.uora_b']

    Source: VeRA (arXiv:2310.11454) and UORA (arXiv:2505.20154); adapting the effective weight in place is
    *ours*.
    """
    if is_adapted(model):
        raise ValueError(
            "model is already adapted; call detach_uora(model) first, or keep the adapters it has."
        )
    return attach_beside(model, config)


def attach_beside(model: nn.Module, config: UORAConfig) -> list[str]:
    """As :func:`attach_uora`, of a model that may have adapters on other modules."""
    require_no_inference_mode("attach_uora")
    root = unwrapped(model)
    selection = select(root, config)
    attach_to(root, config, selection)
    for one in selection.said:
        warnings.warn(one, stacklevel=3)
    return list(selection.adapted)


def attach_to(
    root: nn.Module, config: UORAConfig, selection: Selection, key: str | None = None
) -> Attachment:
    """Adapt exactly the modules of ``selection``, by plain names, and freeze the rest.

    Args:
        root: A plain module.
        config: What to adapt and how.
        selection: Which modules, and what trains as it is.
        key: What to call the owner of A and B at the root; None: the first name that is free.
    """
    named = named_layers(root)
    modules = {name: named[name] for name in selection.adapted}
    parts = {name: named_parts(module) for name, module in modules.items()}
    general = working_dtype(root)
    for name, module in modules.items():
        if is_opaque(module):
            require_linear(name, module, general)
    device, dtype = _device_and_widest_dtype(modules, parts, general)
    widths = {part.n for found in parts.values() for part in found.values()}
    heights = {sum(part.m for part in found.values()) for found in parts.values()}
    owner = Projections(config, widths, heights, device, dtype)
    owner.left, owner.kept, owner.adapted = selection.left, selection.kept, selection.adapted
    owner.requires_grad_before = {n: p.requires_grad for n, p in named_parameters(root, every=True).items()}
    owner.root = weakref.ref(root)
    key = next(k for k in itertools.chain((key,), _keys()) if k is not None and k not in root._modules)
    root.register_module(key, owner)
    one = Attachment("", root, owner, key)
    try:
        for index, module in enumerate(modules.values()):
            specialise(module, owner, index)
        _freeze(one, selection, config)
        settle_statistics(root)
        watch_resizing(one)
    except BaseException:
        _detach(one)
        raise
    return one


def _keys() -> Iterator[str]:
    """Names for the owners at one root."""
    yield OWNER
    yield from (f"{OWNER}_{number}" for number in itertools.count(2))


def detach_uora(
    model: nn.Module,
    merge: bool = False,
    dequantize: bool = False,
    name: str | Mapping[str, float] | None = None,
) -> None:
    """Undo :func:`attach_uora`: classes, state-dict keys and ``requires_grad`` are exactly as before.

    If there are several adapters, all of them go.

    Args:
        model: The adapted model, a module around it (every adapted model inside is detached), or a part of it
            (only the adapters in that part go).
        merge: Leave the effective weight in each adapted parameter. It is computed in float32 at least, and
            all are checked to be finite before any parameter changes. If another module shares the weight,
            that module keeps the old one, and the adapted module gets the merged one for itself.
        dequantize: With ``merge``, replace every adapted quantised layer with a plain ``nn.Linear``, in the
            dtype that its weight stands for. In a quantised weight, rounding would lose the update.
        name: Which adapter to merge; its heads stay. None: the active one. A mapping, such as
            ``{"one": 0.7, "two": 0.3}``, merges the weighted sum of their updates, which is exact; if one of
            them has trained heads, those stay.

    Raises:
        ValueError: The model is not adapted or is sharded; a merged weight is not finite (the module is
            named); an adapted layer is quantised and ``dequantize`` is False; the adapters to be summed have
            different heads. The model is then unchanged.
    """
    found = require_attachments(model, "detach_uora")
    if is_sharded(model):
        raise ValueError(
            "model is sharded, and a sharded model cannot be detached; save a checkpoint, then "
            "detach the module that load_from_checkpoint returns, or merge the file with `uora "
            "merge`."
        )
    if dequantize and not merge:
        raise ValueError(
            "dequantize=True needs merge=True; without merging, quantised layers stay quantised."
        )
    _refuse_in_a_mixed_batch(found, "detach_uora")
    if not (name is None or isinstance(name, (str, Mapping))):
        raise ValueError(
            f"name={name!r} is not allowed; name must be an adapter's name, or a mapping from names "
            "to weights."
        )
    if isinstance(name, Mapping) and not merge:
        raise ValueError(
            "name can be a mapping only with merge=True; without it, give one adapter's name or None."
        )
    plain: list[tuple[nn.Module, nn.Linear]] = []
    before = found[0].owner.name
    try:
        if name is not None:
            switch(model, whose_heads_stay(model, name) if isinstance(name, Mapping) else name)
            found = require_attachments(model, "detach_uora")
        if merge:
            updates = updates_of(found[0], name) if isinstance(name, Mapping) else updates_on(found)
            plain = merged(model, updates, dequantize)
    except BaseException:
        if name is not None and found[0].owner.name != before:
            switch(model, before)
        raise
    for one in reversed(found):  # the first one knows how it was before all of them
        _detach(one)
    exchange(model, plain)
    for one in found:  # with it go those that waited
        one.root._modules.pop(SHELF, None)
    for _, copied in list(adapted_modules(model)):  # whose A and B are registered nowhere
        unspecialise(copied)


def _refuse_in_a_mixed_batch(found: list[Attachment], action: str) -> None:
    if any(one.owner.mixing for one in found):
        raise ValueError(
            f"{action} inside use_adapters would change the batch that is running; leave the `with` "
            "block first."
        )


def _detach(one: Attachment) -> None:
    within, whole = one.within, whole_of(one)
    for _, adapted in one.layers:
        unspecialise(adapted)
    if whole is not None and whole.key is not None and not whole.layers:  # of a part too, the owner goes
        forget_resizing(whole)
        del whole.root._modules[whole.key]
        settle_statistics(whole.root)
        one, within = whole, ""
    parameters = named_parameters(one.root, every=True)
    for name, before in one.owner.requires_grad_before.items():
        if name.startswith(within) and (p := parameters.get(name.removeprefix(within))) is not None:
            p.requires_grad_(before)


@overload
def named_adapters(model: nn.Module, name: None = None) -> Iterator[tuple[str, AdaptedModule]]: ...
@overload
def named_adapters(model: nn.Module, name: str) -> Iterator[tuple[str, AdaptedModule | LayerOf]]: ...
def named_adapters(
    model: nn.Module, name: str | None = None
) -> Iterator[tuple[str, AdaptedModule]] | Iterator[tuple[str, AdaptedModule | LayerOf]]:
    """The adapted modules with their names, in model order; names are without what wrappers add.

    Each has ``.uora_d`` (r,), ``.uora_b`` (m,) and ``.delta_weight()``, which has the shape of its weight.

    Args:
        model: Any module.
        name: Which adapter; None: the active one. For an inactive one you get stand-ins for its modules, with
            the same three attributes.

    Raises:
        ValueError: No adapter has that name.
    """
    if name is not None:
        require_known(model, name)
        one = the_only(model, "named_adapters")
        if one.owner.name != name:
            found = layers_of(one, name)
            yield from ((p, found[p]) for p in named_layers(one.root) if p in found)
            return
    yield from ((name, m) for name, m in named_modules(model).items() if isinstance(m, AdaptedModule))


def param_groups(
    model: nn.Module,
    lr: float,
    vector_lr: float,
    weight_decay: float | None = None,
    name: str | None = None,
) -> list[dict[str, object]]:
    """Optimizer groups of what trains: the vectors d and b with their own rate and no weight decay, the rest.

    The first group, ``"others"``, holds what trains besides the vectors. The second, ``"uora_vectors"``,
    holds d and b. A model without adapters gives one group, so one ``configure_optimizers`` serves both.

    Args:
        model: Any module, usually ``self`` in ``configure_optimizers``.
        lr: Learning rate of what trains besides the vectors (the head, biases).
        vector_lr: Learning rate of d and b: usually 0.01 to 0.05 under AdamW, whatever ``lr`` is.
        weight_decay: For everything but the vectors; None: the optimizer's own.
        name: Which of several adapters, active or not, to train several at once. Its groups are then called
            ``"NAME/others"`` and ``"NAME/uora_vectors"``. None: the active one.

    Raises:
        ValueError: Nothing trains, or no adapter has that name.

    Example:
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> _ = attach_uora(model, UORAConfig(rank=4, target_modules=["0"], trainable_modules=["2"]))
        >>> [(len(group["params"]), group["lr"]) for group in param_groups(model, 1e-3, 3e-2)]
        [(2, 0.001), (2, 0.03)]
    """
    if name is None:
        vectors = {id(v) for v in vectors_in(model)}
        trained: list[Tensor] = list(trained_parameters(model).values())
    else:
        require_known(model, name)
        one = the_only(model, "param_groups")
        own = [v for layer in layers_of(one, name).values() for v in (layer.uora_d, layer.uora_b)]
        vectors = set(map(id, own))
        trained = own + list(trained_with(one, name, named_parameters(one.root, every=True)).values())
        trained = list({id(p): p for p in trained}.values())
    of = "" if name is None else f"{name}/"
    groups: list[dict[str, object]] = [
        {"name": f"{of}others", "params": [p for p in trained if id(p) not in vectors], "lr": lr},
        {
            "name": f"{of}uora_vectors",
            "params": [p for p in trained if id(p) in vectors],
            "lr": vector_lr,
            "weight_decay": 0.0,
        },
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    if not trained:
        raise ValueError(
            "no parameter of the model trains; call attach_uora first, or unfreeze what should train."
        )
    return [group for group in groups if group["params"]]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the ``with``, the model computes with the frozen base's weights, as if it had no adapter.

    Outputs are bit-equal to those of a base whose weights want no gradient either, see Note [Equal bits]. You
    can nest it, and the adapters come back after exceptions too. Trained heads and biases stay trained.

    Args:
        model: The adapted model, a module around it, or a part of it.

    Raises:
        ValueError: The model is not adapted.
    """
    found = require_attachments(model, "adapters_disabled")
    _refuse_in_a_mixed_batch(found, "adapters_disabled")
    owners = {id(m._uora.owner): m._uora.owner for _, m in adapted_modules(model)}
    owners |= {id(one.owner): one.owner for one in found}
    for owner in owners.values():
        owner.disabled += 1
    try:
        yield
    finally:
        for owner in owners.values():
            owner.disabled -= 1


def _device_and_widest_dtype(
    modules: dict[str, nn.Module], parts: dict[str, dict[str, Part]], general: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Where A and B go: to the first weight. Raises for non-finite weights."""
    opaque = {name for name, module in modules.items() if is_opaque(module)}
    first = next(iter(modules.values()))
    device = runs_on(home(first), next(iter(tensors_of(first).values())))
    weights = {
        (name, part): cast(Tensor, home(modules[name])._parameters[part])
        for name in modules
        for part in parts[name]
        if name not in opaque
    }
    dtypes = [*(W.dtype for W in weights.values()), *(dtype_of(modules[name], general) for name in opaque)]
    dtype = functools.reduce(torch.promote_types, dtypes)
    here = {key: W for key, W in weights.items() if W.device.type != "meta"}
    if here:
        found = [torch.stack(W.detach().aminmax()).isfinite().all() for W in here.values()]
        finite = torch.stack([one.to(found[0].device) for one in found])
        if not finite.all():
            bad = list(here)[int(finite.logical_not().nonzero()[0])]
            raise ValueError(
                f"{bad[1]} of module {bad[0]!r} has non-finite values; UORA needs a finite base weight."
            )
    return device, dtype


def _freeze(one: Attachment, selection: Selection, config: UORAConfig) -> None:
    """Only the vectors, the modules trained as they are and the biases of ``config.bias`` train.

    What other adapters at this root train goes on to do so. A weight that is tied trains as a whole.
    """
    trains = recorded_ids(one.root)
    heads, bare = tuple(f"{name}." for name in selection.trained), set(selection.trained)
    kept = tuple(f"{name}." for name in selection.kept)
    biased = {name for name, _ in one.layers}
    for path, module in named_modules(one.root).items():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in trains:
                continue
            name = f"{path}.{leaf}" if path else leaf
            of = path if leaf in ("bias", "in_proj_bias") else name.removesuffix("_bias")  # experts': w_bias
            bias = (of == path or (of != name and of in biased)) and (
                (config.bias == "all" and not name.startswith(kept))
                or (config.bias != "none" and of in biased)
            )
            if name in bare or name.startswith(heads) or (bias and not selection.exact):
                one.owner.trained.append(name)
    trains = recorded_ids(one.root)
    for parameter in one.root.parameters():
        parameter.requires_grad_(id(parameter) in trains)
