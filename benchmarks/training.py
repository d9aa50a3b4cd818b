"""The training loop of the benchmarks, with the time of each step, and pretraining by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset


def _nothing(step: int, batch: Any) -> None:
    """Neither before nor after a step."""


def fit(
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    optimizer: Optimizer,
    before: Callable[[int, Any], None] = _nothing,
    after: Callable[[int, Any], None] = _nothing,
) -> list[float]:
    """One optimizer step for each batch; the seconds of each, ``before`` and ``after`` included.

    Args:
        loss: Of a batch.
        batches: What the steps are taken on, in this order.
        optimizer: Of what trains.
        before: Called ahead of a step with the number of steps taken so far and the batch.
        after: The same, once the step is taken.
    """
    seconds = []
    for step, batch in enumerate(batches):
        start = now()
        before(step, batch)
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        after(step + 1, batch)
        seconds.append(now() - start)
    return seconds


def pretrain(model: nn.Module, data: TensorDataset, lr: float, epochs: int) -> None:
    """Train all of a classifier on labelled rows with AdamW, in batches of 64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    fit(
        lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), _epochs(data, epochs), optimizer
    )


def _epochs(data: TensorDataset, count: int) -> Iterator[list[Tensor]]:
    for _ in range(count):
        for rows in torch.randperm(len(data)).split(64):
            yield [tensor[rows] for tensor in data.tensors]


def now() -> float:
    """Seconds, once an accelerator that is in use has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
