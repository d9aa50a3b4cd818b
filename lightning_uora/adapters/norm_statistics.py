"""Running statistics of the frozen base: BatchNorm that computes with what pretraining left there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_uora.adapters.attachments import attachments
from lightning_uora.adapters.names import named_modules, named_parameters
from lightning_uora.adapters.projections import Projections

__all__ = ["StaysFrozen", "moving_norms", "never_moved", "settle_statistics"]

# Note [Frozen statistics]
# In train() a BatchNorm computes with each batch's own mean and variance and moves its running ones, frozen
# or not: the base changes under the adapters. Held, it computes as in eval(), which on a pretrained ConvNet
# was 6 points better (docs/measured.md). A hook turns ``training`` off at each forward, because Lightning,
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


def settle_statistics(root: nn.Module) -> list[str]:
    """Hold the running statistics that the active adapters at ``root`` want held, and let go of all others.

    Asked again it does nothing new; it has to be asked when adapters came, went or changed places, and when
    modules were exchanged (SyncBatchNorm).

    Returns:
        Plain names, within the root, of the modules that keep theirs. See Note [Frozen statistics].
    """
    found = attachments(root)
    owners = [one.owner for one in found if one.root is root and one.key is not None]
    frozen = any(owner.config.batch_norm == "frozen" for owner in owners)
    norms = {name: module for name, module in named_modules(root).items() if _has_statistics(module)}
    trained = _trained(root, owners) if frozen and norms else set()
    held = [name for name, m in norms.items() if frozen and not _trains(name, m, trained)]
    for name, module in norms.items():
        if name in held and _hook_of(module) is None:
            module.register_forward_pre_hook(StaysFrozen(not module.training))
        elif name not in held:
            _let_go(module, root.training)
    for inner in {id(one.root): one.root for one in found if one.root is not root and one.key}.values():
        settle_statistics(inner)
    return held


def _let_go(module: nn.Module, training: bool) -> None:
    key = _hook_of(module)
    if key is not None:
        hook: Any = module._forward_pre_hooks.pop(key)
        if training and not hook.rested:
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
    """BatchNorm of torch and timm, InstanceNorm that keeps some, EvoNorm."""
    return module._buffers.get("running_var") is not None


def _as_made(module: nn.Module) -> bool:
    mean, variance = module._buffers.get("running_mean"), module._buffers["running_var"]
    if variance is None or variance.is_meta:
        return False
    return (mean is None or bool((mean == 0).all())) and bool((variance == 1).all())


def _trained(root: nn.Module, owners: Sequence[Projections]) -> set[str]:
    """Every name of what trains besides the vectors."""
    every = named_parameters(root, every=True)
    ids = {id(every[name]) for owner in owners for name in owner.trained if name in every}
    return {name for name, p in every.items() if id(p) in ids}


def _trains(name: str, module: nn.Module, trained: set[str]) -> bool:
    """Whether it trains itself; of one without parameters, whether something beside it does."""
    own = next(module.parameters(recurse=False), None) is not None
    place = name if own else name.rpartition(".")[0]
    return bool(place) and any(found.startswith(f"{place}.") for found in trained)


def _hook_of(module: nn.Module) -> int | None:
    hooks = module._forward_pre_hooks.items()
    return next((key for key, hook in hooks if isinstance(hook, StaysFrozen)), None)
