"""What a saved adapter holds, by its manifest and tensors: a table of what is there and how large it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from lightning_uora.adapters import OWNER, SHELF

__all__ = ["contents"]

SHOWN = 3
"""Names of a kind that are spelled out."""


def contents(
    source: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizers: Any = None
) -> Table:
    """A rich table: what it is, its files on disk, and the bytes of each kind of tensor in them.

    Args:
        source: The adapter folder or the checkpoint.
        manifest: Its manifest.
        tensors: Its tensors, by the names in the file.
        optimizers: The optimizer states of a checkpoint; their tensors are counted.
    """
    table, sizes = Table(title=str(source), show_header=False), _bytes(manifest, tensors)
    table.add_row("what", _what(manifest, sizes))
    for path in sorted(source.glob("uora_*")) if source.is_dir() else [source]:
        table.add_row(path.name, f"{path.stat().st_size:,} bytes on disk")
    config = ", ".join(f"{name}={value!r}" for name, value in manifest["config"].items())
    table.add_row("configuration", config)
    names = [manifest.get("adapter", "default"), *(one["adapter"] for one in manifest.get("waiting", ()))]
    if len(names) > 1:
        table.add_row(
            "adapters", f"{names[0]} (active), {', '.join(names[1:])}; all else here is about {names[0]}"
        )
    table.add_row("adapted modules", _names(manifest["adapted"]))
    record = manifest["record"]
    rows = sum(len(chosen) for entry in record for chosen in entry["rows"].values())
    table.add_row("refreshes", f"{len(record)}, {rows:,} rows and columns")
    named = {"also trained": f" in {_names(manifest['trained'])}"}
    for title, count in [*sizes.items(), ("optimizer states", _tensor_bytes(optimizers))]:
        if count:
            table.add_row(title, f"{count:,} bytes{named.get(title, '')}")
    return table


def _what(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The kind of file in a sentence or two: what is in it, and what it needs to be whole."""
    if manifest.get("kind") == "full":
        return "a full checkpoint: the whole model with its adapters"
    kind = "an adapter checkpoint" if "kind" in manifest else "an adapter folder"
    if sizes["B"]:
        held = "A and B are stored"
    elif sizes["A"]:
        held = "A, from the inputs, is stored in float16; B is rebuilt from the seed and the refreshes"
    else:
        held = "A and B are rebuilt from the seed and the refreshes"
    return f"{kind}, without its base model; {held}"


def _names(names: list[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}" if names else "none"


def _bytes(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    prefix = f"{manifest['root']}." if manifest.get("root") else ""
    trained = {f"{prefix}{name}" for name in manifest["trained"]}
    sizes = {"d and b": 0, "A": 0, "B": 0, "record of the refreshes": 0}
    sizes |= {"also trained": 0, "inactive adapters": 0, "the rest of the model": 0}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in ("uora_d", "uora_b"):
            kind = "d and b"
        elif SHELF in name.split("."):
            kind = "inactive adapters"
        elif OWNER in name.split("."):
            kind = {"A": "A", "B": "B"}.get(name.rpartition(".")[2][:1], "record of the refreshes")
        else:
            kind = "also trained" if name in trained else "the rest of the model"
        sizes[kind] += _tensor_bytes(tensor)
    return sizes


def _tensor_bytes(node: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(node, Tensor):
        return node.numel() * node.element_size()
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ()
    return sum(map(_tensor_bytes, inner))
