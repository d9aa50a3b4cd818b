"""A manifest: what an adapter is besides its numbers, as plain data, and whether that can be right.

Configuration, adapted modules, record of refreshes, fingerprints of the frozen base and of A and B. It comes
from files of any origin, so everything is looked at before it is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from lightning_uora.adapters import unpacked
from lightning_uora.config import UORAConfig

__all__ = [
    "SEVERAL",
    "VERSION",
    "check_checkpoint",
    "check_manifest",
    "check_several",
    "check_vectors",
    "config_of",
    "manifests_of",
]

VERSION = 3
SEVERAL = 2
"""Version of what a checkpoint with more than one adapted model holds: a list of manifests."""

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


def check_manifest(manifest: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``manifest`` is one that this version can read; unpacks its record."""
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
        manifest["record"] = unpacked(manifest["record"])
        _check_content(manifest)
        _check_waiting(manifest, where)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{where} is damaged: {error or 'its content is not what it should be'}.") from error


def manifests_of(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests in a checkpoint: one for each adapted model."""
    several = stored.get("several")
    return list(several) if isinstance(several, list) else [stored]


def check_several(stored: dict[str, Any], where: str) -> None:
    """Raise ``ValueError`` unless a folder's list of manifests can be read."""
    _require_known(stored, where)
    manifests, trained = stored["several"], stored.get("trained")
    named = isinstance(trained, list) and all(isinstance(name, str) for name in trained)
    if not (isinstance(manifests, list) and len(manifests) > 1 and named):
        raise ValueError(f"{where} is damaged: it lacks manifests, or names of what trained.")
    for manifest in manifests:
        check_manifest(manifest, where)
        if not isinstance(manifest.get("root"), str) or not isinstance(manifest.get("owner", ""), str):
            raise ValueError(f"{where} is damaged: it lacks root, or has something else in its place.")


def _require_known(stored: Any, where: str) -> None:
    if isinstance(stored, dict) and isinstance(stored.get("version"), int) and stored["version"] > VERSION:
        raise ValueError(
            f"{where} has version {stored['version']}, this package reads up to {VERSION}; update "
            "lightning-uora."
        )


def check_checkpoint(checkpoint: dict[str, Any], where: str) -> None:
    """Raise ``ValueError`` unless a checkpoint's manifests, and what it adds to them, can be read."""
    stored = checkpoint["uora"]
    _require_known(stored, where)
    for manifest in manifests_of(stored) if isinstance(stored, dict) else [stored]:
        check_manifest(manifest, where)
        _check_place(manifest, checkpoint.get("state_dict"), where)


def _check_place(manifest: dict[str, Any], state: Any, where: str) -> None:
    kind, root = manifest.get("kind"), manifest.get("root")
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in state.items()
    )
    wrong = {
        "kind": kind not in ("full", "adapter"),
        "root": not isinstance(root, str) or not isinstance(manifest.get("owner", ""), str),
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
    families = manifest.get("families", [])
    _need(isinstance(families, list) and all(isinstance(one, str) for one in families), "the families")
    for name, layer in manifest["layers"].items():
        _need(isinstance(layer["kind"], str), f"the kind of {name!r}")
        flags = isinstance(layer["product"], bool) and isinstance(layer["direct"], bool)
        kernel = isinstance(layer["kernel"], list) and all(map(_is_count, layer["kernel"]))
        _need(flags and kernel, f"what is told of {name!r}")
        experts = layer.get("experts", 0)
        _need(_is_count(experts) and experts <= WIDEST, f"the experts of {name!r}")
        named = (name.rpartition(".")[2],) if experts else PARTS
        for part, row, m, n, transposed in layer["parts"]:
            sizes = (row, m, n)
            _need(part in named and isinstance(transposed, bool), f"a part of {name!r}")
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


def _check_waiting(manifest: dict[str, Any], where: str) -> None:
    """The adapters that wait beside this one; see Note [Several adapters in a checkpoint]."""
    waiting = manifest.get("waiting", [])
    names = [manifest.get("adapter", "default"), *(one["adapter"] for one in waiting)]
    for name in names:
        _need(isinstance(name, str) and name != "" and "." not in name, f"the adapter's name {name!r}")
    _need(len(set(names)) == len(names), "the names of the adapters")
    _need(sorted(manifest.get("order", names)) == sorted(names), "the order of the adapters")
    for one in waiting:
        _need("waiting" not in one, "what waits beside an adapter that waits")
        _need(sorted(one["besides"].values()) == sorted(one["trained"]), "what trained besides")
        _need(all(key[:2] == "t_" for key in one["besides"]), "what trained besides")
        check_manifest(one, where)


def _need(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} cannot be right")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_vectors(manifest: dict[str, Any], tensors: dict[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` unless d and b of every layer are there, in the sizes that the manifest tells."""
    for name, layer in manifest["layers"].items():
        rank = manifest["config"].get("rank", UORAConfig.rank)
        axis = (layer["experts"],) if layer.get("experts") else ()
        sizes = {"uora_d": rank, "uora_b": sum(part[2] for part in layer["parts"])}
        for vector, size in sizes.items():
            key, shape = ".".join(p for p in (manifest.get("root"), name, vector) if p), (*axis, size)
            if key not in tensors or tuple(tensors[key].shape) != shape:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise ValueError(f"{where} is damaged: {key} should have shape {shape}, but has {found}.")


def config_of(manifest: dict[str, Any], here: UORAConfig | None = None) -> UORAConfig:
    """The configuration of a manifest. Raises ``ValueError`` for unknown fields and wrong values.

    Args:
        manifest: Checked.
        here: Whose ``batch_norm`` counts for files of before it; None: the default.
    """
    known = {field.name for field in dataclasses.fields(UORAConfig)}
    unknown = set(manifest["config"]) - known
    if unknown:
        raise ValueError(
            f"the manifest's configuration has unknown fields: {', '.join(sorted(unknown))}; update "
            "lightning-uora."
        )
    added = {} if here is None else {"batch_norm": here.batch_norm}
    return UORAConfig(**{**added, **manifest["config"]})
