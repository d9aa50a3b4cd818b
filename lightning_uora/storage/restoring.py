"""From an adapted model to its manifest and tensors, and back: all of it, or an error and nothing.

Beside the manifest travel what trained, and the buffers of the base (frozen BatchNorm moves).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_uora.adapters import (
    OWNER,
    AdaptedAround,
    AdaptedModule,
    Attachment,
    Projections,
    adopt,
    facts,
    is_offloaded,
    is_opaque,
    kept_elsewhere,
    named_buffers,
    named_layers,
    named_modules,
    named_parameters,
    settle_,
    trained_names,
    trained_parameters,
)
from lightning_uora.config import require_choice
from lightning_uora.distributed import first_rank, reshard_
from lightning_uora.reinit import rebuild_around
from lightning_uora.storage.fingerprints import fingerprint, near, sample
from lightning_uora.storage.manifest import VERSION

__all__ = ["Mismatch", "adapter_state", "check_base", "check_keys", "check_names", "describe", "restore"]
__all__ += ["few", "frozen_parameters", "quantised_prefixes", "require_finite", "require_modules"]
__all__ += ["take_projections", "told", "trained_state"]

Mismatch = Literal["error", "warn"]


def describe(one: Attachment, base: bool = True) -> dict[str, Any]:
    """The manifest of an adapted model: plain data that JSON can hold. If sharded, every rank must ask.

    Raises:
        ValueError: An adapted module is no longer in the model, or lies outside of the part that was given.
    """
    reshard_(one.root)
    adopt(one.root)
    layers = dict(sorted(one.layers, key=lambda layer: layer[1].layer_index))
    _require_whole(one, layers)
    known = {name: facts(module) for name, module in layers.items()}
    manifest = told(one.owner, known, list(trained_names(one.root)))
    if found := _families(one.root):
        manifest["families"] = found
    return manifest | ({"base": _base_prints(one)} if base else {})


def _families(model: nn.Module) -> list[str]:
    """What transformers calls the models in it: an export from a file asks PEFT by these names."""
    models = (module for module in model.modules() if hasattr(module, "base_model_prefix"))
    kinds = (getattr(getattr(module, "config", None), "model_type", None) for module in models)
    return sorted({kind for kind in kinds if isinstance(kind, str) and kind})


def told(owner: Projections, layers: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    """A manifest without fingerprints of a base."""
    config = dataclasses.asdict(owner.config)
    return {
        "version": VERSION,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "adapted": list(layers),
        "layers": layers,
        "trained": trained,
        "record": [dict(entry) for entry in owner.record],
        "calibrated": owner.calibrated,
        "projections": {name: fingerprint(buffer) for name, buffer in owner.matrices.items()},
        "base": {},
        **({"resized": list(owner.resized)} if owner.resized else {}),
    }


def _require_whole(one: Attachment, layers: Mapping[str, AdaptedModule]) -> None:
    here = {module.layer_index for module in layers.values()}
    gone = [name for index, name in enumerate(one.owner.adapted) if index not in here]
    if gone and one.key is not None:
        raise ValueError(
            f"adapted modules are no longer in the model: {few(gone)}. They were replaced or detached "
            "after attach_uora, and what they learned is not here."
        )
    outside = [n for n in one.owner.trained if not n.startswith(one.within)] if one.key is None else []
    if gone or outside:
        raise ValueError(
            f"this part does not hold everything that was trained, such as {few(gone or outside)}; "
            "pass the model that you gave to attach_uora, or a part that holds it all."
        )


def _base_prints(one: Attachment) -> dict[str, list[Any]]:
    """Fingerprints of the frozen parameters, taken again only where a parameter has changed."""
    known, prints = one.owner.base_prints, {}
    for name, p in frozen_parameters(one.root).items():
        if isinstance(p, DTensor):  # nothing is remembered: all ranks must ask for the same shards
            prints[name] = [*fingerprint(p), str(p.dtype)]
        else:
            key = (p.data_ptr(), p._version, p.dtype, sample(p))
            if name not in known or known[name][0] != key:
                known[name] = (key, [*fingerprint(p), str(p.dtype)])
            prints[name] = known[name][1]
    return prints


def frozen_parameters(root: nn.Module) -> dict[str, Tensor]:
    """The base: what does not train, by plain name; of quantised modules the packed buffers too.

    Offloaded parameters as they are kept, see Note [Offloaded layers].
    """
    for module in root.modules():
        if isinstance(module, AdaptedAround) or is_opaque(module):
            settle_(module)
    trained = set(trained_parameters(root))
    prefixes, own = quantised_prefixes(root), _owned(root)
    packed = {n: b for n, b in named_buffers(root).items() if n.startswith(prefixes) and id(b) not in own}
    found = {name: p for name, p in (named_parameters(root) | packed).items() if name not in trained}
    for path, module in named_modules(root).items():
        for leaf in module._parameters if is_offloaded(module) else ():
            name = f"{path}.{leaf}".lstrip(".")
            kept = kept_elsewhere(module, leaf) if name in found else None
            found |= {} if kept is None else {name: kept}
    return found


def _owned(root: nn.Module) -> set[int]:
    """Identities of A and B."""
    return {id(b) for m in root.modules() if isinstance(m, Projections) for b in m.buffers()}


def quantised_prefixes(root: nn.Module) -> tuple[str, ...]:
    """What the names of everything in quantised modules begin with."""
    modules = named_modules(root).items()
    return tuple(f"{n}." if n else "" for n, m in modules if isinstance(m, AdaptedAround) or is_opaque(m))


def adapter_state(one: Attachment) -> dict[str, Tensor]:
    """What an adapter is besides its manifest: trained parameters, and the buffers of the base."""
    own = _owned(one.root)
    base = frozen_parameters(one.root)
    buffers = {n: b for n, b in named_buffers(one.root).items() if id(b) not in own and n not in base}
    return trained_state(one) | buffers


def trained_state(one: Attachment) -> dict[str, Tensor]:
    """The vectors, and what trains besides."""
    vectors = {f"{n}.{v}".lstrip("."): getattr(m, v) for n, m in one.layers for v in ("uora_d", "uora_b")}
    return vectors | trained_names(one.root)


def require_finite(tensors: Mapping[str, Tensor], where: str, action: str) -> None:
    """Raise ``ValueError`` where something that trained has become NaN or infinite."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"non-finite values in {few(bad)} of {where}; nothing was {action}.")


def restore(
    one: Attachment,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    base_mismatch: Mismatch = "error",
    aside: Collection[str] = (),
    shared: bool = False,
) -> None:
    """Load an adapter into a model adapted with its configuration. After an error nothing has changed.

    Args:
        one: The adapted model.
        manifest: Of the adapter.
        tensors: Likewise.
        base_mismatch: What another base is.
        aside: Tensors of a head that stay where they are, in the file and in the model.
        shared: Other adapters are there: running statistics stay the model's, with a warning.

    Raises:
        ValueError: Other modules, keys, shapes, another base, or projections that are not those of the run.
    """
    check_names(one, manifest)
    heads = {name.rpartition(".")[0] for name in aside} - {""}
    whole = adapter_state(one)
    state = {n: t for n, t in whole.items() if n not in aside and n.rpartition(".")[0] not in heads}
    projections = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    values = {k: t for k, t in tensors.items() if not k.startswith(f"{OWNER}.") and k not in aside}
    check_keys(state, values)
    trained = trained_state(one)
    require_finite({n: t for n, t in values.items() if n in trained}, "the adapter", "loaded")
    check_base(one, manifest["base"], base_mismatch)
    take_projections(one, manifest, projections)
    moved = [n for n, t in values.items() if n not in trained and not torch.equal(state[n].cpu(), t.cpu())]
    if shared and moved and first_rank():
        warnings.warn(
            f"the adapter was trained with other running statistics ({few(moved)}). All adapters on a "
            "model share them, so the model keeps its own, and outputs may differ.",
            stacklevel=5,
        )
    with torch.no_grad():
        for name, value in values.items():
            if not (shared and name in moved):
                state[name].copy_(value)


def require_modules(root: nn.Module, names: list[str]) -> None:
    """Raise ``ValueError`` unless ``root`` has all modules that an adapter is for."""
    modules = named_layers(root)
    lacking = [name for name in names if name not in modules]
    if lacking:
        raise ValueError(
            f"another architecture: the adapter is for {few(names)}, but this model has no {few(lacking)}."
        )


def check_names(one: Attachment, manifest: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the manifest is of a model with the same adapted names."""
    names = [name for name, _ in sorted(one.layers, key=lambda layer: layer[1].layer_index)]
    if names != list(manifest["adapted"]):
        raise ValueError(
            f"another architecture: the adapter is for {few(manifest['adapted'])}, but this model has "
            f"adapters at {few(names)}."
        )


def take_projections(one: Attachment, manifest: dict[str, Any], projections: dict[str, Tensor]) -> None:
    """A and B as given, the rest from the record; checked against the manifest, put back after an error."""
    owner = one.owner
    before, record = {name: b.clone() for name, b in owner.named_buffers()}, owner.record
    calibrated = owner.calibrated
    try:
        owner.record = [dict(entry) for entry in manifest["record"]]
        owner.calibrated = manifest.get("calibrated", False)
        owner.resized = list(manifest.get("resized", ()))
        if set(projections) >= set(manifest["projections"]):
            known = manifest["projections"]
            owner.set({n: M for n, M in projections.items() if n.removesuffix(":at") in known})
        else:
            owner.require_known(projections)
            rebuild_around(one, projections)
        _check_projections(owner, manifest["projections"])
    except BaseException:
        owner.record, owner.calibrated = record, calibrated
        owner.set(before)
        raise


def check_keys(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless both have the same names and shapes."""
    missing, unexpected = [k for k in state if k not in values], [k for k in values if k not in state]
    if missing or unexpected:
        parts = [
            f"{what} {few(keys)}"
            for what, keys in (("lacks", missing), ("has unexpected", unexpected))
            if keys
        ]
        raise ValueError(
            f"the adapter {' and '.join(parts)}; is it for another model, or were other modules trained?"
        )
    for name, value in values.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the adapter and {tuple(state[name].shape)} in "
                "the model; build the model with as many classes or tokens as it had."
            )


def check_base(one: Attachment, expected: dict[str, list[Any]], mismatch: Mismatch) -> None:
    """Raise ``ValueError``, or warn, unless the frozen parameters are those of the fingerprints."""
    require_choice("base_mismatch", mismatch, ("error", "warn"))
    prints = _base_prints(one)
    wrong = [name for name in expected if name not in prints]
    wrong += [n for n, found in prints.items() if n in expected and not _same_base(found, expected[n])]
    if wrong:
        message = f"the adapter was trained on another base (different: {few(wrong)})."
        if mismatch == "error":
            raise ValueError(
                f"{message} Load that base, or pass base_mismatch='warn' to load_adapter or "
                "load_from_checkpoint (and then fit without ckpt_path)."
            )
        if first_rank():
            warnings.warn(message, stacklevel=4)


def _same_base(found: list[Any], expected: list[Any]) -> bool:
    tolerance = 1e-5 if found[2] == expected[2] else 1e-2
    return near(found[:2], expected[:2], tolerance)


def _check_projections(owner: Projections, expected: dict[str, list[float]]) -> None:
    """Against fingerprints of what there is; of a layer's whole A and B in files of before."""
    wrong = [name for name in expected if not _is_as_expected(owner, name, expected[name])]
    wrong = wrong or sorted(n for n in owner.matrices if not {n, n.partition(":")[0]} & set(expected))
    if wrong:
        raise ValueError(
            f"the projections {few(wrong)} are not those of the run; the record is damaged, "
            "or this platform draws other numbers (then save with projections='full' on the "
            "platform of the run)."
        )


def _is_as_expected(owner: Projections, name: str, expected: list[float]) -> bool:
    found = owner.matrices.get(name)
    if found is None and ":" not in name:
        try:
            found = owner.current(name)
        except (KeyError, ValueError):
            return False
    # in 16 bits a refresh rounds at every step: sums of a few hundred numbers differ by some percent
    tolerance = 1e-2 if found is None or found.element_size() > 2 else 5e-2
    return found is not None and near(fingerprint(found), expected, tolerance)


def few(names: Any) -> str:
    """The first of some names, for an error."""
    shown = ", ".join(map(repr, list(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
