"""Adapters and a LightningModule: attached in time, known to its optimizer, kept out of DDP's traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_uora.config import UORAConfig, differences
from lightning_uora.injection import find_root, named_adapters
from lightning_uora.projection import Projections, projections_of

__all__ = [
    "add_missing_to_optimizer",
    "built_later",
    "check_same_config",
    "is_calibrated",
    "keep_from_travelling",
    "report_without_gradient",
    "run_after_configure_model",
]

# Note [Models built late]
# Lightning calls Callback.setup, then the module's setup, then configure_model, then loads the checkpoint.
# Where a module overrides setup or configure_model it may still be empty, or half built, in Callback.setup.
# So configure_model is shadowed on the instance by a function that removes itself, calls the original, and
# attaches: after everything is built, before weights and optimizers.


def built_later(pl_module: LightningModule) -> bool:
    """Whether parts of the module may not exist yet when callbacks are set up."""
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)


def run_after_configure_model(pl_module: LightningModule, attach: Callable[[LightningModule], None]) -> None:
    """See Note [Models built late]."""
    original = pl_module.configure_model

    def configure_model() -> None:
        pl_module.__dict__.pop("configure_model", None)
        original()
        attach(pl_module)

    pl_module.__dict__["configure_model"] = configure_model


def check_same_config(pl_module: LightningModule, config: UORAConfig) -> None:
    """Raise ``ValueError`` unless the module's adapters are of this configuration."""
    found = projections_of(find_root(pl_module)[1]).config
    different = differences(found, "in the module", config, "in the callback")
    if different:
        raise ValueError(f"the module has adapters of another configuration: {different}.")


def keep_from_travelling(pl_module: LightningModule, owner: Projections) -> None:
    """DistributedDataParallel sends every buffer at each forward; every rank drew A and B by itself."""
    ignored = set(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()))
    (prefix,) = (name for name, module in pl_module.named_modules() if module is owner)
    layers = len(list(named_adapters(pl_module)))
    names = owner.names_ever(layers if owner.config.share == "layer" else 0)
    ignored.update(f"{prefix}.{name}" for name in names)
    pl_module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def add_missing_to_optimizer(optimizers: Sequence[Optimizer], pl_module: LightningModule) -> None:
    """Put vectors that no optimizer holds into the first group: it was built before the adapters.

    Into the group's list, because ``add_param_group`` breaks LambdaLR and OneCycleLR.
    """
    real = [optimizer for optimizer in optimizers if type(optimizer).__name__ != "_MockOptimizer"]
    if not real:
        return
    held = {id(p) for optimizer in real for group in optimizer.param_groups for p in group["params"]}
    wanted = [f"{name}.{leaf}" for name, _ in named_adapters(pl_module) for leaf in ("uora_d", "uora_b")]
    missing = {
        name: p
        for name, p in pl_module.named_parameters()
        if name in wanted and p.requires_grad and id(p) not in held
    }
    if missing:
        first = real[0].param_groups[0]
        first["params"].extend(missing.values())
        rank_zero_warn(
            f"The optimizer was built without {len(missing)} adapter vectors ({next(iter(missing))}, ...); "
            f"they are now in its first group, at lr={float(first['lr']):g}. Build it in "
            "configure_optimizers to choose their learning rate."
        )


def report_without_gradient(module: nn.Module) -> None:
    """Warn of what should train and got no gradient."""
    names = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        rank_zero_warn(f"No gradient in the first backward for {shown}: these parameters do not train.")


def is_calibrated(pl_module: LightningModule) -> bool:
    """Whether A of an adapted module has come from its inputs."""
    return any(isinstance(module, Projections) and module.calibrated for module in pl_module.modules())
