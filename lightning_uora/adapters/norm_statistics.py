"""Running statistics of the frozen base: BatchNorm that computes with what pretraining left there."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_uora.adapters.attachments import Attachment, attachments
from lightning_uora.adapters.names import named_modules, named_parameters

__all__ = ["StaysFrozen", "hold_statistics", "moving_norms", "never_moved", "release_statistics"]

# Note [Frozen statistics]
# In train() a BatchNorm computes with each batch's own mean and variance and moves its running ones, frozen
# or not: the base changes under the adapters. Held, it computes as in eval(), which on a pretrained ConvNet
# was 4 points better (docs/vision.md). A hook turns ``training`` off at each forward, because Lightning,
# users and calibrations call train() at any time; it lets go of what the user unfreezes by hand. What trains
# itself (a head's BatchNorm, or one among trainable_modules) moves as usual.


class StaysFrozen:
    """Forward pre-hook: the module computes as in ``eval()``, whatever mode the model is in."""

    def __init__(self, rested: bool) -> None:
        self.rested = rested  # was in eval() before

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """See Note [Frozen statistics]."""
        if module.training and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = False


def hold_statistics(one: Attachment) -> list[str]:
    """Keep the running statistics of the base, where the configuration says so; see Note [Frozen statistics].

    Asked again it does nothing new: modules may have been exchanged (SyncBatchNorm).

    Returns:
        Plain names, within the root, of the modules that keep theirs.
    """
    if one.key is None:
        return []
    if one.owner.config.batch_norm != "frozen":
        release_statistics(one)  # a loss from a checkpoint's hyperparameters may bring its hook along
        return []
    found = {name: m for name, m in named_modules(one.root).items() if _has_statistics(m)}
    trained = _trained(one) if found else set()
    held = {name: module for name, module in found.items() if not _trains(one, name, module, trained)}
    for module in held.values():
        if _hook_of(module) is None:
            module.register_forward_pre_hook(StaysFrozen(not module.training))
    return list(held)


def release_statistics(one: Attachment) -> None:
    """Undo :func:`hold_statistics`, unless another adapter at this root holds them."""
    others = [other for other in attachments(one.root) if other.owner is not one.owner]
    if any(other.key is not None and other.owner.config.batch_norm == "frozen" for other in others):
        return
    for module in one.root.modules():
        key = _hook_of(module)
        if key is not None:
            hook: Any = module._forward_pre_hooks.pop(key)
            if one.root.training and not hook.rested:
                module.training = True


def moving_norms(model: nn.Module) -> list[str]:
    """Plain names of the modules whose running statistics move in training."""
    return [n for n, m in named_modules(model).items() if _has_statistics(m) and _hook_of(m) is None]


def never_moved(model: nn.Module) -> str:
    """What to say of held modules that have never seen a batch; empty where there are none."""
    names = [n for n, m in named_modules(model).items() if _hook_of(m) is not None and _as_made(m)]
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"BatchNorm {names[0]!r}{more} has never seen a batch (mean 0, variance 1), and "
        "batch_norm='frozen' keeps it so; load pretrained weights, or set batch_norm='moving'."
    )


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None


def _as_made(module: nn.Module) -> bool:
    mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
    if mean is None or variance is None or mean.is_meta:
        return False
    return bool((mean == 0).all()) and bool((variance == 1).all())


def _trained(one: Attachment) -> set[str]:
    """Every name of what trains besides the vectors."""
    every = named_parameters(one.root, every=True)
    ids = {id(every[name]) for name in one.owner.trained if name in every}
    return {name for name, p in every.items() if id(p) in ids}


def _trains(one: Attachment, name: str, module: nn.Module, trained: set[str]) -> bool:
    """Whether it trains itself; of one without parameters, whether something beside it does."""
    own = next(module.parameters(recurse=False), None) is not None
    place = name if own else name.rpartition(".")[0]
    return bool(place) and any(found.startswith(f"{place}.") for found in trained)


def _hook_of(module: nn.Module) -> int | None:
    hooks = module._forward_pre_hooks.items()
    return next((key for key, hook in hooks if isinstance(hook, StaysFrozen)), None)
