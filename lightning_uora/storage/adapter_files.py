"""Adapter folders: two files, written whole or not at all, read with every check before the model changes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_uora.adapters import OWNER, attach_uora, detach_uora, projections_of
from lightning_uora.distributed import first_rank, is_sharded, whole
from lightning_uora.storage.manifest import check_manifest, check_vectors, config_of
from lightning_uora.storage.restoring import Mismatch, adapter_state, describe, restore

__all__ = ["load_adapter", "read", "save_adapter", "write_folder"]

CONFIG_FILE = "uora_config.json"
TENSOR_FILE = "uora_adapter.safetensors"


def save_adapter(
    model: nn.Module, directory: str | Path, projections: Literal["record", "full"] = "record"
) -> None:
    """Write an adapter as ``uora_config.json`` and ``uora_adapter.safetensors``.

    Both are written under temporary names and renamed when complete: a crash or a full disk leaves the old
    files. If the model is sharded every rank must call this, and the first one writes.

    Args:
        model: The root that was given to ``attach_uora``.
        directory: Made if it does not exist.
        projections: ``"record"`` stores how A and B came about, a few bytes (and, with ``init="inputs"``, A
            in float16, which is exact); ``"full"`` stores them.

    Raises:
        ValueError: The model is not adapted or not calibrated, or ``projections`` is neither of the two.
        OSError: The directory cannot be written.
    """
    if projections not in ("record", "full"):
        raise ValueError(f"projections={projections!r} is not allowed; it must be 'record' or 'full'.")
    owner = projections_of(model)
    owner.require_calibrated("saving an adapter")
    manifest = describe(model)
    tensors = {name: whole(t.detach()).cpu().contiguous() for name, t in adapter_state(model).items()}
    if is_sharded(model) and not first_rank():
        return
    given = dict(owner.named_buffers()) if projections == "full" else owner.stored()
    tensors |= {f"{OWNER}.{name}": b.detach().cpu().contiguous() for name, b in given.items()}
    write_folder(
        directory, TENSOR_FILE, tensors, CONFIG_FILE, lambda path: {**manifest, "sha256": _sha256(path)}
    )


def write_folder(
    directory: str | Path,
    tensor_file: str,
    tensors: dict[str, Tensor],
    config_file: str,
    config: Callable[[Path], dict[str, Any]],
) -> None:
    """Write a safetensors and a JSON file under temporary names, then rename both.

    Args:
        directory: Made if it does not exist.
        tensor_file: Name of the safetensors file.
        tensors: What goes into it.
        config_file: Name of the JSON file.
        config: Makes its content from the path of the finished safetensors file.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new_tensors, new_config = Path(temporary) / tensor_file, Path(temporary) / config_file
        save_file(tensors, new_tensors)
        new_config.write_text(json.dumps(config(new_tensors), indent=1))
        new_tensors.chmod(
            new_config.stat().st_mode
        )  # safetensors writes for the owner alone, whatever the umask
        new_tensors.replace(folder / tensor_file)
        new_config.replace(folder / config_file)


def load_adapter(model: nn.Module, directory: str | Path, base_mismatch: Mismatch = "error") -> list[str]:
    """Adapt a plain model as a saved adapter says, and load it. After an error the model is as it was.

    Args:
        model: The base, not adapted; any device and dtype.
        directory: What :func:`save_adapter` wrote.
        base_mismatch: ``"warn"`` loads onto another base with a warning.

    Returns:
        Names of the adapted modules, in model order.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of a newer version, or belongs to another adapter, architecture or
            base.
    """
    manifest, tensors = read(directory)
    names = attach_uora(model, config_of(manifest))
    try:
        restore(model, manifest, tensors, base_mismatch)
    except BaseException:
        detach_uora(model)
        raise
    return names


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a saved adapter, checked to be whole and to belong together."""
    folder = Path(directory)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: it is not an adapter folder, or not a whole one."
            )
    try:
        manifest = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    check_manifest(manifest, str(folder / CONFIG_FILE))
    if manifest.get("sha256") != _sha256(folder / TENSOR_FILE):
        raise ValueError(
            f"{folder / TENSOR_FILE} is damaged, or is not the file that {CONFIG_FILE} was written with; "
            "copy both from one save."
        )
    try:
        tensors = load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSOR_FILE} is damaged: {error}") from error
    check_vectors(manifest, tensors, str(folder / TENSOR_FILE))
    return manifest, tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
