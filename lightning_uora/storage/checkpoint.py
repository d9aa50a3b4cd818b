"""Lightning checkpoints of both kinds, without Lightning: the module's hooks, reading, loading."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_uora.adapters import (
    OWNER,
    Attachment,
    Selection,
    attach_to,
    attachments,
    is_adapted,
    named_buffers,
    named_parameters,
    plain,
    settle_statistics,
    trained_parameters,
)
from lightning_uora.config import UORAConfig, differences
from lightning_uora.distributed import first_rank, is_sharded
from lightning_uora.storage.folders import what_folder
from lightning_uora.storage.manifest import (
    SEVERAL,
    check_checkpoint,
    check_vectors,
    config_of,
    manifests_of,
)
from lightning_uora.storage.restoring import (
    Mismatch,
    check_base,
    check_keys,
    check_names,
    describe,
    few,
    quantised_prefixes,
    require_modules,
    take_projections,
)
from lightning_uora.storage.unpickling import torch_modules_allowed, unpickled
from lightning_uora.storage.verifying import write_verified
from lightning_uora.storage.waiting import (
    describe_waiting,
    names_in,
    not_in,
    projections_on_shelf,
    put_waiting,
    stored_on_shelf,
    take_waiting,
)

__all__ = ["CheckpointHooks", "load_from_checkpoint", "read_checkpoint", "save_checkpoint"]


STATES = ("state_dict", "current_model_state")
"""Where checkpoints keep the module's numbers; the second is ``WeightAveraging``'s, of those not averaged."""

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
        look: Told, with the module, of a checkpoint before anything of it is loaded.
        before_write: Told of the module when a checkpoint of it is complete, and about to be written.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: Literal["full", "adapter"],
        base_mismatch: Mismatch = "error",
        look: Callable[[Any, dict[str, Any]], None] | None = None,
        before_write: Callable[[Any], None] | None = None,
    ) -> None:
        self.module, self.kind, self.base_mismatch, self.look = module, kind, base_mismatch, look
        self.before_write = before_write

    def install(self) -> None:
        """Put the hooks on the module."""
        self.module.__dict__["on_save_checkpoint"] = self.save
        self.module.__dict__["on_load_checkpoint"] = self.load

    def remove(self) -> None:
        """Take them off the module."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            self.module.__dict__.pop(name, None)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the manifest; drop what can be rebuilt from an ``"adapter"`` checkpoint.

        Raises:
            ValueError: The module's own hook has dropped numbers that trained.
        """
        found = attachments(self.module)  # none where it was merged and detached since
        if found:
            self._describe_and_drop(checkpoint, found)
        own: Any = type(self.module)
        own.on_save_checkpoint(self.module, checkpoint)
        if found:
            self._require_all(checkpoint)
            if self.before_write is not None:
                self.before_write(self.module)

    def _describe_and_drop(self, checkpoint: dict[str, Any], found: list[Attachment]) -> None:
        manifests = []
        for one in found:
            if self.kind == "adapter":
                one.owner.require_calibrated("an adapter checkpoint")
            manifest = {**describe(one, base=self.kind == "adapter"), "kind": self.kind, "root": one.path}
            manifest |= describe_waiting(one)
            if one.key != OWNER:
                manifest["owner"] = one.key
            if self.kind == "full" and is_sharded(one.root):
                saved, owner = checkpoint["state_dict"], _owner_prefix(one)
                buffers = one.owner.named_buffers()
                manifest["exact"] = {n: saved.get(f"{owner}{n}", b.cpu()) for n, b in buffers}
            manifests.append(manifest)
        several = {"version": SEVERAL, "kind": self.kind, "several": manifests}
        checkpoint["uora"] = manifests[0] if len(manifests) == 1 else several
        if self.kind == "adapter":
            dropped = {f"{o.prefix}{n}" for o, m in zip(found, manifests, strict=True) for n in m["base"]}
            dropped |= self._packed(checkpoint["state_dict"])
            owners = _all_owners(found)
            for name in STATES:
                if name in checkpoint:
                    checkpoint[name] = {
                        key: value
                        for key, value in checkpoint[name].items()
                        if plain(key) not in dropped and not plain(key).startswith(owners)
                    }
            for one in found:
                stored = {f"{_owner_prefix(one)}{name}": A for name, A in one.owner.stored().items()}
                stored |= stored_on_shelf(one)
                checkpoint["state_dict"] = checkpoint["state_dict"] | stored

    def _packed(self, state: Mapping[str, Any]) -> set[str]:
        """Plain keys of what quantised modules keep beside parameters and buffers (scales, codebooks)."""
        prefixes = quantised_prefixes(self.module)
        known = set(named_parameters(self.module, every=True)) | set(named_buffers(self.module))
        plains = map(plain, state)
        return {key for key in plains if key not in known and key.startswith(prefixes)} if prefixes else set()

    def _require_all(self, checkpoint: dict[str, Any]) -> None:
        """Every number that trained is in the checkpoint, or there is none."""
        held = {plain(key) for key in checkpoint.get("state_dict", ())}
        trained = trained_parameters(self.module)  # pruned ones are saved as they compute, without _orig
        lost = [name for name in trained if not held & {name, name.removesuffix("_orig")}]
        if lost and not is_sharded(self.module):
            raise ValueError(
                f"on_save_checkpoint of {type(self.module).__name__} leaves out {few(lost)}, which trained; "
                "keep what requires gradients, or use UORACallback(checkpoint='adapter') for small files."
            )

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Complete the checkpoint's state dict with what it left to this module.

        Where the weights are loaded already, complete the module; see Note [Strategies that load weights
        first].

        Raises:
            ValueError: Another configuration, architecture or base; missing or unexpected keys; other
            projections.
        """
        found = attachments(self.module)
        if found and self.look is not None:
            self.look(self.module, checkpoint)
        if found and "state_dict" in checkpoint:
            self._complete(checkpoint, found)
        elif found and "uora" in checkpoint:
            self._complete_module(checkpoint, found)
        own: Any = type(self.module)
        own.on_load_checkpoint(self.module, checkpoint)

    def _complete(self, checkpoint: dict[str, Any], found: list[Attachment]) -> None:
        if "uora" not in checkpoint:
            if not any("uora_" in key for key in checkpoint["state_dict"]):  # from before it was adapted
                own = {k: v for k, v in self.module.state_dict().items() if "uora_" in k}
                checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}
            return
        check_checkpoint(checkpoint, "the checkpoint")
        pairs = _paired(found, manifests_of(checkpoint["uora"]))
        if getattr(self.module, "_trainer", None) is not None:
            _tell_of_norms(pairs)
        for one, manifest in pairs:
            put_waiting(one, manifest)
        if any(manifest["kind"] == "adapter" for _, manifest in pairs):
            self._complete_adapters(checkpoint, pairs)
        else:
            _rebuild_missing(checkpoint["state_dict"], pairs)
        current = {plain(key): (key, value) for key, value in self.module.state_dict().items()}
        self._leave_packed(checkpoint, current)
        owners = _all_owners(found)
        absent = tuple(shelf for one, manifest in pairs for shelf in not_in(one, manifest))
        for name in STATES:
            if name in checkpoint:
                state = {plain(key): value for key, value in checkpoint[name].items()}
                kinds = {manifest["kind"] for _, manifest in pairs}
                mine = {
                    key: value
                    for key, (_, value) in current.items()
                    if "adapter" in kinds
                    or key.startswith(absent)
                    or (key.startswith(owners) and not _has_owner(state, owners))
                }
                known = {current[key][0] if key in current else key: value for key, value in state.items()}
                checkpoint[name] = {current[key][0]: value for key, value in mine.items()} | known

    def _leave_packed(self, checkpoint: dict[str, Any], current: dict[str, tuple[str, Any]]) -> None:
        """Scales and codebooks of quantised modules stay as they are here: their libraries do not load them.

        Raises:
            ValueError: The checkpoint has other ones.
        """
        for key in self._packed(dict.fromkeys(current)):
            _, here = current.pop(key)
            for name in STATES:
                state = checkpoint.get(name, {})
                for saved in (one for one in state if plain(one) == key):
                    if isinstance(here, Tensor) and not torch.equal(state[saved].to(here.device), here):
                        raise ValueError(
                            f"the checkpoint has another quantised base: {key!r} differs; load the base that "
                            "it was saved with."
                        )
                if name in checkpoint:
                    checkpoint[name] = {one: value for one, value in state.items() if plain(one) != key}

    def _complete_adapters(
        self, checkpoint: dict[str, Any], pairs: list[tuple[Attachment, dict[str, Any]]]
    ) -> None:
        owners = _all_owners([one for one, _ in pairs])
        absent = tuple(shelf for one, manifest in pairs for shelf in not_in(one, manifest))
        frozen = {f"{one.prefix}{name}" for one, manifest in pairs for name in manifest["base"]}
        own = {plain(key): value for key, value in self.module.state_dict().items()}
        beside = frozen | self._packed(own)
        left = (*owners, *absent)
        expected = {k: v for k, v in own.items() if k not in beside and not k.startswith(left)}
        state = {plain(key): value for key, value in checkpoint["state_dict"].items()}
        check_keys(expected, {k: v for k, v in state.items() if not k.startswith(owners)})
        for one, manifest in pairs:
            check_base(one, manifest["base"], self.base_mismatch)
        for one, manifest in pairs:
            owner = _owner_prefix(one)
            given = {k.removeprefix(owner): v for k, v in state.items() if k.startswith(owner)}
            take_projections(one, manifest, given)
            take_waiting(one, manifest, state)
        for name in STATES:
            if name in checkpoint:
                checkpoint[name] = {
                    key: v for key, v in checkpoint[name].items() if not plain(key).startswith(owners)
                }

    def _complete_module(self, checkpoint: dict[str, Any], found: list[Attachment]) -> None:
        check_checkpoint({"state_dict": {}, **checkpoint}, "the checkpoint")
        for one, manifest in _paired(found, manifests_of(checkpoint["uora"])):
            check_names(one, manifest)
            check_base(one, manifest["base"], self.base_mismatch)
            take_projections(one, manifest, manifest.get("exact", {}))


def _owner_prefix(one: Attachment) -> str:
    return f"{one.prefix}{one.key}."


def _all_owners(found: list[Attachment]) -> tuple[str, ...]:
    """What the keys of every A, B and record begin with, of adapters that wait too."""
    return tuple(prefix for one in found for prefix in (_owner_prefix(one), *projections_on_shelf(one)))


def _has_owner(state: Mapping[str, Any], owners: tuple[str, ...]) -> bool:
    return any(key.startswith(owners) for key in state)


def _rebuild_missing(state: dict[str, Any], pairs: list[tuple[Attachment, dict[str, Any]]]) -> None:
    """A and B that the module's own hook left out are rebuilt, or it is an error: never the wrong ones."""
    plains = {plain(key): value for key, value in state.items()}
    for one, manifest in pairs:
        owner = _owner_prefix(one)
        matrices = [
            name + end for name in manifest["projections"] for end in ("", ":at")[: 1 + (":" in name)]
        ]
        names = [*matrices, *(["record"] if manifest["record"] else [])]
        if all(f"{owner}{name}" in plains for name in names):
            continue
        given = {name: plains[f"{owner}{name}"] for name in matrices if f"{owner}{name}" in plains}
        take_projections(one, manifest, given)
        for key in [key for key in state if plain(key).startswith(owner)]:
            del state[key]


def _paired(
    found: list[Attachment], manifests: list[dict[str, Any]]
) -> list[tuple[Attachment, dict[str, Any]]]:
    """Each adapted model with its manifest. Raises ``ValueError`` where they are not the same ones."""
    here = {(one.path, one.key): one for one in found}
    saved = {(manifest["root"], manifest.get("owner", OWNER)): manifest for manifest in manifests}
    if set(here) != set(saved):
        raise ValueError(
            "the checkpoint has adapters at "
            f"{few([path or 'the module itself' for path, _ in saved])}, but the module has them at "
            f"{few([path or 'the module itself' for path, _ in here])}; attach them in the same "
            "places, or load into a module without adapters."
        )
    for place, one in here.items():
        _check_same_config(one.owner.config, config_of(saved[place], one.owner.config))
    return [(one, saved[place]) for place, one in here.items()]


def _tell_of_norms(pairs: list[tuple[Attachment, dict[str, Any]]]) -> None:
    """Runs from before ``batch_norm`` moved the statistics that are held now."""
    before = [one for one, manifest in pairs if "batch_norm" not in manifest["config"]]
    held = [f"{one.prefix}{name}" for one in before for name in settle_statistics(one.root)]
    if held and first_rank():
        warnings.warn(
            f"the checkpoint was made before batch_norm, when BatchNorm ({few(held)}) moved in training; it "
            "keeps its statistics now: set batch_norm='moving' to go on as the run began.",
            stacklevel=4,
        )


def _check_same_config(found: UORAConfig, saved: UORAConfig) -> None:
    different = differences(saved, "saved", found, "here")
    if different:
        raise ValueError(
            f"the checkpoint has adapters of another configuration: {different}. Attach with the "
            "checkpoint's configuration."
        )


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
        raise ValueError(f"{path} was not made with UORACallback; use the class's own load_from_checkpoint.")
    check_checkpoint(checkpoint, str(path))
    plains = {plain(key): value for key, value in checkpoint["state_dict"].items()}
    for manifest in manifests_of(checkpoint["uora"]):
        check_vectors(manifest, plains, str(path))
    return checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint under a temporary name, read it back, compare every tensor, and rename it.

    Raises:
        OSError: What was written reads back otherwise; what was there is as it was.
    """
    write_verified(checkpoint, path, partial(torch.save, checkpoint))


def load_from_checkpoint(
    module_class: Any,
    path: str | Path,
    *,
    base_mismatch: Mismatch = "error",
    weights_only: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a LightningModule with its adapters from a checkpoint of either kind: on the CPU, no Trainer.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint.
        base_mismatch: ``"warn"`` accepts another base for an ``"adapter"`` checkpoint.
        weights_only: Unpickle only plain data and torch's own modules (a loss among the hyperparameters).
            False reads objects of any type and runs what the file says: only for files that you trust.
        kwargs: Arguments of ``module_class``, which override the saved hyperparameters. For an ``"adapter"``
            checkpoint they must bring the pretrained base back.

    Raises:
        ValueError: The file is not a checkpoint made with ``UORACallback``, does not fit the module, or holds
            an object of a type that ``weights_only`` refuses; ``map_location`` or ``strict`` is among
            ``kwargs``.
    """
    given = sorted({"map_location", "strict"} & set(kwargs))
    if given:
        raise ValueError(
            f"{given[0]} is not an argument here: the module comes back whole, on the CPU; move it "
            "afterwards."
        )
    checkpoint = read_checkpoint(path, weights_only)
    manifests = manifests_of(checkpoint["uora"])
    module = _built(module_class, {**checkpoint, "state_dict": {}}, weights_only, kwargs)
    if not is_adapted(module):
        for manifest in manifests:
            root = module.get_submodule(manifest["root"])
            chosen = Selection(tuple(manifest["adapted"]), tuple(manifest["trained"]))
            require_modules(root, manifest["adapted"])
            one = attach_to(root, config_of(manifest), chosen, manifest.get("owner", OWNER))
            one.owner.name = names_in(manifest)[0]
    hooks = CheckpointHooks(module, manifests[0]["kind"], base_mismatch)
    hooks.load(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=getattr(module, "strict_loading", True))
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
