"""Adapters and a LightningModule: attached in time, known to its optimizer, kept out of DDP's traffic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_uora.adapters import (
    Projections,
    attach_uora,
    find_root,
    is_adapted,
    named_adapters,
    projections_of,
)
from lightning_uora.config import UORAConfig, differences
from lightning_uora.storage import CheckpointHooks

__all__ = [
    "attach_in_time",
    "built_later",
    "forget_configure_model",
    "is_calibrated",
    "require_adapted",
]

Told = Callable[[LightningModule, Projections], None]


# Note [Models built late]
# Lightning calls Callback.setup, then the module's setup, then configure_model, then loads the checkpoint.
# Where a module overrides setup or configure_model it may still be empty, or half built, in Callback.setup.
# So configure_model is shadowed on the instance by a function that removes itself, calls the original, and
# attaches: after everything is built, before weights and optimizers.


def built_later(pl_module: LightningModule) -> bool:
    """Whether parts of the module may not exist yet when callbacks are set up."""
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)


def attach_in_time(
    pl_module: LightningModule, config: UORAConfig, checkpoint: Literal["full", "adapter"], told: Told
) -> None:
    """Attach now, or when the model is built; see Note [Models built late].

    Args:
        pl_module: The LightningModule. If it has adapters it keeps them.
        config: What to adapt and how.
        checkpoint: What its checkpoints hold.
        told: Called with the module and the owner of A and B when it is done.

    Raises:
        ValueError: It has adapters of another configuration, or as ``attach_uora``.
    """
    attach = partial(_attach, config=config, checkpoint=checkpoint, told=told)
    if built_later(pl_module) and not is_adapted(pl_module):
        _run_after_configure_model(pl_module, attach)
    else:
        attach(pl_module)


def _attach(
    pl_module: LightningModule, *, config: UORAConfig, checkpoint: Literal["full", "adapter"], told: Told
) -> None:
    if is_adapted(pl_module):
        _check_same_config(pl_module, config)
    else:
        attach_uora(pl_module, config)
    owner = projections_of(find_root(pl_module)[1])
    _keep_from_travelling(pl_module, owner)
    CheckpointHooks(pl_module, checkpoint).install()
    told(pl_module, owner)


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
            "UORACallback attached no adapter: configure_model was replaced or never ran."
        )


def _check_same_config(pl_module: LightningModule, config: UORAConfig) -> None:
    found = projections_of(find_root(pl_module)[1]).config
    different = differences(found, "in the module", config, "in the callback")
    if different:
        raise ValueError(f"the module has adapters of another configuration: {different}.")


def _keep_from_travelling(pl_module: LightningModule, owner: Projections) -> None:
    """DistributedDataParallel sends every buffer at each forward; every rank drew A and B by itself."""
    ignored = set(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()))
    (prefix,) = (name for name, module in pl_module.named_modules() if module is owner)
    layers = len(list(named_adapters(pl_module)))
    names = owner.names_ever(layers if owner.config.share == "layer" else 0)
    ignored.update(f"{prefix}.{name}" for name in names)
    pl_module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def is_calibrated(pl_module: LightningModule) -> bool:
    """Whether A of an adapted module has come from its inputs."""
    return any(isinstance(module, Projections) and module.calibrated for module in pl_module.modules())
