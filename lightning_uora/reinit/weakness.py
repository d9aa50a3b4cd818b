"""Which rows are weak: the vectors' entries that scale them, scored and held against a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_uora.adapters import AdaptedModule, Attachment
from lightning_uora.config import ReinitSchedule
from lightning_uora.distributed import whole

__all__ = ["Slot", "scores_of", "slots_of", "weakest"]

SECOND_MOMENTS = ("exp_avg_sq", "square_avg")

# Note [Whose row is it]
# d_i scales row i of A together with column i of B; b_j scales row j of B. Under share="model" a row of A
# belongs to all layers of that width, a column of B to all layers of that height, and the highest score among
# them decides: what is weak on average is strong somewhere. Under share="layer" a layer's rows are its own
# from its first refresh on. Experts of a layer share its rows: among them the highest decides as well.


@dataclass(frozen=True)
class Slot:
    """A projection that may be refreshed, along one axis: who decides, and what it is called in a record.

    ``key`` is the buffer's name; ``:rows`` is appended for the rows of B that entries of b scale.
    """

    key: str
    vector: str
    layers: tuple[AdaptedModule, ...]

    @property
    def buffer(self) -> str:
        """Name of the projection that is refreshed."""
        return self.key.removesuffix(":rows")

    def rows(self, M: Tensor) -> Tensor:
        """The rows that this slot's entries scale: A itself, B transposed (columns), or B."""
        return M.t() if self.key.startswith("B_") and not self.key.endswith(":rows") else M


def slots_of(one: Attachment, vector: str) -> list[Slot]:
    """Every projection that entries of ``vector`` scale; see Note [Whose row is it]."""
    found: dict[str, list[AdaptedModule]] = {}
    for _, layer in one.layers:
        adapter = layer._uora
        own = f"_{adapter.index}" if adapter.owner.config.share == "layer" else ""
        widths = {part.n: None for part in layer.adapted_parts} if vector == "d" else {}
        keys = [f"A_{n}{own}" for n in widths] + [f"B_{adapter.m}{own}" + (":rows" if vector == "b" else "")]
        for key in keys:
            found.setdefault(key, []).append(layer)
    return [Slot(key, vector, tuple(layers)) for key, layers in found.items()]


def scores_of(
    one: Attachment, schedule: ReinitSchedule, optimizers: list[Optimizer], averages: dict[str, Tensor]
) -> dict[tuple[int, str], Tensor]:
    """The score of every entry by the schedule's criterion, by layer and vector, on the CPU.

    Raises:
        ValueError: The criterion needs averages or second moments that are not there.
    """
    scores = {}
    for name, layer in one.layers:
        for vector in schedule.vectors:
            parameter = layer.uora_d if vector == "d" else layer.uora_b
            score = whole(parameter.detach()).abs()
            if schedule.criterion == "ema":
                if f"{name}:{vector}" not in averages:
                    raise ValueError(
                        "criterion='ema' needs averages over steps; let UORACallback keep them, or use "
                        "criterion='magnitude'."
                    )
                score = whole(averages[f"{name}:{vector}"])
            elif schedule.criterion == "sensitivity":
                score = score * _second_moment(name, parameter, optimizers).sqrt()
            scores[layer._uora.index, vector] = score.float().cpu()
    return scores


def _second_moment(name: str, parameter: nn.Parameter, optimizers: list[Optimizer]) -> Tensor:
    for optimizer in optimizers:
        for key in SECOND_MOMENTS:
            moment = optimizer.state.get(parameter, {}).get(key)
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                return whole(moment)
    raise ValueError(
        "criterion='sensitivity' needs an optimizer with second moments (Adam family, RMSprop) that has "
        f"made a step on the vectors of {name!r}."
    )


def weakest(scores: Iterable[Tensor], schedule: ReinitSchedule) -> list[int]:
    """Indices that are weak in every one of ``scores``, ascending, at most ``max_fraction`` of them.

    Args:
        scores: One (k,) tensor for each layer that uses the projection, or (E, k) of experts.
        schedule: ``threshold``, ``threshold_mode``, ``max_fraction``.
    """
    relative = schedule.threshold_mode != "absolute"
    each = [one for s in scores for one in (s.unbind() if s.dim() > 1 else (s,))]
    stacked = torch.stack([s / s.mean().clamp_min(1e-30) if relative else s for s in each])
    highest = stacked.max(dim=0).values
    order, values = highest.argsort(stable=True).tolist(), highest.tolist()
    if schedule.threshold_mode == "fraction":
        weak = order[: math.floor(schedule.threshold * len(order))]
    else:
        weak = [i for i in order if values[i] < schedule.threshold]
    return sorted(weak[: math.floor(schedule.max_fraction * len(order))])
