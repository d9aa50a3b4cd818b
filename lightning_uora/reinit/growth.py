"""Growth by gradient: of a pool of random directions, those along which the loss falls fastest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_uora.adapters import AdaptedModule, Projections, attachments, one_thread, seeded_generator
from lightning_uora.config import UORAConfig
from lightning_uora.distributed import on_any_rank, summed, whole
from lightning_uora.reinit.rotation import basis, unit_rows, without
from lightning_uora.reinit.weakness import Slot

__all__ = ["gradients_collected", "picked_directions", "require_gradients", "require_growth_possible"]


@contextmanager
def gradients_collected(model: nn.Module) -> Iterator[None]:
    """Backward passes inside sum dL/dW_eff of every adapted weight, for ``growth="gradient"``."""
    owners = [one.owner for one in attachments(model)]
    for owner in owners:
        owner.gradients = {}
    try:
        yield
    finally:
        for owner in owners:
            owner.gradients = None


def require_growth_possible(growth: str, config: UORAConfig) -> None:
    """Raise ``ValueError`` where a growth cannot be right with a configuration."""
    if growth == "gradient" and config.share != "layer":
        raise ValueError(f"growth='gradient' needs share='layer', got share={config.share!r}.")
    if growth == "gradient" and config.dropout > 0:
        raise ValueError(f"growth='gradient' needs dropout=0.0, got dropout={config.dropout}.")
    if growth == "inputs" and config.init != "inputs":
        raise ValueError(f"growth='inputs' needs init='inputs', got init={config.init!r}.")


def require_gradients(owner: Projections) -> None:
    """Raise ``ValueError`` where no rank has collected a gradient."""
    if not on_any_rank([bool(owner.gradients)])[0]:
        raise ValueError(
            "growth='gradient' needs gradients: run backward and refresh inside `with "
            "lightning_uora.reinit.gradients_collected(model):`, or let the callback do both."
        )


def picked_directions(
    owner: Projections, plan: list[tuple[Slot, list[int]]], candidates: int
) -> dict[str, list[int]]:
    """For each layer the candidates with the largest ``|(b * β)^T G α|``, one for each chosen row."""
    gradients = owner.gradients or {}
    picked: dict[str, list[int]] = {}
    number = len(owner.record)
    for slot, chosen in plan:
        (layer,) = slot.layers
        index = layer._uora.index
        if slot.key[0] != "B":
            continue
        pool = max(candidates, len(chosen))
        betas = _candidates(owner, slot, number, pool) * whole(layer.uora_b.detach()).cpu()
        score = torch.zeros(pool)
        for part in layer.adapted_parts:
            G = gradients.get((index, part.name))
            if G is None:
                G = torch.zeros(_shape(layer, part.name), device=layer.uora_b.device)
            G2 = summed(G).detach().cpu()
            G2 = G2.t() if part.transposed else G2.reshape(part.m, part.n)
            alphas = _candidates(owner, Slot(f"A_{part.n}_{index}", "d", (layer,)), number, pool)
            score += ((betas[:, part.row : part.row + part.m] @ G2) * alphas).sum(1)
        picked[str(index)] = score.abs().argsort(descending=True, stable=True)[: len(chosen)].tolist()
    return picked


def _shape(layer: AdaptedModule, name: str) -> torch.Size:
    W = layer._parameters[name]
    assert W is not None
    return W.shape


def _candidates(owner: Projections, slot: Slot, number: int, pool: int) -> Tensor:
    """Unit directions of the pool that :func:`turned_rows` will draw again, less the rows that are there."""
    rows = slot.rows(owner.current(slot.buffer)).detach().float().cpu()
    generator = seeded_generator(owner.config.seed, "refresh", number, slot.key)
    with one_thread():
        drawn = torch.randn(pool, rows.shape[1], generator=generator)
        if rows.shape[0] < rows.shape[1]:
            drawn = without(drawn, basis(rows))
    return unit_rows(drawn)
