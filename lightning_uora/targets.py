"""Which modules are adapted and which are trained as they are: patterns, presets, heads."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_uora.config import PRESETS, UORAConfig
from lightning_uora.layers import has_plain_forward, is_linear_like, is_supported, unsupported

__all__ = ["Selection", "find_heads", "select"]

QUERY_KEY_VALUE = frozenset(
    [
        "qkv",
        "qkvs",
        "wqkv",
        "to_qkv",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "kv_proj",
        "query_proj",
        "key_proj",
        "value_proj",
        "q_lin",
        "k_lin",
        "v_lin",
        "wq",
        "wk",
        "wv",
        "to_q",
        "to_k",
        "to_v",
        "to_kv",
        "to_query",
        "to_key",
        "to_value",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj",
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "q_attn",
        "in_proj_qkv",
        "linear_q",
        "linear_k",
        "linear_v",
        "project_q",
        "project_k",
        "project_v",
        "projection_query",
        "projection_key",
        "projection_value",
        "q_head",
        "k_head",
        "v_head",
        "queries",
        "keys_values",
        "queries_keys_values",
    ]
)
"""Names that mean a query, key or value projection wherever they stand."""
SHORT_QUERY_KEY_VALUE = frozenset(
    [
        "q",
        "k",
        "v",
        "kv",
        "qk",
        "qv",
        "query",
        "key",
        "value",
        "in_proj",
        "w_q",
        "w_k",
        "w_v",
        "query_global",
        "key_global",
        "value_global",
        "v_gate",
    ]
)
"""Names that mean one inside an attention block, or beside each other."""
OUTPUT = frozenset(
    [
        "o",
        "proj",
        "dense",
        "out_proj",
        "o_proj",
        "c_proj",
        "out_lin",
        "out",
        "wo",
        "to_out",
        "final",
        "output",
        "linear_out",
        "attention_out",
        "post_proj",
        "projection",
    ]
)
"""Names of the output projection, in the block of a query, key or value projection."""
ATTENTION = re.compile(r"att(?!_mlp)|xca|mhsa|mha", re.IGNORECASE)
NOT_PROJECTION = re.compile(r"mlp|ffn|feed_forward|rel_pos|pos_embed", re.IGNORECASE)
WRAPPERS = frozenset({"linear", "conv", "convolution", "c", "ln", "base_layer"})
"""Names of the one layer inside a projection that is itself a small module (``attn.qkv.linear``)."""
HEADS = frozenset(
    [
        "head",
        "heads",
        "head_dist",
        "classifier",
        "classification_head",
        "cls_head",
        "fc",
        "score",
        "qa_outputs",
        "pre_classifier",
    ]
)


@dataclass(frozen=True)
class Selection:
    """What :func:`select` found: names in model order."""

    adapted: tuple[str, ...]
    trained: tuple[str, ...]


def select(model: nn.Module, config: UORAConfig) -> Selection:
    """The modules to adapt and the modules to train as they are. Nothing is changed.

    Promises: an adapted module is of a supported kind and not inside a trained one; at least one is found.

    Raises:
        ValueError: A pattern matches nothing (near misses are named) or only what cannot be adapted; an
            invalid regular expression; a preset that finds nothing (another is proposed); a module named both
            as target and as trained; a weight shared by two targets; dropout where it cannot be applied.
    """
    modules = dict(model.named_modules())
    targets = _as_tuple(config.target_modules)
    excluded = _inside(modules, _expand(modules, config.exclude_modules, "exclude_modules"))
    if config.trainable_modules == "auto":
        trained = tuple(name for name in find_heads(model) if name not in targets and name not in excluded)
        reserved = _inside(modules, trained) - set(targets)
    else:
        trained = _expand(modules, _as_tuple(config.trainable_modules), "trainable_modules")
        reserved = _inside(modules, trained)
        both = [name for name in targets if name in reserved]
        if both:
            raise ValueError(
                f"target_modules and trainable_modules both name {both[0]!r}; a module is adapted or trained."
            )
    chosen: set[str] = set()
    for target in targets:
        found = (
            _preset(model, modules, target)
            if target in PRESETS
            else _matches(modules, target, "target_modules")
        )
        kept = [name for name in found if name not in excluded and name not in reserved]
        chosen.update(_adaptable(modules, target, kept, found))
    adapted = tuple(name for name in modules if name in chosen)
    _check(modules, adapted, config)
    return Selection(adapted, trained)


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _inside(modules: dict[str, nn.Module], names: Iterable[str]) -> set[str]:
    """``names`` and everything below them."""
    roots = tuple(names)
    return {name for name in modules if any(name == root or name.startswith(f"{root}.") for root in roots)}


def _expand(modules: dict[str, nn.Module], patterns: Sequence[str], field: str) -> tuple[str, ...]:
    found = {name for pattern in _as_tuple(patterns) for name in _matches(modules, pattern, field)}
    return tuple(name for name in modules if name in found)


def _matches(modules: dict[str, nn.Module], pattern: str, field: str) -> list[str]:
    """Names that ``pattern`` matches, in model order; at least one."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{field}={pattern!r} is not a valid regular expression: {error}.") from error
        found = [name for name in modules if expression.fullmatch(name)]
    elif any(character in pattern for character in "*?["):
        found = [name for name in modules if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")]
    else:
        found = [name for name in modules if name == pattern or name.endswith(f".{pattern}")]
    if not found:
        raise ValueError(f"{field}={pattern!r} matches no module.{_near_misses(modules, pattern)}")
    return found


def _near_misses(modules: dict[str, nn.Module], pattern: str) -> str:
    depth = pattern.count(".") + 1
    endings = {".".join(name.split(".")[-depth:]): name for name in modules if name}
    near = difflib.get_close_matches(pattern, [*endings, *PRESETS], n=3, cutoff=0.5)
    if near:
        return " Near misses: " + ", ".join(repr(name) for name in near) + "."
    ends = sorted(
        {name.rsplit(".", 1)[-1] for name, module in modules.items() if name and is_supported(module)}
    )
    names = ", ".join(ends[:20]) or "none"
    return f" Names that can be adapted end in: {names}; presets are {', '.join(PRESETS)}."


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
    if not supported and target not in PRESETS:
        if found and not kept:
            why = "matches only modules that are excluded or trained as they are"
        else:
            shown = ", ".join(map(repr, kept[:3]))
            why = f"matches {shown}, which hold no weight of a kind that can be adapted"
        raise ValueError(
            f"target_modules={target!r} {why}; name a layer in full, or change trainable_modules."
        )
    if not supported:
        raise ValueError(_nothing_found(modules, target))
    return supported


def _nothing_found(modules: dict[str, nn.Module], preset: str) -> str:
    linears = sum(is_linear_like(module) for module in modules.values())
    others = sum(is_supported(module) and not is_linear_like(module) for module in modules.values())
    return (
        f"target_modules={preset!r} finds nothing to adapt in this model, which has {linears} Linear-like "
        "layers and "
        f"{others} other supported ones, heads included; use 'all-linear' or 'all', or name layers by "
        "pattern."
    )


def _preset(model: nn.Module, modules: dict[str, nn.Module], preset: str) -> list[str]:
    outputs = {id(module) for module in _output_embeddings(modules)}
    candidates = {
        name: module for name, module in modules.items() if is_supported(module) and id(module) not in outputs
    }
    if preset == "attention":
        return _attention(modules, candidates)
    if preset == "all-linear":
        return [n for n, m in candidates.items() if is_linear_like(m) or isinstance(m, nn.MultiheadAttention)]
    return list(candidates)


def _output_embeddings(modules: dict[str, nn.Module]) -> list[nn.Module]:
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


def _attention(modules: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> list[str]:
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
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    heads: list[nn.Module] = []
    known: set[str] = set()
    for name, module in modules.items():
        found = _declared_head(module)
        if found is not None and not (name and name in _inside(modules, known)):
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
    outputs = {id(output) for output in _output_embeddings(dict(module.named_modules()))}
    beside = [child for child in module.children() if child is not base]
    if any(id(inner) in outputs for child in beside for inner in child.modules()):
        return []
    return beside


def _heads_by_name(modules: dict[str, nn.Module], known: Iterable[str]) -> list[nn.Module]:
    taken = _inside(modules, known)
    return [
        module
        for name, module in modules.items()
        if name and name.count(".") <= 1 and name.rsplit(".", 1)[-1] in HEADS and name not in taken
    ]


def _check(modules: dict[str, nn.Module], adapted: tuple[str, ...], config: UORAConfig) -> None:
    """What only the whole choice shows: shared weights, and dropout where nothing can drop out."""
    seen: dict[int, str] = {}
    for name in adapted:
        for parameter in modules[name].parameters(recurse=False):
            if parameter.dim() > 1 and seen.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"modules {seen[id(parameter)]!r} and {name!r} share one weight, which would be adapted "
                    "twice; "
                    "exclude one of them by exclude_modules."
                )
        kind = type(modules[name])
        if config.dropout > 0.0 and not has_plain_forward(kind):
            raise ValueError(
                f"dropout={config.dropout} needs modules with the plain Linear forward, but {name!r} is a "
                f"{kind.__name__}; set dropout=0.0 or exclude it."
            )
