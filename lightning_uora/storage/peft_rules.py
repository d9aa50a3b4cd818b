"""Whether PEFT would put each adapter of an export where it belongs, asked of the PEFT that is installed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import named_modules
from lightning_uora.storage.peft_formats import USE_MERGE

__all__ = ["require_placed", "require_placed_in"]

# Note [What PEFT makes of names]
# PEFT takes an adapter of a transformers model for one that may come from transformers 4. While it loads, it
# moves targets that are experts' today to `target_parameters`, and renames keys by the patterns by which
# transformers reads older checkpoints. A pattern finds its text anywhere, and some find what is a name of
# today too: Laguna's `mlp.shared_expert.` finds `mlp.shared_experts`, as its dot is any character. A key that
# was renamed finds no place, and PEFT computes with the base there. Patterns depend on the family and on both
# versions. So PEFT's own functions are asked, with the names and the adapter's few numbers.

BELOW = "base_model.model."
"""What the keys of an export begin with."""
CONVERSION = "peft.utils.transformers_weight_conversion"


def require_placed(
    model: nn.Module, adapted: Iterable[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Raise unless PEFT would adapt the adapted modules, each with its own tensors, and no others.

    Warns where PEFT is not installed and transformers has patterns for the model. See Note [What PEFT makes
    of names].

    Args:
        model: The adapted model.
        adapted: Names of its modules, and of parameters of experts.
        tensors: Of the export.
        config: Likewise.
    """
    if importlib.util.find_spec("peft") is None:
        _warn_unasked(model)
        return
    wanted = list(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = _settings(config), _settings(config)
        keys = _reread(model, after, dict(tensors))
    _require_targets(model, wanted, after)
    _require_allowed(model, wanted, after)
    _require_scales(wanted, before, after)
    for key, value in tensors.items():
        if key not in keys or not (keys[key] is value or torch.equal(keys[key], value)):
            raise ValueError(
                f"PEFT would rename module {_module_of(key)!r} while it loads, as it does with older "
                f"checkpoints of {type(model).__name__}, and leave its adapter out; {USE_MERGE}."
            )


def require_placed_in(
    families: Iterable[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """The same for a file, of which nothing but transformers' names for the models is known.

    Patterns are then tried on whole names. That may find too much in a model of several, so the error says
    who knows.

    Args:
        families: ``model_type`` of each model of transformers in the one that was adapted.
        tensors: Of the export.
        config: Likewise.
    """
    rules = _conversion() if config["peft_type"] == "LORA" else None
    if rules is None:
        return
    for family in families:
        name = _moved(rules, family, config) or _renamed(rules, family, tensors)
        if name is not None:
            raise ValueError(
                f"PEFT may take module {name!r} for another one while it loads, as it does with older "
                f"checkpoints of {family}; export_peft(model, ...) asks it about your model, and `uora "
                "merge` keeps the adapter exactly."
            )


def _moved(rules: Any, family: str, config: Mapping[str, Any]) -> str | None:
    """The first of the targets that PEFT takes for experts."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type=family)  # type: ignore[assignment]
    before, after = _settings(config), _settings(config)
    if not before.target_modules or isinstance(before.target_modules, str):
        return None
    with suppress(ValueError):  # what it will not load it changed too
        rules.convert_peft_config_for_transformers(after, model=model, conversions=None)
        moved: set[str] = before.target_modules - set(after.target_modules)
        return min(moved, default=None)
    return str(min(before.target_modules))


def _renamed(rules: Any, family: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The module of the first key that PEFT renames to what is not the key's end."""
    patterns = rules.get_checkpoint_conversion_mapping(family)
    found = rules.build_peft_weight_mapping(patterns, "default", SimpleNamespace(peft_type="LORA"))
    renamings = [one for one in found if isinstance(one, rules.WeightRenaming)]
    converters = [one for one in found if isinstance(one, rules.WeightConverter)]
    for key in tensors:
        renamed, _ = rules.rename_source_key(key, renamings, converters)
        if not key.endswith(renamed.replace(".default", "", 1)):
            return _module_of(key)
    return None


def _conversion() -> Any:
    """The part of PEFT that goes by transformers' patterns; None where there is none."""
    if importlib.util.find_spec("peft") is None:
        return None
    try:
        return importlib.import_module(CONVERSION)
    except ImportError:  # transformers 4, or a PEFT that renames nothing
        return None


def _settings(config: Mapping[str, Any]) -> Any:
    """A configuration of PEFT as it is read from the file."""
    known: Any = importlib.import_module("peft").PeftConfig
    return known.from_peft_type(**copy.deepcopy(dict(config)))


def _reread(model: nn.Module, settings: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that PEFT gives them; the settings become what PEFT makes of them."""
    if getattr(getattr(model, "config", None), "model_type", None) is None:
        return tensors
    rules = _conversion()
    if rules is None:
        return tensors
    try:
        rules.convert_peft_config_for_transformers(settings, model=model, conversions=None)
        found = rules.convert_peft_adapter_state_dict_for_transformers(model, settings, tensors)
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"PEFT would not load this export: {said}; {USE_MERGE}.") from error
    return dict(found)


def _require_targets(model: nn.Module, wanted: list[str], settings: Any) -> None:
    """Raise where PEFT would adapt other modules than those that are adapted here."""
    found = set(_targets(model, wanted, settings))
    for name in wanted:
        if name not in found:
            raise ValueError(f"PEFT would not adapt module {name!r}, by its rules for names; {USE_MERGE}.")
    for name in found.difference(wanted):
        raise ValueError(
            f"PEFT would adapt module {name!r} too, by its rules for names, and it has no adapter here; "
            f"{USE_MERGE}."
        )


def _targets(model: nn.Module, wanted: list[str], settings: Any) -> Iterator[str]:
    """What PEFT would adapt: modules, and parameters, of which a module's weight goes by the module."""
    from peft.tuners.tuners_utils import check_target_module_exists

    parameters = set(getattr(settings, "target_parameters", None) or ())
    endings = tuple(f".{one}" for one in parameters)
    for path, module in named_modules(model).items():
        if path and settings.target_modules and check_target_module_exists(settings, path):
            yield path
        for name in (f"{path}.{leaf}" for leaf in module._parameters if parameters):
            if name in parameters or name.endswith(endings):
                yield name if name in wanted else name.removesuffix(".weight")


def _require_allowed(model: nn.Module, wanted: list[str], settings: Any) -> None:
    """Raise for modules that PEFT does not adapt in some families: Mamba's."""
    from peft.tuners import tuners_utils

    allowed = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if allowed is None:
        return
    for name in wanted:
        try:
            allowed(settings, model, name.rpartition(".")[2])
        except ValueError as error:
            raise ValueError(f"PEFT does not adapt module {name!r} of this family; {USE_MERGE}.") from error


def _require_scales(wanted: list[str], before: Any, after: Any) -> None:
    """Raise where PEFT would change the rank or the scale of an adapter."""
    from peft.utils.other import get_pattern_key

    for name in wanted:
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            if not hasattr(before, field):  # VeRA has one rank
                continue
            old, new = (
                getattr(one, field).get(get_pattern_key(getattr(one, field), name), getattr(one, default))
                for one in (before, after)
            )
            if old != new:
                raise ValueError(
                    f"PEFT would give module {name!r} another rank or scale, by its rules for names; "
                    f"{USE_MERGE}."
                )


def _module_of(key: str) -> str:
    """The module that a key of an export is of."""
    return key.removeprefix(BELOW).partition(".lora_")[0].replace(".base_layer", "")


def _warn_unasked(model: nn.Module) -> None:
    """Tell that PEFT could not be asked, where it has something to say."""
    patterns = sys.modules.get("transformers.conversion_mapping")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if patterns is not None and kind and patterns.get_checkpoint_conversion_mapping(kind) is not None:
        warnings.warn(
            f"PEFT is not installed here, and it may rename modules of a {type(model).__name__} while it "
            "loads; compare outputs there, or export where PEFT is installed, which is asked then.",
            stacklevel=6,
        )
