"""Export to Hugging Face PEFT: LoRA, exact for any mixture of shapes; VeRA where A and B are shared.

LoRA: ``lora_A = diag(d) A``, ``lora_B = diag(b) B``, ``lora_alpha = r``; no rounding beyond float32, and no
decomposition unless ``max_rank`` asks for one. VeRA: the vectors and, in the same file, A and B themselves.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_uora.adapters import (
    AdaptedModule,
    activated,
    facts,
    has_experts,
    key_of,
    moving_norms,
    named_adapters,
    named_modules,
    plain,
    trained_names,
    unwrapped,
)
from lightning_uora.distributed import is_sharded
from lightning_uora.storage.adapter_files import write_folder
from lightning_uora.storage.low_rank import Loss
from lightning_uora.storage.peft_formats import USE_MERGE, lora, require_told_apart, vera
from lightning_uora.storage.peft_names import (
    HEADS,
    by_parameter,
    known_targets,
    model_facts,
    saved_whole,
    shortest_targets,
    task_type,
    topmost,
    version_fact,
)
from lightning_uora.storage.peft_rules import require_placed, require_placed_in
from lightning_uora.storage.restoring import require_finite
from lightning_uora.storage.weight_readers import weight_reader

__all__ = ["export_peft", "write_peft"]

NOTABLE = 1e-3
"""Relative error of a layer's update from which an export warns."""


def export_peft(
    model: nn.Module,
    directory: str | Path,
    format: Literal["lora", "vera"] = "lora",
    base_model_name_or_path: str | None = None,
    max_rank: int | None = None,
    name: str | None = None,
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, directory)`` loads with equal outputs.

    ``AutoPeftModelForCausalLM.from_pretrained(directory)``, or the class for the model's task, loads it too
    if the base can be loaded by its name. Experts are written as PEFT 0.21 reads them; versions before 0.17
    do not know ``target_parameters`` and would leave them out.

    Args:
        model: An adapted model, or the part of one that will be PEFT's base (``lightning_module.model``).
        directory: Made if it does not exist; written whole or not at all.
        format: ``"lora"`` works for every Linear, Conv1D and plain undilated ungrouped convolution; each
            layer gets its own projections. ``"vera"`` needs one A and one B for all layers
            (``share="model"``, one shape).
        base_model_name_or_path: Written into the configuration; by default the name that a transformers model
            knows itself by.
        max_rank: For ``"lora"``: layers of a higher rank are replaced with their best approximation of this
            rank. That is exact if the layer has no more inputs or outputs than that. Otherwise the relative
            error of the updates is a warning if it is above 1e-3 in any layer, and a log line if not. None:
            exact.
        name: Which adapter; None: the active one.

    Raises:
        ValueError: The model is not adapted or not calibrated, or holds something that the format cannot
            express exactly, or a module that the installed PEFT would not find again by its name; the message
            names the module and says what to do instead. ``max_rank`` is not a positive number, or is given
            for ``"vera"``.

    Source: formats of PEFT (huggingface.co/docs/peft); VeRA's from arXiv:2310.11454.
    """
    with activated(model, name):
        _export(unwrapped(model), directory, format, base_model_name_or_path, max_rank)


def _export(
    model: nn.Module,
    directory: str | Path,
    format: Literal["lora", "vera"],
    base_model_name_or_path: str | None,
    max_rank: int | None,
) -> None:
    adapters = dict(named_adapters(model))
    if not adapters:
        raise ValueError(f"model ({type(model).__name__}) holds no adapter; call attach_uora first.")
    if "" in adapters:
        raise ValueError(
            "model is itself the adapted module, and PEFT adapts only modules inside a model; export "
            "its parent."
        )
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    if is_sharded(model):
        raise ValueError("model is sharded; save a checkpoint and export that file with `uora export`.")
    task, saved = _task_and_saved(model, adapters)
    left = {name: module for name, module in adapters.items() if not _inside(name, saved)}
    _require_one_place(model, left)
    _require_called(model, left)
    layers, mixture = {name: facts(module) for name, module in left.items()}, has_experts(model)
    parameters = by_parameter(layers, mixture) if format == "lora" else {}
    loss = write_peft(
        left,
        layers,
        saved,
        {name: value for head in saved for name, value in _whole_state(model, head).items()},
        directory,
        format,
        base_model_name_or_path,
        max_rank,
        shortest_targets(
            [name for name in left if name not in parameters],
            [plain(name) for name, _ in model.named_modules()],
        ),
        model_facts(model, task),
        mixture,
        model,
    )
    if loss is not None and loss.worst > NOTABLE:
        warnings.warn(str(loss), stacklevel=3)
    elif loss is not None:
        logging.getLogger(__name__).info(str(loss))


def write_peft(
    adapters: dict[str, AdaptedModule],
    layers: dict[str, dict[str, Any]],
    heads: list[str],
    trained: dict[str, Tensor],
    directory: str | Path,
    format: str,
    base_model_name_or_path: str | None,
    max_rank: int | None = None,
    targets: list[str] | str | None = None,
    about: dict[str, object] | None = None,
    mixture: bool = False,
    model: nn.Module | None = None,
    families: Iterable[str] = (),
) -> Loss | None:
    """Write adapters, of a model or of a skeleton, with the facts of the layers that they were trained on.

    Args:
        adapters: Of a model or of a skeleton, by name.
        layers: The facts of each.
        heads: Modules that are saved whole.
        trained: Their tensors.
        directory: Made if it does not exist.
        format: As for :func:`export_peft`, like ``max_rank``.
        base_model_name_or_path: Written as it is.
        max_rank: Of the factors.
        targets: PEFT's ``target_modules``; None: from the names that are known here.
        about: What the configuration tells of the model: ``task_type`` and ``auto_mapping``.
        mixture: Whether the model has experts, adapted or not, see Note [Dense layers beside experts].
        model: The adapted model, for which PEFT is asked where it would put the adapters.
        families: Without it, what transformers calls the models in it.

    Returns:
        What ``max_rank`` loses; None without it.
    """
    if format not in ("lora", "vera"):
        raise ValueError(f"format={format!r} is not allowed; format must be 'lora' or 'vera'.")
    if max_rank is not None and (format == "vera" or max_rank < 1):
        raise ValueError(
            f"max_rank={max_rank} is not allowed; max_rank must be a positive number, with format='lora'."
        )
    vectors = {f"{n}.{v}": getattr(m, v) for n, m in adapters.items() for v in ("uora_d", "uora_b")}
    require_finite(vectors | dict(trained), "the model", "exported")
    require_told_apart(heads, format)
    for module in adapters.values():
        module._uora.owner.require_calibrated("an export")
    if format == "vera":
        tensors, settings, loss = *vera(adapters, layers), None
    else:
        tensors, settings, loss = lora(adapters, layers, max_rank)
    parameters = by_parameter(layers, mixture) if format == "lora" else {}
    if targets is None:
        targets = known_targets([name for name in adapters if name not in parameters], heads)
    config = {
        **(about or {"task_type": None}),
        **version_fact(),
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": any(
            part[4] for layer in layers.values() for part in layer["parts"] if not layer.get("experts")
        ),
        "inference_mode": True,
        "modules_to_save": topmost(heads) or None,
        "target_modules": targets or None,
        **({"target_parameters": list(parameters.values())} if parameters else {}),
        **settings,
    }
    if model is not None:
        require_placed(model, adapters, tensors, config)
    else:
        require_placed_in(families, tensors, config)
    tensors |= {f"base_model.model.{name}": value for name, value in trained.items()}
    write_folder(
        directory, "adapter_model.safetensors", _apart(tensors), "adapter_config.json", lambda _: config
    )
    return loss


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own, which is what safetensors writes: tied weights share theirs."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in tensors.items():
        kept = t.detach().cpu().contiguous()
        pointer = kept.untyped_storage().data_ptr()
        apart[name] = kept.clone() if pointer in seen else kept
        seen.add(pointer)
    return apart


def _task_and_saved(model: nn.Module, adapters: dict[str, AdaptedModule]) -> tuple[str | None, list[str]]:
    """PEFT's task, and all modules that it will load whole: what was trained, and heads that the task adds.

    One that is adapted too is saved with its update merged. The task is dropped where nothing else is
    adapted, because PEFT needs one layer with LoRA.
    """
    heads = _heads(model)
    for task in (task_type(model), None):
        saved = saved_whole(model, [*heads, *HEADS.get(task, ())])
        if not all(_inside(name, saved) for name in adapters):
            return task, saved
    raise ValueError(
        f"modules {next(iter(adapters))!r} and {heads[0]!r} share a trained weight and nothing "
        f"else is adapted, which PEFT's format cannot express; {USE_MERGE}."
    )


def _inside(name: str, modules: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _whole_state(model: nn.Module, head: str) -> dict[str, Tensor]:
    """A module's state under its names in the model, as it would be without adapters: merged."""
    module = model.get_submodule(head)
    state = {
        f"{head}.{name}": value
        for name, value in module.state_dict().items()
        if name.rpartition(".")[2] not in ("uora_d", "uora_b")
    }
    for name, adapted in named_adapters(module):
        weights = zip(adapted.adapted_parts, adapted.merged_weights(), strict=True)
        for part, (_, _, weight) in weights:
            state[f"{head}.{key_of(name, part)}"] = weight
    return state


def _require_one_place(model: nn.Module, adapters: dict[str, AdaptedModule]) -> None:
    """Raise for an adapted module that stands in two places: PEFT would replace it in the first alone."""
    first = {id(module): name for name, module in adapters.items()}
    for path, parent in named_modules(model).items():
        for child, module in parent._modules.items():
            name = f"{path}.{child}" if path else child
            if first.get(id(module), name) != name:
                raise ValueError(
                    f"modules {first[id(module)]!r} and {name!r} are one adapted module, and PEFT would "
                    f"adapt only the first; {USE_MERGE}."
                )


def _require_called(model: nn.Module, adapters: dict[str, AdaptedModule]) -> None:
    """See Note [Weights that are read elsewhere]. A warning where the module is called too."""
    said: set[str] = set()
    for name in adapters:
        if adapters[name].home is not adapters[name]:
            continue
        found = weight_reader(model, name)
        if found is not None and not found[1]:
            raise ValueError(
                f"{found[0]} reads the weight of {name!r} without calling the module, so PEFT would use "
                f"the base weight there; {USE_MERGE}."
            )
        if found is not None and found[0] not in said:
            said.add(found[0])
            warnings.warn(
                f"{found[0]} may read the weight of {name!r} without calling the module; if it does, PEFT "
                "uses the base weight there. Compare the outputs, or merge.",
                stacklevel=5,
            )


def _heads(model: nn.Module) -> list[str]:
    """Modules that were trained whole, and all that share a weight with them, under all their names.

    Raises for trained parameters that have no place in PEFT's format. Parameters are told by identity.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(plain(name))
    heads: dict[str, None] = {}
    found = trained_names(model)
    trained = {id(parameter) for parameter in found.values()}
    for name, parameter in found.items():
        of = owners[id(parameter)]
        if not all(of) or not any(_is_whole(model.get_submodule(owner), trained) for owner in of):
            raise ValueError(
                f"{name} is a bare parameter that was trained, which PEFT's format cannot store; {USE_MERGE}."
            )
        heads |= dict.fromkeys(of)
    if moving_norms(model):
        warnings.warn(
            "PEFT's format cannot store BatchNorm statistics; if training changed them, outputs will differ.",
            stacklevel=5,
        )
    return list(heads)


def _is_whole(module: nn.Module, trained: set[int]) -> bool:
    """Whether all of a module was trained, and it has no adapter."""
    return not isinstance(module, AdaptedModule) and all(id(p) in trained for p in module.parameters())
