"""What a user is told whose targets match nothing, or nothing that can be adapted: what there is instead."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from lightning_uora.adapters.kinds import CONVOLUTIONS, SUPPORTED, is_supported
from lightning_uora.config import PRESETS

__all__ = ["near_misses", "nothing_found", "nothing_inside"]

SHOWN = 3
"""Names that a message spells out."""


def near_misses(
    modules: dict[str, nn.Module], names: Sequence[str], pattern: str, heads: Sequence[str] = ()
) -> str:
    """What ``pattern``, which matches nothing, may have meant, as a sentence with a space before it."""
    if pattern.startswith("re:"):
        return _near_misses_in_full(names, pattern[3:])
    bare = [name for name, _ in modules[""].named_parameters() if f".{name}".endswith(f".{pattern}")]
    if bare:
        return f" It is a parameter, {bare[0]!r}, but UORA adapts whole layers: {SUPPORTED}."
    head = f" The head here is {_quoted(heads)}." if heads else ""
    depth = pattern.count(".") + 1
    endings = {".".join(name.split(".")[-depth:]): name for name in modules if name}
    near = difflib.get_close_matches(pattern, dict.fromkeys([*endings, *PRESETS]), n=SHOWN, cutoff=0.5)
    if near:
        return f"{head} Near misses: {_quoted(near)}."
    ends = sorted(
        {name.rsplit(".", 1)[-1] for name, module in modules.items() if name and is_supported(module)}
    )
    known = ", ".join(ends[:20]) or "none"
    return head or f" Names that can be adapted end in: {known}; presets are {', '.join(PRESETS)}."


def _near_misses_in_full(names: Sequence[str], expression: str) -> str:
    """Names that a regular expression matches in part, else those that look like it."""
    rule = " An expression must match the whole name"
    partly = [name for name in names if re.search(expression, name)]
    for longer in (f".*({expression})", f".*({expression}).*"):
        whole = [name for name in partly if re.fullmatch(longer, name)]
        if whole:
            return f"{rule}: {_quoted([f're:{longer}'])} matches {_quoted(whole[:SHOWN])}."
    near = difflib.get_close_matches(expression.replace("\\", ""), names, n=SHOWN, cutoff=0.5)
    return f"{rule}." + (f" Near misses: {_quoted(near)}." if near else "")


def nothing_inside(modules: dict[str, nn.Module], found: Sequence[str]) -> str:
    """Why what a pattern matches, no supported layer and nothing that holds one, cannot be adapted."""
    name = found[0]
    module = modules[name]
    what = f"matches {_quoted(found[:SHOWN])}, and {name!r} is a {type(module).__name__}"
    stacked = [p for p, parameter in module.named_parameters() if parameter.dim() > 2]
    convolutions = [inner for inner, part in module.named_modules() if isinstance(part, CONVOLUTIONS)]
    if convolutions:
        first = f"{name}.{convolutions[0]}".lstrip(".")
        return f"{what} without Linear-like layers in it; name its convolutions, such as {first!r}."
    if stacked:
        dims = module.get_parameter(stacked[0]).dim()
        return (
            f"{what} whose weights are bare parameters with {dims} axes "
            f"({', '.join(stacked[:SHOWN])}), which UORA does not adapt. If they are experts, set "
            "num_experts and is_transposed on that module (False: experts, outputs, inputs). UORA "
            f"adapts {SUPPORTED}."
        )
    return f"{what}; UORA adapts {SUPPORTED}."


def nothing_found(
    modules: dict[str, nn.Module], preset: str, left: Sequence[str], others: Sequence[str]
) -> str:
    """What the model holds where ``preset`` finds nothing.

    Args:
        modules: All modules by name.
        preset: What was given.
        left: Supported layers that are excluded, or trained as they are.
        others: Presets that find something.
    """
    kinds = Counter(
        type(m).__name__ for m in modules.values() if any(True for _ in m.parameters(recurse=False))
    )
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)) or "none"
    if others:
        advice = f" Use {' or '.join(map(repr, others))}, or name layers by pattern."
    elif left:
        shown = _quoted(left[:SHOWN])
        advice = (
            f" These layers are excluded, or heads that train in full: {shown}; to adapt one, give "
            "its full name."
        )
    else:
        advice = ""
    return (
        f"target_modules={preset!r} finds nothing to adapt in this model, whose layers with weights are: "
        f"{held}. UORA adapts {SUPPORTED}.{advice}"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
