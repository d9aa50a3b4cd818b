"""transformers: every model type, built from a tiny configuration, with inputs that it runs on."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from tests.families import wake
from tests.sweep.dummy_inputs import candidates
from tests.sweep.life import NotRunnableError, Run, look_at
from tests.sweep.tiny_configs import Recipe, recipes, shrink

LARGEST = 40_000_000
"""Parameters of a model that is run."""
MISMATCH = re.compile(
    r"(image|video|audio)\s+features and \w+ tokens do not match.*?features:? (\d+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Built:
    """A model that runs, and how it was come by."""

    model: nn.Module
    run: Run
    recipe: str
    inputs: str


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING_NAMES)


def classes(config_class: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """Models of a configuration: the one of ``AutoModel``, then those of its own file, bare ones first."""
    found = [MODEL_MAPPING[config_class]] if config_class in MODEL_MAPPING else []
    flat = [c for entry in found for c in (entry if isinstance(entry, (list, tuple)) else [entry])]
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    own = vars(importlib.import_module(name)).values()
    mine = [c for c in own if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c.__module__ == name]
    fitting = [
        c for c in mine if c.config_class is config_class and not c.__name__.endswith("PreTrainedModel")
    ]
    fitting.sort(key=lambda c: (not c.__name__.endswith("Model"), "For" in c.__name__))
    return list(dict.fromkeys([*flat, *fitting]))[:3]


def configurations(model_type: str) -> Iterator[tuple[Recipe, PretrainedConfig]]:
    """Configurations to try, the smallest first; those that cannot be made are left out."""
    errors = []
    made = False
    for recipe in recipes():
        try:
            config = shrink(CONFIG_MAPPING[model_type](), recipe)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        made = True
        yield recipe, config
    if not made:
        raise NotRunnableError(f"no configuration: {errors[-1]}")


def count(cls: type[PreTrainedModel], config: PretrainedConfig) -> int:
    """Parameters, counted without storage; 0 where a model cannot be made without."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in cls(config).parameters())
    except (RuntimeError, NotImplementedError):
        return 0


def build(model_type: str) -> Built:
    """The first recipe and inputs that run, with gradients and the same output twice.

    Raises:
        NotRunnableError: None does; the last reason of the likeliest recipe is given.
    """
    reasons: list[str] = []
    for cls, recipe, config in trials(model_type):
        try:
            built = attempt(cls, recipe, config)
        except Exception as error:
            reasons.append(f"{cls.__name__}: {type(error).__name__}: {first_line(error)}")
        else:
            return built
    raise NotRunnableError(reasons[0] if reasons else "no model class")


def trials(model_type: str) -> Iterator[tuple[type[PreTrainedModel], Recipe, PretrainedConfig]]:
    found = classes(CONFIG_MAPPING[model_type])
    for recipe, config in configurations(model_type):
        for cls in found:
            yield cls, recipe, config


def attempt(cls: type[PreTrainedModel], recipe: Recipe, config: PretrainedConfig) -> Built:
    if count(cls, copy.deepcopy(config)) > LARGEST:
        raise NotRunnableError(f"more than {LARGEST:,} parameters")
    reasons: list[str] = []
    for start in (wake, spread, asleep):
        torch.manual_seed(0)
        model = start(cls(copy.deepcopy(config)).eval().float())
        for name, inputs in candidates(model, config):

            def run(m: nn.Module, inputs: dict[str, Any] = inputs) -> Any:
                return m(**inputs)

            try:
                with_placeholders(model, config, run, inputs)
                look_at(model, run)
            except Exception as error:
                reasons.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            else:
                return Built(model, run, recipe.name, name)
        if not any(": NotRunnableError: " in reason for reason in reasons):
            break  # it is the inputs, which another start would not change
    raise NotRunnableError(
        f"runs on no inputs; {reasons[0] if reasons else 'none fit its arguments'}", reasons
    )


def spread(model: nn.Module) -> nn.Module:
    """Weights as large as signals need to come through, where the model's own start is too small."""
    with torch.no_grad():
        for module in wake(model).modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight)
    return model


def asleep(model: nn.Module) -> nn.Module:
    """As the library starts it."""
    return model


def with_placeholders(model: nn.Module, config: PretrainedConfig, run: Run, inputs: dict[str, Any]) -> None:
    """Put as many image (or video, or audio) tokens into the text as the model says it has features for."""
    if set(inputs) & {"input_ids"} and len(inputs) > 1:
        try:
            with torch.no_grad():
                run(model)
        except ValueError as error:
            place(str(error), config, inputs)


def place(message: str, config: PretrainedConfig, inputs: dict[str, Any]) -> None:
    found = MISMATCH.search(message)
    if found is None:
        return
    sense, features = found.group(1).lower(), int(found.group(2))
    names = [f"{sense}_token_id", f"{sense}_token_index", f"{sense}_tokens_id"]
    token = next(
        (getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None
    )
    if token is None or not 0 < features <= 4096:
        return
    rows = len(inputs["input_ids"]) if features % len(inputs["input_ids"]) == 0 else 1
    words = inputs["input_ids"][:rows]
    ids = torch.cat([words[:, :2], words.new_full((rows, features // rows), token), words[:, 2:]], 1)
    inputs["input_ids"] = ids
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == token).int() * (2 if sense == "video" else 1)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
