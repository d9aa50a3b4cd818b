"""What an adapter is besides its numbers, and what makes it right.

A *manifest* is plain data: configuration, adapted modules, record of refreshes, and fingerprints of the
frozen base and of A and B. Tensors travel beside it: what trained, and the buffers of the base (frozen
BatchNorm moves).
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_uora.config import UORAConfig, require_choice
from lightning_uora.injection import named_adapters
from lightning_uora.layers import facts
from lightning_uora.projection import OWNER, projections_of
from lightning_uora.ranks import first_rank
from lightning_uora.refresh import rebuild_around
from lightning_uora.sharding import reshard_, whole

__all__ = [
    "Mismatch",
    "adapter_state",
    "check_base",
    "check_checkpoint",
    "check_keys",
    "check_manifest",
    "check_names",
    "check_vectors",
    "config_of",
    "describe",
    "restore",
    "take_projections",
]

VERSION = 1


STRIDE = 4099


WIDEST = 1 << 24
"""No layer has more features; nothing in a file may say so."""


SHAPE = {
    "config": dict,
    "adapted": list,
    "layers": dict,
    "trained": list,
    "record": list,
    "projections": dict,
    "base": dict,
}
"""What a manifest holds, and as what."""


PARTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters that are ever adapted."""


Mismatch = Literal["error", "warn"]


def check_manifest(manifest: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``manifest`` is one that this version can read."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("version"), int):
        raise ValueError(f"{where} is not a UORA manifest: it has no version.")
    if manifest["version"] > VERSION:
        raise ValueError(
            f"{where} has version {manifest['version']}, this package reads up to {VERSION}; update "
            "lightning-uora."
        )
    missing = [key for key in SHAPE if key not in manifest]
    if missing:
        raise ValueError(f"{where} is damaged: it lacks {', '.join(missing)}.")
    try:
        _check_content(manifest)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{where} is damaged: {error or 'its content is not what it should be'}.") from error


def check_checkpoint(checkpoint: dict[str, Any], where: str) -> None:
    """Raise ``ValueError`` unless a checkpoint's manifest, and what a checkpoint adds to it, can be read."""
    check_manifest(checkpoint["uora"], where)
    kind, root = checkpoint["uora"].get("kind"), checkpoint["uora"].get("root")
    state = checkpoint.get("state_dict")
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in state.items()
    )
    wrong = {
        "kind": kind not in ("full", "adapter"),
        "root": not isinstance(root, str),
        "state_dict": not tensors,
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ValueError(f"{where} is damaged: it lacks {name}, or has something else in its place.")


# Note [Files from others]
# A manifest is data from anywhere. Everything that is indexed, multiplied or used as a name later is looked
# at first: types, ranges, that the rank is the one of the stored vectors, so that no memory is taken for
# what a few bytes claim. Names are only ever paths inside a model, never of files.


def _check_content(manifest: dict[str, Any]) -> None:
    """See Note [Files from others]. Raises any of what a wrong type raises, or with a reason."""
    for key, kind in SHAPE.items():
        _need(isinstance(manifest[key], kind), f"{key} is a {type(manifest[key]).__name__}")
    rank = manifest["config"].get("rank", UORAConfig.rank)
    _need(_is_count(rank) and rank > 0, f"rank {rank!r}")
    for name in (*manifest["adapted"], *manifest["trained"], *manifest["layers"]):
        _need((isinstance(name, str) and all(name.split("."))) or name == "", f"the name {name!r}")
    _need(sorted(manifest["adapted"]) == sorted(manifest["layers"]), "the list of adapted modules")
    for name, layer in manifest["layers"].items():
        _need(isinstance(layer["kind"], str), f"the kind of {name!r}")
        flags = isinstance(layer["product"], bool) and isinstance(layer["direct"], bool)
        kernel = isinstance(layer["kernel"], list) and all(map(_is_count, layer["kernel"]))
        _need(flags and kernel, f"what is told of {name!r}")
        for part, row, m, n, transposed in layer["parts"]:
            sizes = (row, m, n)
            _need(part in PARTS and isinstance(transposed, bool), f"a part of {name!r}")
            _need(all(map(_is_count, sizes)) and max(sizes) <= WIDEST, f"the sizes {sizes} of {name!r}")
    for entry in manifest["record"]:
        _need(_is_count(entry["step"]), f"the step {entry['step']!r} of a refresh")
        _need(0.0 <= float(entry["interpolation"]) <= 1.0, "the interpolation of a refresh")
        for key, rows in entry["rows"].items():
            limit = WIDEST if key.endswith(":rows") else rank
            counts = isinstance(rows, list) and all(map(_is_count, rows))
            _need(counts and max(rows, default=0) < limit, f"the rows of {key!r}")
        candidates = entry.get("candidates", 0)
        _need(_is_count(candidates) and candidates <= WIDEST, "the candidates of a refresh")
        for picked in entry.get("picked", {}).values():
            counts = isinstance(picked, list) and all(map(_is_count, picked))
            _need(counts and max(picked, default=0) < max(candidates, rank), "the candidates of a refresh")
    for prints in (*manifest["projections"].values(), *manifest["base"].values()):
        numbers = isinstance(prints, list) and all(isinstance(n, (int, float)) for n in prints[:2])
        _need(numbers and len(prints) >= 2, "a fingerprint")
    _need(all(len(prints) == 3 for prints in manifest["base"].values()), "a fingerprint of the base")


def _need(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} cannot be right")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_vectors(manifest: dict[str, Any], tensors: dict[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` unless d and b of every layer are there, in the sizes that the manifest tells."""
    for name, layer in manifest["layers"].items():
        rank = manifest["config"].get("rank", UORAConfig.rank)
        sizes = {"uora_d": rank, "uora_b": sum(part[2] for part in layer["parts"])}
        for vector, size in sizes.items():
            key = ".".join(piece for piece in (manifest.get("root"), name, vector) if piece)
            if key not in tensors or tuple(tensors[key].shape) != (size,):
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise ValueError(f"{where} is damaged: {key} should have shape ({size},), and has {found}.")


def config_of(manifest: dict[str, Any]) -> UORAConfig:
    """The configuration of a manifest. Raises ``ValueError`` for unknown fields and wrong values."""
    known = {field.name for field in dataclasses.fields(UORAConfig)}
    unknown = set(manifest["config"]) - known
    if unknown:
        raise ValueError(f"the manifest's configuration has unknown fields: {', '.join(sorted(unknown))}.")
    return UORAConfig(**manifest["config"])


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
        "projections": {name: _fingerprint(buffer) for name, buffer in owner.named_buffers()},
        "base": _base_prints(model) if base else {},
    }


def _base_prints(model: nn.Module) -> dict[str, list[Any]]:
    """Fingerprints of the frozen parameters, taken again only where a parameter has changed."""
    known, prints = projections_of(model).base_prints, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            continue
        if isinstance(p, DTensor):  # nothing is remembered: all ranks must ask for the same shards
            prints[name] = [*_fingerprint(p), str(p.dtype)]
        else:
            key = (p.data_ptr(), p._version, p.dtype)
            if name not in known or known[name][0] != key:
                known[name] = (key, [*_fingerprint(p), str(p.dtype)])
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
    return _near(_fingerprint(p), [total, norm], tolerance)


def _check_projections(buffers: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    wrong = [
        n for n in expected if n not in buffers or not _near(_fingerprint(buffers[n]), expected[n], 1e-2)
    ]
    if wrong or set(buffers) - set(expected):
        raise ValueError(
            f"the projections {_few(wrong or sorted(set(buffers) - set(expected)))} are not those of the "
            "run; the record "
            "is damaged, or this platform draws otherwise (then save with projections='full')."
        )


def _fingerprint(t: Tensor) -> list[float]:
    """See Note [Fingerprints]; chunked, so that no second copy of a large weight is made."""
    flat = whole(t.detach()).reshape(-1)
    signs = torch.randint(0, 2, (STRIDE,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = signs.mul_(2).sub_(1).to(flat.device)
    full = flat.numel() // STRIDE * STRIDE
    columns = flat[:full].reshape(-1, STRIDE).sum(0, dtype=torch.float64)
    total = (columns * signs).sum() + (flat[full:].double() * signs[: flat.numel() - full]).sum()
    return [float(total), float(torch.linalg.vector_norm(flat, dtype=torch.float64))]


def _near(found: list[float], expected: list[float], tolerance: float) -> bool:
    room = tolerance * max(expected[1], 1e-30)
    return abs(found[0] - expected[0]) <= room and abs(found[1] - expected[1]) <= room


def _few(names: Any) -> str:
    shown = ", ".join(map(repr, list(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
