"""The vectors d and b in an optimizer group of their own: which to move, and whether that can be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_uora.trainer.schedules import follow, own_shape, peak_rate, unknown_schedulers

__all__ = ["GROUP", "Move", "moves", "obstacle", "split", "take_in"]

GROUP = "uora_vectors"
"""Name of the group, which ``LearningRateMonitor`` shows."""
FAMILIES = ("torch.optim.", "timm.optim.", "transformers.optimization", "bitsandbytes.optim.")
"""Where optimizers come from whose groups are known to be independent of each other."""
OWN = ("params", "param_names", "name", "lr", "initial_lr", "max_lr", "min_lr", "lr_scale", "weight_decay")
"""What a new group does not take over from the one that its parameters came from."""


@dataclass
class Move:
    """Vectors to be moved out of the groups of one optimizer.

    Attributes:
        optimizer: The optimizer.
        schedulers: All that move its rates.
        found: Place of a group, and the vectors in it beside other parameters.
        missing: Vectors that no optimizer knows; they come to the first one, as if from its first group.
        alone: Places of groups that hold vectors and nothing else.
    """

    optimizer: Optimizer
    schedulers: list[Any]
    found: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    missing: list[nn.Parameter] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)

    @property
    def place(self) -> int:
        """Of the group that the vectors, or the first of them, come from."""
        return next(iter([*self.found, *self.alone]), 0)

    @property
    def rate(self) -> float:
        """The rate at which the vectors would train if nothing were done."""
        return self.peak(self.place)

    def peak(self, place: int) -> float:
        """The highest rate that a group comes to."""
        return peak_rate(self.schedulers, place, self.optimizer.param_groups[place])


def moves(
    optimizers: Iterable[Optimizer],
    schedulers: Sequence[Any],
    vectors: Iterable[nn.Parameter],
    every: Iterable[nn.Parameter],
) -> list[Move]:
    """For every optimizer with something to do, what it is.

    Args:
        optimizers: Those of the run.
        schedulers: Likewise; each has its ``optimizer``.
        vectors: d and b of the adapted modules that are meant, in model order.
        every: d and b of all adapted modules: a group of nothing else holds vectors alone.
    """
    place = {id(vector): number for number, vector in enumerate(vectors)}
    wanted, known = dict(zip(place, vectors, strict=True)), {id(vector) for vector in every}
    result = []
    for optimizer in optimizers:
        move = Move(optimizer, [one for one in schedulers if one.optimizer is optimizer])
        for number, group in enumerate(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in place]
            for p in mine:
                wanted.pop(id(p), None)
            if mine and not all(id(p) in known for p in group["params"]):
                move.found[number] = mine
            elif mine:
                move.alone.append(number)
        result.append(move)
    if result:
        result[0].missing = list(wanted.values())
    return [move for move in result if move.found or move.missing or move.alone]


def obstacle(move: Move) -> str | None:
    """What keeps an optimizer from taking another group, by name; None where nothing does."""
    kind = type(move.optimizer)
    known = (c for c in kind.__mro__ if c is not Optimizer and f"{c.__module__}.".startswith(FAMILIES))
    if not any(True for _ in known):
        return kind.__name__
    if isinstance(move.optimizer, torch.optim.LBFGS):
        return "LBFGS, which has one group"
    if unknown := unknown_schedulers(move.schedulers):
        return unknown[0]
    if not all(isinstance(group.get("lr"), (int, float, Tensor)) for group in move.optimizer.param_groups):
        return f"{kind.__name__}, which sets its rates itself"
    return None


def split(move: Move, rate: float) -> None:
    """Give the vectors their group: the options of the one they came from, ``rate``, no weight decay.

    Vectors from groups with equal options and schedules come into one group.
    """
    groups = move.optimizer.param_groups
    sources = {place: list(vectors) for place, vectors in move.found.items()}
    if move.missing:
        sources.setdefault(0, []).extend(move.missing)
    merged: dict[str, tuple[int, list[nn.Parameter]]] = {}
    for place, vectors in sources.items():
        options = {key: value for key, value in groups[place].items() if key not in OWN}
        like = f"{options}{own_shape(move.schedulers, place)}"
        merged.setdefault(like, (place, []))[1].extend(vectors)
    names = _without(groups, {id(p) for vectors in move.found.values() for p in vectors})
    for place, vectors in merged.values():
        _add(move, place, vectors, rate, names)


def _without(groups: Sequence[dict[str, Any]], moved: set[int]) -> Mapping[int, str]:
    """Take parameters out of their groups, in place; their names, where the optimizer was given names."""
    names: dict[int, str] = {}
    for group in groups:
        params, told = group["params"], group.get("param_names")
        kept = [number for number, p in enumerate(params) if id(p) not in moved]
        if told is not None:
            names.update((id(p), name) for p, name in zip(params, told, strict=True))
            told[:] = [told[number] for number in kept]
        params[:] = [params[number] for number in kept]
    return names


def _add(move: Move, place: int, vectors: list[nn.Parameter], rate: float, names: Mapping[int, str]) -> None:
    groups = move.optimizer.param_groups
    origin, taken = groups[place], sum(str(group.get("name", "")).startswith(GROUP) for group in groups)
    group = {key: value for key, value in origin.items() if key not in OWN}
    group["lr"] = torch.full_like(origin["lr"], rate) if isinstance(origin["lr"], Tensor) else rate
    group["name"] = f"{GROUP}_{taken + 1}" if taken else GROUP
    if "weight_decay" in origin:
        group["weight_decay"] = 0.0
    named = "param_names" in origin
    group["params"] = (
        [(names.get(id(p), f"uora.{i}"), p) for i, p in enumerate(vectors)] if named else vectors
    )
    move.optimizer.add_param_group(group)
    follow(move.schedulers, place, groups[-1])


def take_in(move: Move) -> None:
    """Put vectors that no optimizer knows into the first group, into its list; at that group's rate."""
    first = move.optimizer.param_groups[0]
    first["params"].extend(move.missing)
    if "param_names" in first:
        first["param_names"].extend(f"uora.{number}" for number in range(len(move.missing)))
