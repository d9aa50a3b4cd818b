"""A from the inputs: batches through the frozen model, and the principal axes of what each layer got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_uora.adapters import (
    Attachment,
    Projections,
    attachment_of,
    require_no_inference_mode,
    seeded_generator,
)
from lightning_uora.inputs.moments import (
    principal_rows,
)
from lightning_uora.inputs.passes import Forward, Watch

__all__ = ["calibrate", "calibrate_with", "inputs_observed"]


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> None:
    """Set A to the main directions of each layer's inputs, for a model adapted with ``init="inputs"``.

    With ``share="layer"`` each layer gets its own A; with ``"model"`` the inputs of all layers of one width
    count together. Entries are rounded to float16, which is how they are stored.

    Promises: the batches run through the frozen base, without adapters and gradients, in evaluation mode.
    Training flags, buffers, attributes and the global random state are the same afterwards; after an error so
    are A and everything else. In a distributed run every process gets the same A, from the inputs of all.

    Memory beyond A and a forward without gradients, for each layer (once for query, key and value, if they
    get one tensor): 6 n l bytes with l = r + min(3 r / 4, 128), r + 8 at least, or 4 n n if n is at most 256
    or 2 l. Besides, 2,048 rows of the largest input in float32 (for convolutions 8,192 patches a call), and
    at the end, for one layer at a time, three times its moment in float64. The batches are held, because wide
    layers take two passes.

    Args:
        model: The model that you gave to ``attach_uora``.
        batches: What the model takes, on its device: tensors; tuples or lists of arguments; mappings of named
            arguments. Eight are usually plenty.
        forward: Runs the model on one batch, if calling the model with the batch does not:
            ``lambda batch: model(batch[0])`` for batches of inputs and labels.

    Raises:
        ValueError: The model is not adapted with ``init="inputs"``, is already calibrated, sharded, or on
            ``meta``; there is no batch, or one that the model refuses; a layer receives nothing, fewer than r
            rows, or non-finite values (the layer is named).

    Example:
        >>> from lightning_uora import UORAConfig, attach_uora
        >>> model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> attach_uora(model, UORAConfig(rank=4, target_modules=["0"], init="inputs"))
        ['0']
        >>> calibrate(model, [torch.randn(20, 7)])

    Source: *ours*, after EVA (arXiv:2410.07170).
    """
    calibrate_with(attachment_of(model, "calibrate"), batches, forward)


def calibrate_with(
    one: Attachment,
    batches: Iterable[Any],
    forward: Forward | None = None,
    around: nn.Module | None = None,
    few: bool = False,
) -> None:
    """As :func:`calibrate`.

    Args:
        one: The adapted model.
        batches: Likewise.
        forward: Likewise.
        around: The module whose state ``forward`` may move, where it is more than the model.
        few: Take fewer rows than r as well, and draw the rest.
    """
    owner = one.owner
    require_no_inference_mode("calibrate")
    _require_uncalibrated(owner)
    rank, seed = owner.config.rank, owner.config.seed
    watch = Watch(one, rank, off=True)
    watch.run(batches, forward, one.root if around is None else around, fewest=0 if few else rank)
    values = {}
    for key, axes in watch.axes():
        n = int(key.split("_")[1])
        A = principal_rows(axes, rank, n, seeded_generator(seed, "inputs", key))
        values[key] = A.half().to(owner.down(n).device)
    with torch.no_grad():
        owner.take(values)
    owner.calibrated = True


@contextmanager
def inputs_observed(
    model: nn.Module | Attachment,
    batches: Iterable[Any],
    forward: Forward | None = None,
    around: nn.Module | None = None,
) -> Iterator[None]:
    """Refreshes inside know the unused principal axes of the inputs, for ``growth="inputs"``.

    The batches run through the adapted model as it is now; otherwise as in :func:`calibrate`.

    Args:
        model: The root that was given to ``attach_uora``.
        batches: As for :func:`calibrate`.
        forward: Likewise.
        around: The module whose state ``forward`` may move, where it is more than the model.
    """
    one = model if isinstance(model, Attachment) else attachment_of(model, "inputs_observed")
    owner = one.owner
    watch = Watch(one, 2 * owner.config.rank, off=False)
    watch.run(batches, forward, one.root if around is None else around, fewest=0)
    found = dict(watch.axes())

    def unused(buffer: str, basis: Tensor, wanted: int) -> Tensor:
        return found[buffer].away_from(basis.double()).rows[:wanted]

    owner.unused_axes = unused
    try:
        yield
    finally:
        owner.unused_axes = None


def _require_uncalibrated(owner: Projections) -> None:
    if owner.config.init != "inputs":
        raise ValueError(f"calibrate needs init='inputs'; the model has init={owner.config.init!r}.")
    if owner.calibrated:
        raise ValueError(
            "the model is already calibrated; another A would change what its vectors mean. Call detach_uora "
            "and attach_uora to start again."
        )
