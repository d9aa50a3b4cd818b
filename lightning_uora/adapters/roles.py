"""What a layer is for in its model, told by timm's and transformers' interfaces and by names.

Attention's projections, layers that turn hidden states into a vocabulary, and task heads.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_uora.adapters.kinds import is_linear_like
from lightning_uora.adapters.names import named_modules
from lightning_uora.adapters.role_names import (
    ATTENTION,
    HEADS,
    NOT_PROJECTION,
    OUTPUT,
    QUERY_KEY_VALUE,
    SHORT_QUERY_KEY_VALUE,
    WRAPPERS,
)

__all__ = ["attention_projections", "find_heads", "inside", "output_embeddings"]


def inside(modules: dict[str, nn.Module], names: Iterable[str]) -> set[str]:
    """``names`` and everything below them."""
    roots = tuple(names)
    return {name for name in modules if any(name == root or name.startswith(f"{root}.") for root in roots)}


def output_embeddings(modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The layers that turn hidden states into vocabulary logits (``lm_head`` and its kin)."""
    found = [
        module for name, module in modules.items() if name.rsplit(".", 1)[-1] in ("lm_head", "embed_out")
    ]
    for module in modules.values():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                output = getter()
            except (NotImplementedError, AttributeError):
                continue
            found += [output] if isinstance(output, nn.Module) else []
    return found


def attention_projections(modules: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> list[str]:
    """Query, key, value and output projections by the names that the families give them."""
    chosen: set[str] = set()
    blocks: set[tuple[str, ...]] = set()
    for name, module in candidates.items():
        if isinstance(module, nn.MultiheadAttention):
            chosen.update((name, f"{name}.out_proj".lstrip(".")))
            continue
        path, leaf = _unwrap(name)
        if _is_pointwise(module) and _is_query_key_value(modules, path, leaf):
            chosen.add(name)
            blocks.add(_block(path))
    for name, module in candidates.items():
        path, leaf = _unwrap(name)
        if leaf in OUTPUT and _is_pointwise(module) and any(_within(path, block) for block in blocks):
            chosen.add(name)
    return [name for name in candidates if name in chosen]


def _unwrap(name: str) -> tuple[tuple[str, ...], str]:
    """Path and leaf name of a projection past its wrapper: ``attn.query.proj`` is ``attn``, ``query``."""
    parts = name.split(".")
    while len(parts) > 1 and (parts[-1] in WRAPPERS or parts[-1].isdigit()):
        parts.pop()
    if len(parts) > 1 and parts[-1] == "proj" and parts[-2].lower() in SHORT_QUERY_KEY_VALUE | {"output"}:
        parts.pop()
    return tuple(parts[:-1]), parts[-1].lower()


def _is_query_key_value(modules: dict[str, nn.Module], path: tuple[str, ...], leaf: str) -> bool:
    if any(NOT_PROJECTION.search(part) for part in path[-2:]):
        return False
    if leaf in QUERY_KEY_VALUE:
        return True
    if leaf not in SHORT_QUERY_KEY_VALUE:
        return False
    siblings = {name.lower() for name, _ in modules[".".join(path)].named_children()}
    return any(ATTENTION.search(part) for part in path[-3:]) or (
        "q" in siblings and bool(siblings & {"k", "kv"})
    )


def _block(path: tuple[str, ...]) -> tuple[str, ...]:
    """The block around a projection: up to the innermost part that is called attention, else the parent.

    Of ``attention.attention.query`` it is the outer one, beside whose inner one ``output.dense`` stands.
    """
    for end in range(len(path), max(len(path) - 3, 0), -1):
        if ATTENTION.search(path[end - 1]):
            while end > 1 and ATTENTION.search(path[end - 2]):
                end -= 1
            return path[:end]
    return path


def _within(path: tuple[str, ...], block: tuple[str, ...]) -> bool:
    inner = path[len(block) :]
    return (
        path[: len(block)] == block
        and len(inner) <= 1
        and not any(NOT_PROJECTION.search(part) for part in inner)
    )


def _is_pointwise(module: nn.Module) -> bool:
    """Linear-like, or a convolution that mixes channels only, as attention over feature maps does."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return set(module.kernel_size) == {1} and module.groups == 1
    return is_linear_like(module)


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the task heads, trained as they are under ``trainable_modules="auto"``.

    timm models say so (``get_classifier``); of transformers' task models it is what stands beside the
    backbone, unless it is a language-model head; elsewhere layers called ``head``, ``classifier``, ``fc`` and
    the like at the root or one below.
    """
    modules = named_modules(model)
    names = {id(module): name for name, module in modules.items()}
    heads: list[nn.Module] = []
    known: set[str] = set()
    for name, module in modules.items():
        found = _declared_head(module)
        if found is not None and not (name and name in inside(modules, known)):
            heads += found
            known.add(name)
    heads += _heads_by_name(modules, () if "" in known else known) if "" not in known else []
    found_names = {
        names[id(head)] for head in heads if id(head) in names and any(True for _ in head.parameters())
    }
    return tuple(name for name in modules if name in found_names and name)


def _declared_head(module: nn.Module) -> list[nn.Module] | None:
    """The head that timm's or transformers' interface names; None where there is no interface."""
    get_classifier = getattr(module, "get_classifier", None)
    if callable(get_classifier):
        try:
            head = get_classifier()
        except (AttributeError, NotImplementedError):
            return None
        return [h for h in (head if isinstance(head, (tuple, list)) else (head,)) if isinstance(h, nn.Module)]
    base = getattr(module, "base_model", None)
    if not hasattr(module, "base_model_prefix") or not isinstance(base, nn.Module) or base is module:
        return None
    outputs = {id(output) for output in output_embeddings(dict(module.named_modules()))}
    beside = [child for child in module.children() if child is not base]
    if any(id(inner) in outputs for child in beside for inner in child.modules()):
        return []
    return beside


def _heads_by_name(modules: dict[str, nn.Module], known: Iterable[str]) -> list[nn.Module]:
    taken = inside(modules, known)
    return [
        module
        for name, module in modules.items()
        if name and name.count(".") <= 1 and name.rsplit(".", 1)[-1] in HEADS and name not in taken
    ]
