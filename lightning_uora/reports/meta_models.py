"""A model by its name, on ``meta``: from timm's and transformers' registries and configurations."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["model_on_meta"]


def model_on_meta(name: str) -> nn.Module:
    """A model without storage: a timm name, or a transformers configuration by path, model type or hub name.

    A configuration that names its architecture gives that class (with its head), a bare model type the
    backbone in its default size. Nothing of the weights is read; a hub name needs the network or the cache.

    Raises:
        ValueError: Neither library knows the name (near misses are named), neither is installed, or the
            configuration makes no model.
    """
    timm, transformers = (_optional(package) for package in ("timm", "transformers"))
    if timm is None and transformers is None:
        raise ValueError("inspect needs timm or transformers: pip install timm transformers")
    if timm is not None and timm.is_model(name):
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False)
        return model
    if transformers is None:
        raise _unknown(name, timm, transformers)
    return _transformers_on_meta(name, timm, transformers)


def _transformers_on_meta(name: str, timm: Any, transformers: Any) -> nn.Module:
    known = transformers.CONFIG_MAPPING
    here = Path(name).exists()
    try:
        config = (
            known[name]() if name in known and not here else transformers.AutoConfig.from_pretrained(name)
        )
    except Exception as error:  # transformers raises what it likes of a bad configuration
        if here or name in known:
            raise ValueError(f"{name}: {error}") from error
        raise _unknown(name, timm, transformers) from error
    try:
        return _built(config, transformers)
    except Exception as error:
        raise ValueError(f"{name}: transformers makes no model of this configuration: {error}") from error


def _built(config: Any, transformers: Any) -> nn.Module:
    """The class that the configuration names, else the backbone, in the configuration's dtype."""
    named = config.architectures or []
    architecture = getattr(transformers, named[0], None) if isinstance(named, list) and named else None
    with torch.device("meta"):
        if architecture is None:
            model: nn.Module = transformers.AutoModel.from_config(config)
        else:
            model = architecture(config)
    if named and architecture is None:
        warnings.warn(
            f"transformers has no class {named[0]!r}: its backbone, {type(model).__name__}, is counted.",
            stacklevel=2,
        )
    dtype = _dtype(config)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _dtype(config: Any) -> Any:
    """``torch_dtype`` before transformers 4.56, which leaves a newer file's ``dtype`` a word."""
    dtype = getattr(config, "dtype", None) or vars(config).get("torch_dtype")
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def _unknown(name: str, timm: Any, transformers: Any) -> ValueError:
    names = [*(timm.list_models() if timm else ()), *(transformers.CONFIG_MAPPING if transformers else ())]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f" Near misses: {', '.join(near)}." if near else ""
    return ValueError(
        f"{name!r} is no timm model, no transformers model type, no path to a config.json, and not in the "
        f"local hub cache (or the hub cannot be reached).{hint}"
    )


def _optional(package: str) -> Any:
    return importlib.import_module(package) if importlib.util.find_spec(package) else None
