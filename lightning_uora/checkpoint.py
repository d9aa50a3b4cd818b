"""What is written and read back: adapter files, the adapter part of a Lightning checkpoint, fingerprints.

A *manifest* is plain data that says everything but the numbers: configuration, adapted modules, record of
refreshes, and fingerprints of the frozen base and of A and B. Tensors travel beside it: what trained, and the
buffers of the base (frozen BatchNorm moves its statistics in training).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_uora.config import UORAConfig
from lightning_uora.injection import attach_uora, detach_uora, is_adapted, named_adapters
from lightning_uora.layers import facts
from lightning_uora.projection import OWNER, projections_of
from lightning_uora.refresh import rebuild

__all__ = [
    "CheckpointHooks",
    "adapter_state",
    "describe",
    "load_adapter",
    "load_from_checkpoint",
    "restore",
    "save_adapter",
]

VERSION = 1
CONFIG_FILE = "uora_config.json"
TENSOR_FILE = "uora_adapter.safetensors"
STRIDE = 4099

Mismatch = Literal["error", "warn"]


def save_adapter(
    model: nn.Module, directory: str | Path, projections: Literal["record", "full"] = "record"
) -> None:
    """Write an adapter as ``uora_config.json`` and ``uora_adapter.safetensors``.

    Both are written under temporary names and renamed when complete: a crash or a full disk leaves the old
    files.

    Args:
        model: The root that was given to ``attach_uora``.
        directory: Made if it does not exist.
        projections: ``"record"`` stores how A and B came about, a few bytes; ``"full"`` stores them.

    Raises:
        ValueError: The model is not adapted, or ``projections`` is neither of the two.
        OSError: The directory cannot be written.
    """
    if projections not in ("record", "full"):
        raise ValueError(f"projections={projections!r} is not allowed; it must be 'record' or 'full'.")
    manifest = describe(model)
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter_state(model).items()}
    if projections == "full":
        owner = projections_of(model)
        tensors |= {f"{OWNER}.{name}": b.detach().cpu().contiguous() for name, b in owner.named_buffers()}
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
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    check_manifest(manifest, str(folder / CONFIG_FILE))
    if manifest.get("sha256") != _sha256(folder / TENSOR_FILE):
        raise ValueError(
            f"{folder / TENSOR_FILE} is damaged, or is not the file that {CONFIG_FILE} was written with; "
            "copy both from one save."
        )
    try:
        return manifest, load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSOR_FILE} is damaged: {error}") from error


def check_manifest(manifest: Any, where: str) -> None:
    """Raise ``ValueError`` unless ``manifest`` is one that this version can read."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("version"), int):
        raise ValueError(f"{where} is not a UORA manifest: it has no version.")
    if manifest["version"] > VERSION:
        raise ValueError(
            f"{where} has version {manifest['version']}, this package reads up to {VERSION}; update "
            "lightning-uora."
        )
    missing = [
        key
        for key in ("config", "adapted", "layers", "trained", "record", "projections", "base")
        if key not in manifest
    ]
    if missing:
        raise ValueError(f"{where} is damaged: it lacks {', '.join(missing)}.")


def config_of(manifest: dict[str, Any]) -> UORAConfig:
    """The configuration of a manifest. Raises ``ValueError`` for unknown fields and wrong values."""
    known = {field.name for field in dataclasses.fields(UORAConfig)}
    unknown = set(manifest["config"]) - known
    if unknown:
        raise ValueError(f"the manifest's configuration has unknown fields: {', '.join(sorted(unknown))}.")
    return UORAConfig(**manifest["config"])


def describe(model: nn.Module, base: bool = True) -> dict[str, Any]:
    """The manifest of an adapted model: plain data that JSON can hold."""
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
        "projections": {name: _fingerprint(buffer) for name, buffer in owner.named_buffers()},
        "base": {
            n: [*_fingerprint(p), str(p.dtype)] for n, p in model.named_parameters() if not p.requires_grad
        },
    }


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
    names = [name for name, _ in named_adapters(model)]
    if names != list(manifest["adapted"]):
        raise ValueError(
            f"another architecture: the adapter is for {_few(manifest['adapted'])}, this model's are "
            f"{_few(names)}."
        )
    state = adapter_state(model)
    projections = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    values = {k: t for k, t in tensors.items() if not k.startswith(f"{OWNER}.")}
    _check_keys(state, values)
    _check_base(model, manifest["base"], base_mismatch)
    _take_projections(model, manifest, projections)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def _take_projections(model: nn.Module, manifest: dict[str, Any], projections: dict[str, Tensor]) -> None:
    """A and B as given, or from the record; checked against the manifest, and put back after an error."""
    owner = projections_of(model)
    before, record = {name: b.clone() for name, b in owner.named_buffers()}, owner.record
    try:
        owner.record = [dict(entry) for entry in manifest["record"]]
        if projections:
            owner.set(projections)
        else:
            rebuild(model)
        _check_projections(dict(owner.named_buffers()), manifest["projections"])
    except BaseException:
        owner.record = record
        owner.set(before)
        raise


def _check_keys(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
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


def _check_base(model: nn.Module, expected: dict[str, list[Any]], mismatch: Mismatch) -> None:
    parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    wrong = [name for name in expected if name not in parameters]
    wrong += [
        name for name, p in parameters.items() if name in expected and not _same_base(p, expected[name])
    ]
    if wrong:
        message = f"the adapter was trained on another base: {_few(wrong)} differ(s)."
        if mismatch == "error":
            raise ValueError(f"{message} Load that base, or pass base_mismatch='warn'.")
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


# Note [Fingerprints]
# Two numbers for each tensor: a sum with fixed signs and the norm. Another base moves the signed sum by about
# the norm of the difference. They are compared within rounding, not hashed: the same base in another dtype,
# or A drawn by another LAPACK, is the same.


def _fingerprint(t: Tensor) -> list[float]:
    """See Note [Fingerprints]; chunked, so that no second copy of a large weight is made."""
    flat = t.detach().reshape(-1)
    signs = torch.randint(0, 2, (STRIDE,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = signs.mul_(2).sub_(1).to(flat.device)
    whole = flat.numel() // STRIDE * STRIDE
    columns = flat[:whole].reshape(-1, STRIDE).sum(0, dtype=torch.float64)
    total = (columns * signs).sum() + (flat[whole:].double() * signs[: flat.numel() - whole]).sum()
    return [float(total), float(torch.linalg.vector_norm(flat, dtype=torch.float64))]


def _near(found: list[float], expected: list[float], tolerance: float) -> bool:
    room = tolerance * max(expected[1], 1e-30)
    return abs(found[0] - expected[0]) <= room and abs(found[1] - expected[1]) <= room


def _few(names: Any) -> str:
    shown = ", ".join(map(repr, list(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


# Note [Hooks on the instance]
# With save_weights_only=True Lightning calls the module's checkpoint hooks and no callback's, and a
# callback's load hook runs after the weights are loaded. So both of the module's hooks are replaced on the
# instance by these methods, which end in the class's own. They stay after the fit, for
# trainer.save_checkpoint; being bound methods they copy and pickle.


class CheckpointHooks:
    """What a LightningModule's checkpoints get and give, see Note [Hooks on the instance].

    Args:
        module: The LightningModule.
        kind: ``"full"`` keeps the whole state dict; ``"adapter"`` drops the frozen base and A and B.
        base_mismatch: What another base is, when an ``"adapter"`` checkpoint is loaded.
    """

    def __init__(
        self, module: nn.Module, kind: Literal["full", "adapter"], base_mismatch: Mismatch = "error"
    ) -> None:
        self.module, self.kind, self.base_mismatch = module, kind, base_mismatch

    def install(self) -> None:
        """Put the hooks on the module."""
        self.module.__dict__["on_save_checkpoint"] = self.save
        self.module.__dict__["on_load_checkpoint"] = self.load

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the manifest; drop what can be rebuilt from an ``"adapter"`` checkpoint."""
        if is_adapted(self.module):  # it may have been merged and detached since
            self._describe_and_drop(checkpoint)
        own: Any = type(self.module)
        own.on_save_checkpoint(self.module, checkpoint)

    def _describe_and_drop(self, checkpoint: dict[str, Any]) -> None:
        path, root = find_root(self.module)
        prefix = f"{path}." if path else ""
        manifest = describe(root, base=self.kind == "adapter")
        checkpoint["uora"] = {**manifest, "kind": self.kind, "root": path}
        if self.kind == "adapter":
            dropped = {f"{prefix}{name}" for name in manifest["base"]}
            state = checkpoint["state_dict"].items()
            owner = f"{prefix}{OWNER}."
            kept = {k: v for k, v in state if k not in dropped and not k.startswith(owner)}
            checkpoint["state_dict"] = kept

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Complete the checkpoint's state dict with what it left to this module.

        Raises:
            ValueError: Another configuration, architecture or base; missing or unexpected keys; other
            projections.
        """
        if is_adapted(self.module):
            self._complete(checkpoint)
        own: Any = type(self.module)
        own.on_load_checkpoint(self.module, checkpoint)

    def _complete(self, checkpoint: dict[str, Any]) -> None:
        path, root = find_root(self.module)
        prefix = f"{path}." if path else ""
        manifest, state = checkpoint.get("uora"), dict(checkpoint["state_dict"])
        if manifest is None:
            if not any("uora_" in key for key in state):  # the plain model's, from before it was adapted
                state |= {k: v for k, v in self.module.state_dict().items() if "uora_" in k}
        else:
            check_manifest(manifest, "the checkpoint")
            _check_same_config(projections_of(root).config, config_of(manifest))
            if manifest["kind"] == "adapter":
                state = self._completed(root, prefix, manifest, state)
        checkpoint["state_dict"] = state

    def _completed(
        self, root: nn.Module, prefix: str, manifest: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        own = self.module.state_dict()
        frozen = {f"{prefix}{name}" for name in manifest["base"]}
        expected = {k: v for k, v in own.items() if k not in frozen and not k.startswith(f"{prefix}{OWNER}.")}
        _check_keys(expected, state)
        _check_base(root, manifest["base"], self.base_mismatch)
        _take_projections(root, manifest, {})
        current = self.module.state_dict()
        return {key: state.get(key, value) for key, value in current.items()}


def find_root(module: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the adapted root in ``module``: itself or the part that was attached to."""
    for name, part in module.named_modules():
        if OWNER in part._modules:
            return name, part
    raise ValueError(f"{type(module).__name__} holds no adapted model; call attach_uora first.")


def _check_same_config(found: UORAConfig, saved: UORAConfig) -> None:
    fields = [field.name for field in dataclasses.fields(found)]
    different = [name for name in fields if getattr(found, name) != getattr(saved, name)]
    if different:
        shown = "; ".join(f"{n} ({getattr(saved, n)!r} saved, {getattr(found, n)!r} here)" for n in different)
        raise ValueError(f"the checkpoint has adapters of another configuration: {shown}.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that ``UORACallback`` had a hand in, on the CPU; only plain data is unpickled.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of a newer version, or of other making.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's unpickler fails on garbage in any way it can
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "uora" not in checkpoint:
        raise ValueError(
            f"{path} was not made with UORACallback; the class's own load_from_checkpoint reads it."
        )
    check_manifest(checkpoint["uora"], str(path))
    return checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        new = Path(temporary) / target.name
        torch.save(checkpoint, new)
        new.replace(target)


def detached_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of an adapted module after its adapters are merged and gone."""
    detach_uora(find_root(module)[1], merge=True)
    state: dict[str, Tensor] = module.state_dict()
    return state


def load_from_checkpoint(
    module_class: Any, path: str | Path, *, base_mismatch: Mismatch = "error", **kwargs: Any
) -> Any:
    """A LightningModule from a checkpoint of either kind, adapters attached, on the CPU, no Trainer.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint; it is loaded with ``weights_only=True``.
        base_mismatch: ``"warn"`` accepts another base for an ``"adapter"`` checkpoint.
        kwargs: Arguments of ``module_class``, over the saved hyperparameters. For an ``"adapter"`` checkpoint
            they must bring the pretrained base back.

    Raises:
        ValueError: The file is no checkpoint made with ``UORACallback``, or does not fit the module.
    """
    checkpoint = read_checkpoint(path)
    manifest, empty = checkpoint["uora"], io.BytesIO()
    torch.save({**checkpoint, "state_dict": {}}, empty)
    empty.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        module = module_class.load_from_checkpoint(
            empty, map_location="cpu", strict=False, weights_only=True, **kwargs
        )
    if not any(True for _ in named_adapters(module)):
        attach_uora(module.get_submodule(manifest["root"]), config_of(manifest))
    hooks = CheckpointHooks(module, manifest["kind"], base_mismatch)
    hooks.load(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    hooks.install()
    return module


def skeleton(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The adapted modules of a manifest without a base: A, B and the vectors as they were.

    Every layer stands in as a Linear of its size whose weight takes no memory. For exports and tables.

    Raises:
        ValueError: Vectors are missing, or the projections are not those of the run.
    """
    model = nn.Module()
    for name, layer in manifest["layers"].items():
        _place(model, name, layer)
    names = tuple(f"re:{re.escape(name)}" for name in manifest["adapted"])
    free = {
        "target_modules": names,
        "exclude_modules": (),
        "trainable_modules": (),
        "dropout": 0.0,
        "bias": "none",
    }
    attach_uora(model, dataclasses.replace(config_of(manifest), **free))  # type: ignore[arg-type]
    given = {k.removeprefix(f"{OWNER}."): t for k, t in tensors.items() if k.startswith(f"{OWNER}.")}
    given.pop("record", None)
    _take_projections(model, manifest, given)
    with torch.no_grad():
        for name, module in named_adapters(model):
            for vector in ("uora_d", "uora_b"):
                key = f"{name}.{vector}" if name else vector
                if key not in tensors or tensors[key].shape != getattr(module, vector).shape:
                    raise ValueError(f"the adapter lacks {key!r}, or has it in another shape.")
                getattr(module, vector).copy_(tensors[key])
    return model


def _place(model: nn.Module, name: str, layer: dict[str, Any]) -> None:
    """Put a stand-in for one adapted module at its name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    parts = layer["parts"]
    if leaf in model._modules:  # out_proj of an attention that is there
        return
    if parts[0][0] == "weight":
        stand_in: nn.Module = nn.Linear(1, 1, bias=False)
        stand_in.weight = nn.Parameter(torch.zeros(1, 1).expand(parts[0][2], parts[0][3]))
    else:
        sizes = {"kdim": parts[1][3], "vdim": parts[2][3]} if len(parts) == 3 else {}
        stand_in = nn.MultiheadAttention(parts[0][3], 1, **sizes)
    model.add_module(leaf, stand_in)


def merge_state(manifest: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain state dict: the updates in the weights, computed in float32 at least, no UORA left.

    Raises:
        ValueError: A weight or vector is missing, or a merged weight is not finite; the module is named.
    """
    prefix = f"{manifest['root']}." if manifest.get("root") else ""
    inner = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    model = skeleton(manifest, inner)
    merged = {k: t for k, t in state.items() if OWNER not in k and not k.endswith((".uora_d", ".uora_b"))}
    for name, module in named_adapters(model):
        for part in module.adapted_parts:
            key = ".".join(piece for piece in (prefix.rstrip("."), name, part.name) if piece)
            stored = next(p for p in manifest["layers"][name]["parts"] if p[0] == part.name)
            if key not in state:
                raise ValueError(f"the checkpoint lacks {key!r}: it holds adapters without their base.")
            W = state[key]
            wide = torch.promote_types(W.dtype, torch.float32)
            with torch.no_grad():
                A, B, d, b = (t.to(wide) for t in module._uora_tensors(part.n))
                flat = (W.t() if stored[4] else W).to(wide)
                whole = part.delta(flat.reshape(part.m, part.n), A, B, d, b).reshape(flat.shape)
            if not whole.isfinite().all():
                raise ValueError(f"merging would put non-finite values into the weight of module {name!r}.")
            merged[key] = (whole.t() if stored[4] else whole).to(W.dtype).contiguous()
    return merged
