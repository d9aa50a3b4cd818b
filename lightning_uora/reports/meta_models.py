"""A model by its name, on ``meta``: from timm's and transformers' registries and configurations."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["model_on_meta"]

HUB_SECONDS = 5
"""How long the hub's host may take to answer."""


# Note [When the hub is asked]
# A name that a library knows, a path and a cached name need no network. A name without a slash that is close
# to a known one is a typing error, unless it reads like the hub's first models (bert-base-uncased: a model
# type and a dash). The rest may be on the hub. transformers tries to reach it for half a minute, so its host
# is asked first, and only once.


def model_on_meta(name: str) -> nn.Module:
    """A model without storage: a timm name, or a transformers configuration by path, model type or hub name.

    A configuration that names its architecture gives that class (with its head), a bare model type the
    backbone in its default size. Nothing of the weights is read; a hub name needs the network or the cache,
    see Note [When the hub is asked]. ``HF_HUB_OFFLINE=1`` keeps it to the cache.

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
    if name in known and not Path(name).exists():
        config = _read(name, known[name])
    elif Path(name).exists():
        config = _read(name, lambda: transformers.AutoConfig.from_pretrained(name, local_files_only=True))
    else:
        config = _from_hub(name, timm, transformers)
    try:
        return _built(config, transformers)
    except Exception as error:
        raise ValueError(
            f"{name}: transformers cannot build a model from this configuration: {error}"
        ) from error


def _read(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # transformers raises what it likes of a bad configuration
        raise ValueError(f"{name}: {error}") from error


def _from_hub(name: str, timm: Any, transformers: Any) -> Any:
    """A configuration from the cache, or else from the hub, see Note [When the hub is asked]."""
    read = transformers.AutoConfig.from_pretrained
    if name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such file or folder.")
    with suppress(Exception):  # transformers says in many ways that it is not there
        return read(name, local_files_only=True)
    if _mistyped(name, timm, transformers):
        raise _unknown(name, timm, transformers)
    silence = _silence()
    if silence is not None:
        raise _unknown(name, timm, transformers, f", is not in the local hub cache, and {silence}")
    try:
        return read(name)
    except Exception as error:
        said = "" if "404" in str(error) or "not a valid" in str(error) else f" ({error})"
        raise _unknown(
            name, timm, transformers, f", and the hub has no configuration of this name{said}"
        ) from error


def _mistyped(name: str, timm: Any, transformers: Any) -> bool:
    types, models = list(transformers.CONFIG_MAPPING), timm.list_models() if timm else []
    of_hub = any(name.startswith(f"{known}-") for known in types)
    near = difflib.get_close_matches(name, models if of_hub else [*models, *types], n=1, cutoff=0.75)
    return "/" not in name and bool(near)


def _silence() -> str | None:
    """Why the hub cannot be asked; None where its host answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS
        ).close()
    except urllib.error.HTTPError:  # an answer
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # a host answers, with a certificate that others may trust
            return None
        return f"the hub cannot be reached ({reason})"
    return None


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
            f"transformers has no class {named[0]!r}; the counts are those of its backbone, "
            f"{type(model).__name__}.",
            stacklevel=2,
        )
    dtype = _dtype(config)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def _dtype(config: Any) -> Any:
    """``torch_dtype`` before transformers 4.56, which leaves a newer file's ``dtype`` a word."""
    dtype = getattr(config, "dtype", None) or vars(config).get("torch_dtype")
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def _unknown(name: str, timm: Any, transformers: Any, more: str = "") -> ValueError:
    names = [*(timm.list_models() if timm else ()), *(transformers.CONFIG_MAPPING if transformers else ())]
    near = difflib.get_close_matches(name.rpartition("/")[2], names, n=4, cutoff=0.6)
    hint = f" Near misses: {', '.join(near)}." if near else ""
    return ValueError(
        f"{name!r} is not a timm model, a transformers model type or the path of a config.json{more}.{hint}"
    )


def _optional(package: str) -> Any:
    return importlib.import_module(package) if importlib.util.find_spec(package) else None
