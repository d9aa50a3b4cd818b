"""Mixtures of experts in a mixed batch: their block computes once for each adapter, on its samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from lightning_uora.adapters.several_layers import LayerOf
from lightning_uora.adapters.stacked import Experts

__all__ = ["blocks_in", "computing", "require_no_records"]

# Note [Experts in a mixed batch]
# Experts see tokens in the router's order, not samples. So the block around them, whose input still is the
# batch, computes once for each adapter on its samples; inside, the batch is of that adapter alone, however
# tokens are sorted. Linear layers inside go on by row; the vectors of stacked experts are exchanged. What the
# router puts out beside the block (router_logits) would be recorded once for each adapter: refused.


def blocks_in(layers: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Outermost blocks around adapted experts, each with the stacked ones in it."""
    around: dict[str, str] = {}
    for path in layers:
        if isinstance(modules[path], Experts):
            around[path] = path.rpartition(".")[0].rpartition(".")[0]
            continue
        parts = path.split(".")
        for end in range(1, len(parts)):
            above = ".".join(parts[:end])
            if "expert" in parts[end - 1] and isinstance(modules.get(above), (nn.ModuleList, nn.ModuleDict)):
                around[path] = above.rpartition(".")[0]
                break
    found: dict[str, list[str]] = {}
    for path, block in around.items():
        inside = (b for b in around.values() if not b or block == b or block.startswith(f"{b}."))
        outermost = min(inside, key=len)
        stacks = found.setdefault(outermost, [])
        if isinstance(modules[path], Experts):
            stacks.append(path)
    return found


def require_no_records(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where the routers' outputs are wanted; see Note [Experts in a mixed batch]."""
    wanted = kwargs.get("output_router_logits")
    config = getattr(model, "config", None)
    if wanted or (wanted is None and getattr(config, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits=True does not work in a mixed batch, where each router runs once "
            "for each adapter; set it to False, or give use_adapters one name at a time."
        )


@contextmanager
def computing(mine: Iterable[tuple[nn.Module, LayerOf | None]]) -> Iterator[None]:
    """Inside, stacked experts compute with an adapter's vectors; None: with the base's weights."""
    with ExitStack() as undo:
        for module, layer in mine:
            if layer is None:
                continue
            held, before = module._parameters, module.__dict__["_uora"]
            vectors = {name: held[name] for name in ("uora_d", "uora_b")}
            undo.callback(held.update, vectors)
            undo.callback(module.__dict__.__setitem__, "_uora", before)
            undo.callback(setattr, layer.adapter, "in_block", layer.adapter.in_block)
            module.__dict__["_uora"], layer.adapter.in_block = layer.adapter, True
            held.update(uora_d=cast(nn.Parameter, layer.uora_d), uora_b=cast(nn.Parameter, layer.uora_b))
        yield
