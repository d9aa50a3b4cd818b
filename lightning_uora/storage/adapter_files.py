"""Adapter folders: two files, written whole or not at all, read with every check before the model changes."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_uora.adapters import (
    OWNER,
    Attachment,
    Selection,
    activated,
    adapter_names,
    attach_to,
    attachment_of,
    detach_uora,
    is_adapted,
    named_adapters,
    named_modules,
    packed,
    put_back,
    put_off,
    require_attachments,
    require_free,
    settle_beside,
    shelf_of,
    the_only,
    trained_parameters,
    undo,
    unwrapped,
)
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import first_rank, is_sharded, whole
from lightning_uora.storage.manifest import (
    check_manifest,
    check_several,
    check_vectors,
    config_of,
    manifests_of,
)
from lightning_uora.storage.placing import Place, place_of, renamed
from lightning_uora.storage.restoring import (
    Mismatch,
    adapter_state,
    describe,
    require_finite,
    restore,
    trained_state,
)
from lightning_uora.storage.several_roots import describe_several, load_several
from lightning_uora.storage.verifying import difference, require_same

__all__ = ["BASE", "load_adapter", "load_onto_base", "read", "save_adapter", "write_folder"]

CONFIG_FILE = "uora_config.json"
TENSOR_FILE = "uora_adapter.safetensors"


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    projections: Literal["record", "full"] = "record",
    name: str | None = None,
) -> None:
    """Save an adapter to a folder, as ``uora_config.json`` and ``uora_adapter.safetensors``.

    Both files are written under temporary names, read back, compared and then renamed: after a crash, or on a
    full or faulty disk, the old files are still there. The folder holds everything that trained, even if you
    froze it since. If the model is sharded, every process must call this; the first one writes.

    Args:
        model: The adapted model, a module around it, or a part that holds all that was trained. Names in the
            file are relative to it. If it holds several adapted models, they go into one folder.
        directory: Made if it does not exist.
        projections: ``"record"`` stores how to rebuild A and B, a few bytes (with ``init="inputs"`` also A,
            in float16, which is exact); ``"full"`` stores A and B.
        name: Which adapter, with the heads that were trained with it; None: the active one.

    Raises:
        ValueError: The model is not adapted or not calibrated, or holds only a part of what was trained;
            ``projections`` is neither of the two; ``name`` is given, and there are several adapted models.
        OSError: The directory cannot be written, or what was written does not read back the same.
    """
    if projections not in ("record", "full"):
        raise ValueError(f"projections={projections!r} is not allowed; it must be 'record' or 'full'.")
    with activated(model, name):
        _save(model, directory, projections)


def _save(model: nn.Module, directory: str | Path, projections: Literal["record", "full"]) -> None:
    found = require_attachments(model, "saving an adapter")
    if len(found) > 1 and all(one.key is not None for one in found):
        _save_several(model, found, directory, projections)
        return
    one = seen_from(model)
    owner = one.owner
    owner.require_calibrated("saving an adapter")
    manifest = describe(one)
    require_finite({name: whole(t.detach()) for name, t in trained_state(one).items()}, "the model", "saved")
    tensors = {name: whole(t.detach()).cpu().contiguous() for name, t in adapter_state(one).items()}
    if is_sharded(model) and not first_rank():
        return
    given = dict(owner.named_buffers()) if projections == "full" else owner.stored()
    tensors |= {f"{OWNER}.{name}": b.detach().cpu().contiguous() for name, b in given.items()}
    write_folder(
        directory,
        TENSOR_FILE,
        tensors,
        CONFIG_FILE,
        lambda path: {**manifest, "record": packed(manifest["record"]), "sha256": _sha256(path)},
    )


def _save_several(
    model: nn.Module, found: list[Attachment], directory: str | Path, projections: Literal["record", "full"]
) -> None:
    """See Note [Several adapted models in a folder]."""
    trained = {name: whole(p.detach()) for name, p in trained_parameters(model).items()}
    require_finite(trained, "the model", "saved")
    stored, tensors = describe_several(model, found, projections)
    if is_sharded(model) and not first_rank():
        return
    write_folder(
        directory, TENSOR_FILE, tensors, CONFIG_FILE, lambda path: {**stored, "sha256": _sha256(path)}
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
        told = config(new_tensors)
        new_config.write_text(json.dumps(told, indent=1))
        _compare(new_tensors, tensors, new_config, told)
        new_tensors.chmod(
            new_config.stat().st_mode
        )  # safetensors writes for the owner alone, whatever the umask
        new_tensors.replace(folder / tensor_file)
        new_config.replace(folder / config_file)


def _compare(tensor_file: Path, tensors: dict[str, Tensor], config_file: Path, told: dict[str, Any]) -> None:
    """Raise ``OSError`` unless what was written reads back as it was given."""
    found = load_file(tensor_file)
    require_same(difference({n: tensors[n] for n in sorted(tensors)}, {n: found[n] for n in sorted(found)}))
    require_same(None if json.loads(config_file.read_text()) == told else config_file.name)


def seen_from(model: nn.Module) -> Attachment:
    """The adapted model in ``model``, with names as of ``model`` where that holds all of it."""
    one = attachment_of(model, "saving an adapter")
    return Attachment("", model, one.owner, one.key) if one.path else one


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    base_mismatch: Mismatch = "error",
    *,
    name: str = "default",
    head: bool = True,
) -> list[str]:
    """Put a saved adapter on its base. After an error the model is unchanged.

    If the model already has adapters, give this one a new name: it is added and becomes the active one. The
    adapter may come from a module around this model, or from a part of it: the names are matched, and a
    warning says how.

    Args:
        model: The base, on any device and in any dtype.
        directory: What :func:`save_adapter` wrote.
        base_mismatch: ``"warn"`` loads onto another base with a warning, and does not load a head that does
            not fit.
        name: What to call the adapter on this model.
        head: False does not load the head that was trained with the adapter; the model's own head trains.

    Returns:
        Names of the adapted modules, in model order.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of a newer version, or belongs to another adapter, architecture or
            base; its head does not fit.
    """
    manifest, tensors = read(directory)
    if len(manifests_of(manifest)) > 1:
        load_several(model, manifest, tensors, base_mismatch, head, name)
        return [layer for layer, _ in named_adapters(model)]
    if not is_adapted(model):
        require_free(model, name)
        return _load(model, manifest, tensors, base_mismatch, head, name)
    if name in adapter_names(model):
        raise ValueError(
            f"model is already adapted, by {name!r}; give this adapter another name=, remove that one, or "
            "call detach_uora(model) first."
        )
    require_free(model, name)
    one = the_only(model, "load_adapter")
    before, root, kept = one.owner.name, one.root, one.owner.requires_grad_before
    put_off(one)
    try:
        _load(model, manifest, tensors, base_mismatch, head, name, beside=one)
    except BaseException:
        put_back(root, before)
        raise
    new = attachment_of(root, "load_adapter")
    new.owner.requires_grad_before = kept
    shelf_of(new).share()
    return [layer for layer, _ in named_adapters(model)]


BASE = "(base)"
"""An adapter that computes nothing, so that the base and its own heads stay the base."""


def load_onto_base(
    model: nn.Module, directory: str | Path, base_mismatch: Mismatch, name: str, head: bool
) -> None:
    """As :func:`load_adapter`; on a model without adapters it comes beside one called ``BASE``."""
    if is_adapted(model):
        load_adapter(model, directory, base_mismatch, name=name, head=head)
        return
    manifest, tensors = read(directory)
    if len(manifests_of(manifest)) > 1:
        raise ValueError(
            "the folder holds several adapted models, but a bank serves only one; load it with load_adapter."
        )
    place = place_of(unwrapped(model), manifest, tensors, head, base_mismatch == "warn")
    first = manifest["adapted"][0].removeprefix(place.without)
    nothing = UORAConfig(rank=1, target_modules=(first,), trainable_modules=())
    attach_to(place.root, nothing, Selection((first,), ()))
    attachment_of(place.root, "load_adapter").owner.name = BASE
    try:
        load_adapter(model, directory, base_mismatch, name=name, head=head)
    except BaseException:
        detach_uora(place.root)
        raise


def _load(
    model: nn.Module,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    base_mismatch: Mismatch,
    head: bool,
    called: str,
    beside: Attachment | None = None,
) -> list[str]:
    config, lenient = config_of(manifest), base_mismatch == "warn"
    if beside is None:
        place = place_of(unwrapped(model), manifest, tensors, head, lenient)
    else:
        place = _place_beside(beside, unwrapped(model), manifest, tensors, head, lenient)
    manifest = {
        **manifest,
        "adapted": [place.name_of(name) for name in manifest["adapted"]],
        "layers": renamed(manifest["layers"], place),
        "base": renamed(manifest["base"], place),
    }
    tensors = renamed(tensors, place)
    trained = list(renamed(dict.fromkeys(manifest["trained"]), place))
    chosen = Selection(
        tuple(manifest["adapted"]),
        (*(n for n in trained if n not in place.aside), *place.head),
    )
    one = attach_to(place.root, config, chosen)
    one.owner.name = called
    if beside is not None:  # what is known of the base need not be found again
        one.owner.base_prints = beside.owner.base_prints
    try:
        if beside is not None:
            settle_beside(one, called)
        restore(one, manifest, tensors, base_mismatch, place.aside, shared=beside is not None)
    except BaseException:
        undo(one)
        raise
    if place.said and first_rank():
        warnings.warn(place.said, stacklevel=3)
    return [name for name, _ in named_adapters(model)]


def _place_beside(
    one: Attachment,
    model: nn.Module,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    head: bool,
    lenient: bool,
) -> Place:
    """Where another adapter belongs in the root of those that are there: in the part given, if it fits."""
    inside = {id(module): path for path, module in named_modules(one.root).items()}
    try:
        place = place_of(model if id(model) in inside else one.root, manifest, tensors, head, lenient)
    except ValueError:
        place = place_of(one.root, manifest, tensors, head, lenient)
    return place.within(one.root, inside[id(place.root)])


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a saved adapter, checked to be whole and to belong together."""
    folder = Path(directory)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: it is not an adapter folder, or not a complete one."
            )
    try:
        manifest = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    where = str(folder / CONFIG_FILE)
    several = isinstance(manifest, dict) and "several" in manifest
    if several:
        check_several(manifest, where)
    else:
        check_manifest(manifest, where)
    if manifest.get("sha256") != _sha256(folder / TENSOR_FILE):
        raise ValueError(
            f"{folder / TENSOR_FILE} is damaged, or comes from another save than {CONFIG_FILE}; copy "
            "both from one save."
        )
    try:
        tensors = load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSOR_FILE} is damaged: {error}") from error
    for one in manifests_of(manifest):
        check_vectors(one, tensors, str(folder / TENSOR_FILE))
    return manifest, tensors


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
