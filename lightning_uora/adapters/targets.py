"""Which modules are adapted and which are trained as they are: patterns, presets and their errors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_uora.adapters.kinds import has_plain_forward, is_linear_like, is_supported, unsupported
from lightning_uora.adapters.names import named_parameters
from lightning_uora.adapters.opaque import is_opaque, is_quantised
from lightning_uora.adapters.own_layers import own_layers
from lightning_uora.adapters.passing import frozen_networks, frozen_parts, passed_by, tied_beyond
from lightning_uora.adapters.roles import attention_projections, find_heads, inside, output_embeddings
from lightning_uora.adapters.stacked import Experts, named_layers, routers
from lightning_uora.adapters.wrong_targets import near_misses, nothing_found, nothing_inside
from lightning_uora.config import PRESETS, UORAConfig

__all__ = ["Selection", "select", "trained_as_they_are"]


@dataclass(frozen=True)
class Selection:
    """What :func:`select` found: names in model order.

    Attributes:
        adapted: Modules to adapt.
        trained: Modules and bare parameters to train as they are.
        left: A user's own layers that are neither, and stay frozen at their start.
        kept: Parts that the user froze, beside parts that train: left as they are.
        said: What the user should know of the choice, a sentence each.
        exact: ``trained`` names the biases too, as a record does; else ``config.bias`` finds them.
    """

    adapted: tuple[str, ...]
    trained: tuple[str, ...]
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    exact: bool = True


def select(model: nn.Module, config: UORAConfig) -> Selection:
    """The modules to adapt and the modules to train as they are. Nothing is changed.

    Promises: an adapted module is of a supported kind and not inside a trained one; at least one is found.

    Raises:
        ValueError: A pattern matches nothing (near misses are named) or only what cannot be adapted; an
            invalid regular expression; a preset that finds nothing (another is proposed); a module named both
            as target and as trained; a weight shared by two targets; dropout where it cannot be applied.
    """
    modules, own = named_layers(model), own_layers(model)
    targets = _as_tuple(config.target_modules)
    excluded = inside(modules, _expand(modules, config.exclude_modules, "exclude_modules"))
    networks = frozen_networks(modules)
    if config.trainable_modules == "auto":
        heads = dict.fromkeys([*find_heads(model), *own.heads])
        trained = tuple(name for name in heads if name not in targets and name not in excluded)
        reserved = inside(modules, trained) - set(targets)
    else:
        trained = _trained(model, modules, _as_tuple(config.trainable_modules))
        reserved = inside(modules, trained)
        both = [name for name in targets if name in reserved]
        if both:
            raise ValueError(
                f"target_modules and trainable_modules both name {both[0]!r}; name it in one of them: "
                "adapted, or trained in full."
            )
    chosen: set[str] = set()
    for target in targets:
        found = _preset(modules, target) if target in PRESETS else _layers(modules, target)
        kept = [name for name in found if name not in excluded and name not in reserved]
        if not kept and target in PRESETS:
            raise ValueError(_nothing_found(modules, target, excluded | reserved))
        chosen.update(_adaptable(modules, target, kept, found))
    chosen -= inside(modules, networks) - set(targets)
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} finds layers only in {', '.join(networks)}, which you "
            "froze beside a model that trains; name layers of that one, or unfreeze this one."
        )
    frozen, there = frozen_parts(modules, chosen, targets)
    frozen = tuple(dict.fromkeys([*networks, *frozen]))
    if config.trainable_modules == "auto":
        still = inside(modules, frozen)
        trained = tuple(name for name in trained if name not in still)
    training = inside(modules, trained)
    for name, module in modules.items():
        if name in training and any(is_quantised(p) for p in module.parameters(recurse=False)):
            raise ValueError(
                f"trainable_modules: {name!r} ({type(module).__name__}) is quantised and cannot train; "
                "leave it out of the quantisation, or out of trainable_modules."
            )
    chosen -= there
    adapted = tuple(name for name in modules if name in chosen)
    _check(modules, adapted, config)
    new = dict.fromkeys([*_free_heads(model, modules), *own.heads, *own.others])
    new = new if config.trainable_modules else {}
    left = [name for name in new if not _touched(name, (*adapted, *trained)) and name not in excluded]
    said = [
        *tied_beyond(model, trained),
        *passed_by(modules, adapted, (*trained, *excluded, *frozen), targets),
    ]
    return Selection(adapted, trained, tuple(left), frozen, tuple(said), exact=False)


def _free_heads(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Task heads that the user did not freeze."""
    return [n for n in find_heads(model) if any(p.requires_grad for p in modules[n].parameters())]


def trained_as_they_are(model: nn.Module, config: UORAConfig) -> tuple[str, ...]:
    """Names of the modules and parameters that :func:`select` would train as they are."""
    return select(model, config).trained


def _touched(name: str, others: tuple[str, ...]) -> bool:
    """Whether one of ``others`` is ``name``, inside of it, or around it."""
    return any(f"{one}.".startswith(f"{name}.") or f"{name}.".startswith(f"{one}.") for one in others)


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _expand(modules: dict[str, nn.Module], patterns: Sequence[str], field: str) -> tuple[str, ...]:
    found = {name for pattern in _as_tuple(patterns) for name in _matches(modules, pattern, field)}
    return tuple(name for name in modules if name in found)


def _trained(model: nn.Module, modules: dict[str, nn.Module], patterns: Sequence[str]) -> tuple[str, ...]:
    """Modules, and parameters by their full names or suffixes, in model order."""
    bare = tuple(named_parameters(model, every=True))
    found = {name for pattern in patterns for name in _matches(modules, pattern, "trainable_modules", bare)}
    within = tuple(f"{name}." for name in modules if name in found)
    alone = [name for name in bare if name in found and not name.startswith(within)]
    return tuple(dict.fromkeys((*(name for name in modules if name in found), *alone)))


def _matches(
    modules: dict[str, nn.Module], pattern: str, field: str, parameters: tuple[str, ...] = ()
) -> list[str]:
    """Names that ``pattern`` matches, in model order; at least one."""
    names = (*modules, *parameters)
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{field}={pattern!r} is not a valid regular expression: {error}.") from error
        found = [name for name in names if expression.fullmatch(name)]
    elif any(character in pattern for character in "*?["):
        found = [name for name in names if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")]
    else:
        found = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if not found:
        what = "module or parameter" if parameters else "module"
        near = near_misses(modules, names, pattern, find_heads(modules[""]) if parameters else ())
        raise ValueError(f"{field}={pattern!r} matches no {what}.{near}")
    return found


def _layers(modules: dict[str, nn.Module], target: str) -> list[str]:
    """What a pattern matches; where that is containers alone, their Linear-like layers and attention."""
    found = _matches(modules, target, "target_modules")
    if any(is_supported(modules[name]) or "weight" in modules[name]._parameters for name in found):
        return found
    within = inside(modules, found)
    return [name for name in _preset(modules, "all-linear") if name in within] or found


def _adaptable(modules: dict[str, nn.Module], target: str, kept: list[str], found: list[str]) -> list[str]:
    """Those of ``kept`` with a supported weight; what was named outright and has none raises."""
    supported = [name for name in kept if is_supported(modules[name])]
    exact = target not in PRESETS and not target.startswith("re:") and not any(c in target for c in "*?[")
    for name in kept:
        owns_weight = "weight" in modules[name]._parameters and not is_supported(modules[name])
        if (exact and owns_weight) or name in supported:
            reason = unsupported(name, modules[name])
            if reason is not None:
                raise ValueError(f"target_modules={target!r}: {reason}")
    if found and not kept:
        raise ValueError(
            f"target_modules={target!r} matches only modules that are excluded or trained in full; "
            "give a layer's full name, or change trainable_modules."
        )
    if not supported:
        raise ValueError(f"target_modules={target!r} {nothing_inside(modules, kept)}")
    return supported


def _nothing_found(modules: dict[str, nn.Module], preset: str, taken: set[str]) -> str:
    """What is there instead, outside of what is excluded or trained as it is (``taken``)."""
    left = [name for name, module in modules.items() if is_supported(module) and name in taken]
    others = [name for name in PRESETS if name != preset and set(_preset(modules, name)) - taken]
    return nothing_found(modules, preset, left, others)


def _preset(modules: dict[str, nn.Module], preset: str) -> list[str]:
    outputs, choosing = {id(module) for module in output_embeddings(modules)}, routers(modules)
    candidates = {
        name: module
        for name, module in modules.items()
        if is_supported(module)
        and id(module) not in outputs
        and name not in choosing
        and not (isinstance(module, Experts) and unsupported(name, module))  # said by `passed_by`
    }
    if preset == "attention":
        return attention_projections(modules, candidates)
    if preset == "all-linear":
        kinds = (nn.MultiheadAttention, Experts)
        return [n for n, m in candidates.items() if is_linear_like(m) or isinstance(m, kinds)]
    return list(candidates)


def _check(modules: dict[str, nn.Module], adapted: tuple[str, ...], config: UORAConfig) -> None:
    """What only the whole choice shows: shared weights, and dropout where nothing can drop out."""
    seen: dict[int, str] = {}
    for name in adapted:
        for parameter in modules[name].parameters(recurse=False):
            if parameter.dim() > 1 and seen.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"modules {seen[id(parameter)]!r} and {name!r} share one weight, which would be adapted "
                    "twice; exclude one of them with exclude_modules."
                )
        kind, opaque = type(modules[name]), is_opaque(modules[name])
        if opaque and config.compute == "merged":
            raise ValueError(
                f"compute='merged' has to build the effective weight, but {name!r} ({kind.__name__}) is "
                "quantised; use compute='auto'."
            )
        if config.dropout > 0.0 and not (opaque or has_plain_forward(kind) or kind is Experts):
            raise ValueError(
                f"dropout={config.dropout} needs modules with the plain Linear forward, but {name!r} is a "
                f"{kind.__name__}; set dropout=0.0 or exclude it."
            )
