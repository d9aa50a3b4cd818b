"""What a PEFT configuration says of a model: its task, its class, and its modules by their names."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_uora.adapters import plain

__all__ = ["HEADS", "by_parameter", "known_targets", "model_facts", "saved_whole", "shortest_targets"]
__all__ += ["task_type", "topmost", "version_fact"]

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How transformers names its classes, and what PEFT calls their task."""
HEADS: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Endings of names: of a model with that task, PEFT loads such modules whole, asked or not."""


def task_type(model: nn.Module) -> str | None:
    """PEFT's task of a text model of transformers; None for all others.

    None is right for those: PEFT then finds the class by what :func:`model_facts` tells, while its classes
    for tasks pass ``input_ids`` on, which images and sound do not have.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    if "PreTrainedModel" not in names or getattr(model, "main_input_name", "") != "input_ids":
        return None
    tasks = (task for name in names for ending, task in TASKS.items() if name.endswith(ending))
    task = next(tasks, None)
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and (
        not hasattr(model, "generate") or encodes != (task == "SEQ_2_SEQ_LM")
    ):
        return None
    return task


def model_facts(model: nn.Module, task: str | None) -> dict[str, object]:
    """``task_type``, and where there is none the class by which ``AutoPeftModel`` finds the base."""
    cls = type(model)
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {"task_type": task, "auto_mapping": None if task else mapping}


def version_fact() -> dict[str, str]:
    """The version of PEFT that is installed, as PEFT writes it from 0.18 on; earlier ones warn of the key."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {"peft_version": version} if [int(n) for n in version.split(".")[:2]] >= [0, 18] else {}


# Note [Dense layers beside experts]
# PEFT 0.21 takes the names that mixtures of experts once had for their experts' weights (`down_proj`, `w1`)
# for what they are called now, wherever they stand: also of a dense or shared MLP. Such a layer is told by
# the name of its parameter, which PEFT leaves alone.

ONCE_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def by_parameter(layers: Mapping[str, Mapping[str, Any]], mixture: bool) -> dict[str, str]:
    """PEFT's ``target_parameters`` by layer: experts, and what stands beside them under their old names.

    Args:
        layers: The facts of each.
        mixture: Whether the model is known to have experts. See Note [Dense layers beside experts].
    """
    stacked = [name for name, layer in layers.items() if layer.get("experts")]
    dense = [n for n in layers if n not in stacked and n.rpartition(".")[2] in ONCE_EXPERTS]
    beside = {name: f"{name}.weight" for name in dense} if mixture or stacked else {}
    return {name: beside.get(name, name) for name in layers if name in stacked or name in beside}


# Note [How PEFT matches names]
# target_modules as a list: a name that equals an entry or ends with "." and the entry. modules_to_save: a
# name that ends with an entry, without a dot, under each of its names if a module has several.


def shortest_targets(adapted: Collection[str], modules: Iterable[str]) -> list[str] | str:
    """The shortest endings of names that match the adapted modules and no others.

    A regular expression where even a full name matches another module, see Note [How PEFT matches names].

    Args:
        adapted: Full names.
        modules: Names of all modules of the model.
    """
    taken = {ending for name in modules if name not in adapted for ending in _endings(name)}
    found: dict[str, None] = {}
    for name in adapted:
        ending = next((ending for ending in _endings(name) if ending not in taken), None)
        if ending is None:
            return _expression(adapted)
        found[ending] = None
    return [one for one in found if not any(one.endswith(f".{other}") for other in found)]


def known_targets(adapted: Collection[str], known: Iterable[str]) -> list[str] | str:
    """Full names; a regular expression where they match more of what is known, or may do so.

    A name without a dot, such as ``"0"``, is likely to be the ending of another.

    Args:
        adapted: Full names.
        known: Names of modules, not of all: those without parameters may be missing.
    """
    taken = {ending for name in known if name not in adapted for ending in _endings(name)}
    plain = all("." in name and name not in taken for name in adapted)
    return list(adapted) if plain else _expression(adapted)


def _endings(name: str) -> list[str]:
    """Shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _expression(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def saved_whole(model: nn.Module, endings: Collection[str]) -> list[str]:
    """Modules that PEFT saves and loads whole, under all their names; see Note [How PEFT matches names]."""
    names = [plain(name) for name, _ in model.named_modules(remove_duplicate=False)]
    return topmost([name for name in names if name.endswith(tuple(endings))])


def topmost(names: Collection[str]) -> list[str]:
    """Those that are not inside of another."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
