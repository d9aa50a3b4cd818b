"""Adapters and a LightningModule: attached in time, known to its optimizer, kept out of DDP's traffic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_uora.adapters import (
    SHELF,
    Attachment,
    Projections,
    adapter_names,
    add_adapter,
    attach_beside,
    attachments,
    detach_uora,
    is_adapted,
    named_adapters,
    set_adapter,
)
from lightning_uora.config import UORAConfig, differences
from lightning_uora.storage import CheckpointHooks
from lightning_uora.trainer.writing import verify_write

__all__ = [
    "attach_in_time",
    "attachments_of",
    "built_later",
    "forget_configure_model",
    "is_calibrated",
    "require_adapted",
]

Told = Callable[[LightningModule, list[Projections]], None]
NAME = "UORACallback"
"""What the callback's state was called in checkpoints while there could be one of its kind."""


# Note [Models built late]
# Lightning calls Callback.setup, then the module's setup, then configure_model, then loads the checkpoint.
# Where a module overrides setup or configure_model it may still be empty, or half built, in Callback.setup.
# So configure_model is shadowed on the instance by a function that removes itself, calls the original, and
# attaches: after everything is built, before weights and optimizers.


def built_later(pl_module: LightningModule) -> bool:
    """Whether parts of the module may not exist yet when callbacks are set up."""
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)


def attach_in_time(
    pl_module: LightningModule,
    own: Any,
    others: Sequence[Any],
    told: Told,
    first: Callable[[LightningModule], None],
) -> None:
    """Attach now, or when the model is built; see Note [Models built late].

    Args:
        pl_module: The LightningModule. If it has adapters of this configuration it keeps them.
        own: The callback: its ``config``, ``checkpoint`` and ``adapter_name``.
        others: Other callbacks of its kind, which adapt other modules of the same LightningModule.
        told: Called with the module and the owners of A and B when it is done.
        first: Called with the module, its parts all there, before it is adapted.

    Raises:
        ValueError: It has adapters of another configuration, or as ``attach_uora``.
    """

    def attach(module: LightningModule) -> None:
        first(module)
        _attach(module, own, others, told)

    if built_later(pl_module) and not is_adapted(pl_module):
        _run_after_configure_model(pl_module, attach)
    else:
        attach(pl_module)


def _attach(pl_module: LightningModule, own: Any, others: Sequence[Any], told: Told) -> None:
    if any(one.key is None for one in attachments(pl_module)):
        raise ValueError(
            f"{type(pl_module).__name__} holds a model that was adapted inside another module; call "
            "detach_uora on it first (and save_adapter before, to keep what it learned)."
        )
    _choose(pl_module, own)
    if not attachments_of(pl_module, own.config):
        theirs = [other.config for other in others]
        for one in attachments(pl_module):
            if one.owner.config not in theirs:
                different = differences(one.owner.config, "in the module", own.config, "in the callback")
                raise ValueError(
                    f"the module has adapters of another configuration: {different}. Detach them, or "
                    "give the callback their configuration."
                )
        try:
            attach_beside(pl_module, own.config)
        except BaseException:
            _take_back(pl_module, others)
            raise
        for one in attachments_of(pl_module, own.config):
            one.owner.name, one.owner.made_by = own.adapter_name, weakref.ref(own)
    mine = [one.owner for one in attachments_of(pl_module, own.config)]
    waiting = (m for name, m in pl_module.named_modules() if SHELF in name.split("."))
    for owner in (*mine, *(m for m in waiting if isinstance(m, Projections))):
        _keep_from_travelling(pl_module, owner)
    CheckpointHooks(pl_module, own.checkpoint, look=look_at_checkpoint, before_write=verify_write).install()
    told(pl_module, mine)


def _take_back(pl_module: LightningModule, others: Sequence[Any]) -> None:
    """Of several callbacks one failed: what the others attached goes, and the module is as it was."""
    makers = [one.owner.made_by for one in attachments(pl_module)]
    theirs = [made_by is not None and any(made_by() is other for other in others) for made_by in makers]
    if makers and all(theirs):
        detach_uora(pl_module)
        CheckpointHooks(pl_module, "full").remove()


def _choose(pl_module: LightningModule, own: Any) -> None:
    """Put the adapter that the callback names on a module that has adapters."""
    found = attachments(pl_module)
    if len(found) != 1 or found[0].owner.name == own.adapter_name:
        return
    if own.adapter_name in adapter_names(pl_module):
        set_adapter(pl_module, own.adapter_name)
    elif own.adapter_name != "default":
        add_adapter(pl_module, own.adapter_name, own.config)


def attachments_of(pl_module: LightningModule, config: UORAConfig) -> list[Attachment]:
    """The adapted models in the module that have this configuration."""
    return [one for one in attachments(pl_module) if one.owner.config == config]


def look_at_checkpoint(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Before anything of a checkpoint is loaded into an adapted module.

    Raises:
        MisconfigurationException: A fit would go on from a run that had no adapters.
    """
    trainer: Any = pl_module._trainer
    callbacks = getattr(trainer, "callbacks", ())
    _know_older_keys(checkpoint.get("callbacks") or {}, callbacks)
    if "uora" in checkpoint or any("uora_" in key for key in checkpoint.get("state_dict", ())):
        return
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and checkpoint.get("optimizer_states"):
        raise MisconfigurationException(
            "The checkpoint is of a run without UORA adapters, so its optimizer state does not fit. "
            "To start from its weights, call module = "
            f"{type(pl_module).__name__}.load_from_checkpoint(...), then fit without ckpt_path."
        )
    if any(bool(m.uora_b.any()) for _, m in named_adapters(pl_module)):
        rank_zero_warn(
            "The checkpoint holds no UORA adapters, so the module keeps its own trained ones on the "
            "checkpoint's weights. To get the checkpoint alone, use a new module."
        )


def _know_older_keys(saved: dict[str, Any], callbacks: Sequence[Any]) -> None:
    """Callbacks' states as they were called when there could be one of this kind, or were told by less."""
    ours = [one for one in callbacks if one.state_key.startswith(f"{NAME}{{")]
    for one in ours:
        older = [one.short_key, *([NAME] if len(ours) == 1 else [])]
        found = next((key for key in older if key in saved), None)
        if one.state_key not in saved and found is not None:
            saved[one.state_key] = saved.pop(found)


def _run_after_configure_model(pl_module: LightningModule, attach: Callable[[LightningModule], None]) -> None:
    original = pl_module.configure_model

    def configure_model() -> None:
        forget_configure_model(pl_module)
        original()
        attach(pl_module)

    pl_module.__dict__["configure_model"] = configure_model


def forget_configure_model(pl_module: LightningModule) -> None:
    """Take back what Note [Models built late] put on the instance, if it never ran."""
    pl_module.__dict__.pop("configure_model", None)


def require_adapted(pl_module: LightningModule) -> None:
    """Raise ``MisconfigurationException`` where a fit would train without adapters."""
    if not is_adapted(pl_module):
        raise MisconfigurationException(
            "UORACallback attached no adapter, because configure_model was replaced or never ran; do "
            "not replace it after the callback's setup."
        )


def _keep_from_travelling(pl_module: LightningModule, owner: Projections) -> None:
    """DistributedDataParallel sends every buffer at each forward; every rank drew A and B by itself."""
    ignored = set(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()))
    (prefix,) = (name for name, module in pl_module.named_modules() if module is owner)
    names = owner.names_ever(len(owner.adapted) if owner.config.share == "layer" else 0)
    ignored.update(f"{prefix}.{name}" for name in names)
    pl_module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def is_calibrated(pl_module: LightningModule) -> bool:
    """Whether A of an adapted module has come from its inputs."""
    return any(one.owner.calibrated for one in attachments(pl_module))
