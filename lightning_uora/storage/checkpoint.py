"""Lightning checkpoints of both kinds, without Lightning: the module's hooks, reading, loading."""

from __future__ import annotations

import inspect
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_uora.adapters import OWNER, attach_uora, find_root, is_adapted, named_adapters, projections_of
from lightning_uora.config import UORAConfig, differences
from lightning_uora.distributed import is_sharded
from lightning_uora.storage.folders import what_folder
from lightning_uora.storage.manifest import check_checkpoint, check_manifest, check_vectors, config_of
from lightning_uora.storage.restoring import (
    Mismatch,
    check_base,
    check_keys,
    check_names,
    describe,
    take_projections,
)
from lightning_uora.storage.unpickling import torch_modules_allowed, unpickled

__all__ = ["CheckpointHooks", "load_from_checkpoint", "read_checkpoint", "save_checkpoint"]


# Note [Strategies that load weights first]
# ModelParallelStrategy loads the weights before any hook, buffer by buffer of the fresh module: it knows
# neither the record of refreshes nor a layer's own copies of A and B, and sends B, whose columns are
# contiguous, as if its rows were (torch, set_model_state_dict with broadcast_from_rank0). So a sharded module
# saves A and B beside the manifest as well, in one storage with the state dict's, and the load hook, which
# then finds no state dict, puts them and the record where they belong. Where another strategy saved the
# checkpoint they are rebuilt from the record.

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
        if self.kind == "adapter":
            projections_of(root).require_calibrated("an adapter checkpoint")
        prefix = f"{path}." if path else ""
        manifest = describe(root, base=self.kind == "adapter")
        checkpoint["uora"] = {**manifest, "kind": self.kind, "root": path}
        if self.kind == "full" and is_sharded(root):
            saved = checkpoint["state_dict"]
            checkpoint["uora"]["exact"] = {
                name: saved.get(f"{prefix}{OWNER}.{name}", buffer.cpu())
                for name, buffer in projections_of(root).named_buffers()
            }
        if self.kind == "adapter":
            dropped = {f"{prefix}{name}" for name in manifest["base"]}
            state = checkpoint["state_dict"].items()
            owner = f"{prefix}{OWNER}."
            kept = {k: v for k, v in state if k not in dropped and not k.startswith(owner)}
            stored = projections_of(root).stored()
            checkpoint["state_dict"] = kept | {f"{owner}{name}": A for name, A in stored.items()}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Complete the checkpoint's state dict with what it left to this module.

        Where the weights are loaded already, complete the module; see Note [Strategies that load weights
        first].

        Raises:
            ValueError: Another configuration, architecture or base; missing or unexpected keys; other
            projections.
        """
        if is_adapted(self.module) and "state_dict" in checkpoint:
            self._complete(checkpoint)
        elif is_adapted(self.module) and "uora" in checkpoint:
            self._complete_module(checkpoint["uora"])
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
            check_checkpoint(checkpoint, "the checkpoint")
            _check_same_config(projections_of(root).config, config_of(manifest))
            if manifest["kind"] == "adapter":
                state = self._completed(root, prefix, manifest, state)
        checkpoint["state_dict"] = state

    def _complete_module(self, manifest: dict[str, Any]) -> None:
        _, root = find_root(self.module)
        check_manifest(manifest, "the checkpoint")
        _check_same_config(projections_of(root).config, config_of(manifest))
        check_names(root, manifest)
        check_base(root, manifest["base"], self.base_mismatch)
        take_projections(root, manifest, manifest.get("exact", {}))

    def _completed(
        self, root: nn.Module, prefix: str, manifest: dict[str, Any], state: dict[str, Any]
    ) -> dict[str, Any]:
        own, owner = self.module.state_dict(), f"{prefix}{OWNER}."
        frozen = {f"{prefix}{name}" for name in manifest["base"]}
        expected = {k: v for k, v in own.items() if k not in frozen and not k.startswith(owner)}
        given = {k.removeprefix(owner): v for k, v in state.items() if k.startswith(owner)}
        state = {k: v for k, v in state.items() if not k.startswith(owner)}
        check_keys(expected, state)
        check_base(root, manifest["base"], self.base_mismatch)
        take_projections(root, manifest, given)
        current = self.module.state_dict()
        return {key: state.get(key, value) for key, value in current.items()}


def _check_same_config(found: UORAConfig, saved: UORAConfig) -> None:
    different = differences(saved, "saved", found, "here")
    if different:
        raise ValueError(f"the checkpoint has adapters of another configuration: {different}.")


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """A checkpoint that ``UORACallback`` had a hand in, on the CPU.

    Args:
        path: The file.
        weights_only: Unpickle plain data and torch's own modules only; False runs whatever the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of a newer version, or of other making; it holds an object of another type;
            it is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(what_folder(path))
    checkpoint = unpickled(path, weights_only)
    if not isinstance(checkpoint, dict) or "uora" not in checkpoint:
        raise ValueError(
            f"{path} was not made with UORACallback; the class's own load_from_checkpoint reads it."
        )
    check_checkpoint(checkpoint, str(path))
    check_vectors(checkpoint["uora"], checkpoint["state_dict"], str(path))
    return checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as temporary:
        new = Path(temporary) / target.name
        torch.save(checkpoint, new)
        new.replace(target)


def load_from_checkpoint(
    module_class: Any,
    path: str | Path,
    *,
    base_mismatch: Mismatch = "error",
    weights_only: bool = True,
    **kwargs: Any,
) -> Any:
    """A LightningModule from a checkpoint of either kind, adapters attached, on the CPU, no Trainer.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint.
        base_mismatch: ``"warn"`` accepts another base for an ``"adapter"`` checkpoint.
        weights_only: Unpickle plain data and torch's own modules (a loss among the hyperparameters) only.
            False reads objects of any type and runs what the file says: for files that you trust.
        kwargs: Arguments of ``module_class``, over the saved hyperparameters. For an ``"adapter"`` checkpoint
            they must bring the pretrained base back.

    Raises:
        ValueError: The file is no checkpoint made with ``UORACallback``, does not fit the module, or holds
            an object of a type that ``weights_only`` refuses; ``map_location`` or ``strict`` among
            ``kwargs``.
    """
    given = sorted({"map_location", "strict"} & set(kwargs))
    if given:
        raise ValueError(f"{given[0]} is not an argument here: the module comes whole, on the CPU.")
    checkpoint = read_checkpoint(path, weights_only)
    manifest = checkpoint["uora"]
    module = _built(module_class, {**checkpoint, "state_dict": {}}, weights_only, kwargs)
    if not any(True for _ in named_adapters(module)):
        attach_uora(module.get_submodule(manifest["root"]), config_of(manifest))
    hooks = CheckpointHooks(module, manifest["kind"], base_mismatch)
    hooks.load(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    hooks.install()
    return module


def _built(
    module_class: Any, checkpoint: dict[str, Any], weights_only: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """The module as its class makes it from a checkpoint without weights."""
    empty = io.BytesIO()
    torch.save(checkpoint, empty)
    empty.seek(0)
    # What is written here was let through by read_checkpoint. Lightning 2.5 has no ``weights_only``: it would
    # hand it on to the class, and reads everything. Since 2.6 torch's default, True, holds.
    known = "weights_only" in inspect.signature(module_class.load_from_checkpoint).parameters
    options = {**kwargs, "weights_only": False} if known and not weights_only else kwargs
    with warnings.catch_warnings(), torch_modules_allowed(empty):
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        module: nn.Module = module_class.load_from_checkpoint(
            empty, map_location="cpu", strict=False, **options
        )
    return module
