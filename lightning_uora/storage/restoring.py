"""From an adapted model to its manifest and tensors, and back: all of it, or an error and nothing.

Beside the manifest travel what trained, and the buffers of the base (frozen BatchNorm moves).
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_uora.adapters import OWNER, facts, named_adapters, projections_of
from lightning_uora.config import require_choice
from lightning_uora.distributed import first_rank, reshard_
from lightning_uora.reinit import rebuild_around
from lightning_uora.storage.fingerprints import fingerprint, near
from lightning_uora.storage.manifest import VERSION

__all__ = ["Mismatch", "adapter_state", "check_base", "check_keys", "check_names", "describe", "restore"]
__all__ += ["take_projections"]

Mismatch = Literal["error", "warn"]


def describe(model: nn.Module, base: bool = True) -> dict[str, Any]:
    """The manifest of an adapted model: plain data that JSON can hold. If sharded, every rank must ask."""
    reshard_(model)
    owner = projections_of(model)
    config = dataclasses.asdict(owner.config)
    return {
        "version": VERSION,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "adapted": [name for name, _ in named_adapters(model)],
        "layers": {name: facts(module) for name, module in named_adapters(model)},
        "trained": [
            n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(("uora_d", "uora_b"))
        ],
        "record": [dict(entry) for entry in owner.record],
        "calibrated": owner.calibrated,
        "projections": {name: fingerprint(buffer) for name, buffer in owner.named_buffers()},
        "base": _base_prints(model) if base else {},
    }


def _base_prints(model: nn.Module) -> dict[str, list[Any]]:
    """Fingerprints of the frozen parameters, taken again only where a parameter has changed."""
    known, prints = projections_of(model).base_prints, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            continue
        if isinstance(p, DTensor):  # nothing is remembered: all ranks must ask for the same shards
            prints[name] = [*fingerprint(p), str(p.dtype)]
        else:
            key = (p.data_ptr(), p._version, p.dtype)
            if name not in known or known[name][0] != key:
                known[name] = (key, [*fingerprint(p), str(p.dtype)])
            prints[name] = known[name][1]
    return prints


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter is besides its manifest: trained parameters, and the buffers of the base."""
    own = tuple(name for name, module in model.named_modules() if module is projections_of(model))
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {n: b for n, b in model.named_buffers() if n in persistent and not n.startswith(f"{own[0]}.")}
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | buffers


def restore(
    model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], base_mismatch: Mismatch = "error"
) -> None:
    """Load an adapter into a model adapted with its configuration. After an error nothing has changed.

    Raises:
        ValueError: Other modules, keys, shapes, another base, or projections that are not those of the run.
    """
    check_names(model, manifest)
    state = adapter_state(model)
    projections = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    values = {k: t for k, t in tensors.items() if not k.startswith(f"{OWNER}.")}
    check_keys(state, values)
    check_base(model, manifest["base"], base_mismatch)
    take_projections(model, manifest, projections)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def check_names(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the manifest is of a model with the same adapted and trained names."""
    names = [name for name, _ in named_adapters(model)]
    if names != list(manifest["adapted"]):
        raise ValueError(
            f"another architecture: the adapter is for {_few(manifest['adapted'])}, this model's are "
            f"{_few(names)}."
        )


def take_projections(model: nn.Module, manifest: dict[str, Any], projections: dict[str, Tensor]) -> None:
    """A and B as given, the rest from the record; checked against the manifest, put back after an error."""
    owner = projections_of(model)
    before, record = {name: b.clone() for name, b in owner.named_buffers()}, owner.record
    calibrated = owner.calibrated
    try:
        owner.record = [dict(entry) for entry in manifest["record"]]
        owner.calibrated = manifest.get("calibrated", False)
        if set(projections) >= set(manifest["projections"]):
            owner.set(projections)
        else:
            owner.require_known(projections)
            rebuild_around(model, projections)
        _check_projections(dict(owner.named_buffers()), manifest["projections"])
    except BaseException:
        owner.record, owner.calibrated = record, calibrated
        owner.set(before)
        raise


def check_keys(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless both have the same names and shapes."""
    missing, unexpected = [k for k in state if k not in values], [k for k in values if k not in state]
    if missing or unexpected:
        parts = [
            f"{what} {_few(keys)}"
            for what, keys in (("lacks", missing), ("has unexpected", unexpected))
            if keys
        ]
        raise ValueError(
            f"the adapter {' and '.join(parts)}; is it of another model, or were other modules trained?"
        )
    for name, value in values.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the adapter and {tuple(state[name].shape)} in "
                "the model."
            )


def check_base(model: nn.Module, expected: dict[str, list[Any]], mismatch: Mismatch) -> None:
    """Raise ``ValueError``, or warn, unless the frozen parameters are those of the fingerprints."""
    require_choice("base_mismatch", mismatch, ("error", "warn"))
    parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    wrong = [name for name in expected if name not in parameters]
    wrong += [
        name for name, p in parameters.items() if name in expected and not _same_base(p, expected[name])
    ]
    if wrong:
        message = f"the adapter was trained on another base: {_few(wrong)} differ(s)."
        if mismatch == "error":
            raise ValueError(f"{message} Load that base, or pass base_mismatch='warn'.")
        if first_rank():
            warnings.warn(message, stacklevel=4)


def _same_base(p: Tensor, expected: list[Any]) -> bool:
    total, norm, dtype = expected
    tolerance = 1e-5 if str(p.dtype) == dtype else 1e-2
    return near(fingerprint(p), [total, norm], tolerance)


def _check_projections(buffers: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    wrong = [n for n in expected if n not in buffers or not near(fingerprint(buffers[n]), expected[n], 1e-2)]
    if wrong or set(buffers) - set(expected):
        raise ValueError(
            f"the projections {_few(wrong or sorted(set(buffers) - set(expected)))} are not those of the "
            "run; the record is damaged, or this platform draws otherwise (then save with "
            "projections='full')."
        )


def _few(names: Any) -> str:
    shown = ", ".join(map(repr, list(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
