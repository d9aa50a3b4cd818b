"""A user's own layers: what stands beside a pretrained model in the modules around it, and is new."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_uora.adapters.names import named_modules
from lightning_uora.adapters.role_names import OWN_HEADS, OWN_SCALES

__all__ = ["OwnLayers", "library_models", "own_layers"]

# Note [Whose layers are new]
# timm's and transformers' models are known by their interfaces. A module that contains one was written by the
# user, and what stands beside the model in it is in no pretrained file: a head, a projector, a temperature. A
# LightningModule is the user's too, but where it holds no such model its parts may have been loaded by hand,
# so that names decide. What its user froze as a whole stays frozen: a teacher, a network that is a loss.

SIMPLE = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.Dropout,
    nn.Identity,
    nn.Flatten,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)
"""What a head is made of, besides modules without parameters."""


class OwnLayers:
    """Names of parts and bare parameters that are new.

    Attributes:
        heads: Those that are trained under ``trainable_modules="auto"``.
        others: The rest, of which it is not known what they are.
    """

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.others: list[str] = []


def own_layers(model: nn.Module) -> OwnLayers:
    """See Note [Whose layers are new]."""
    found = OwnLayers()
    modules = named_modules(model)
    library = library_models(modules)
    around = {"": bool(library)} if _is_lightning_module(model) and "" not in library else {}
    for name in library:
        path = name.split(".") if name else []
        around |= {".".join(path[:end]): True for end in range(len(path))}
    for name in around:
        if any(not inner or name == inner or name.startswith(f"{inner}.") for inner in library):
            continue
        for part, is_head in _beside(modules[name], around[name]):
            full = f"{name}.{part}" if name else part
            if not any(one == full or one.startswith(f"{full}.") for one in library):
                (found.heads if is_head else found.others).append(full)
    return found


def library_models(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the models of timm, transformers and torchvision, and of the backbones within them."""
    return [name for name, module in modules.items() if _is_library_model(module)]


def _beside(module: nn.Module, certain: bool) -> Iterator[tuple[str, bool]]:
    """Children and bare parameters that are not frozen, and whether each is a head."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and any(p.requires_grad for p in parameters):
            yield name, _is_simple(child) and (certain or name.lower() in OWN_HEADS)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield name, certain or name.lower() in OWN_SCALES


def _is_simple(module: nn.Module) -> bool:
    parts = list(module.modules())
    plain = all(isinstance(p, SIMPLE) or not any(True for _ in p.parameters(recurse=False)) for p in parts)
    return plain and any(isinstance(part, (nn.Linear, nn.Bilinear)) for part in parts)


def _is_library_model(module: nn.Module) -> bool:
    """A model of timm, transformers or torchvision, whole or its backbone."""
    if callable(getattr(module, "get_classifier", None)) or hasattr(module, "base_model_prefix"):
        return True
    origin = type(module).__module__
    heads = (getattr(module, name, None) for name in ("fc", "classifier", "head", "heads"))
    whole = origin.startswith("torchvision.models.") and any(isinstance(one, nn.Module) for one in heads)
    return whole or hasattr(module, "feature_info")  # timm's, features_only=True


def _is_lightning_module(module: nn.Module) -> bool:
    return callable(getattr(module, "training_step", None)) and hasattr(module, "configure_optimizers")
