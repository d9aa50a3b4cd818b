"""The first batches of a dataloader, without a trace: the loader gives the same ones again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["states_kept", "twin"]


@contextmanager
def states_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """Afterwards loaders that tell their place and are no ``DataLoader`` are where they were."""
    both = ("state_dict", "load_state_dict")
    own = [one for one in loaders if not isinstance(one, DataLoader) and all(hasattr(one, n) for n in both)]
    places = [copy.deepcopy(one.state_dict()) for one in own]
    try:
        yield
    finally:
        for one, place in zip(own, places, strict=True):
            one.load_state_dict(place)


def twin(loader: Any) -> Any:
    """A loader of the same data, to iterate over while the state of the original stays.

    Samplers and generators are copied, the data are not; an iterable dataset is, because its position is
    state. Worker processes are the twin's own. What is drawn from the global generators is the caller's to
    put back.

    Args:
        loader: A ``DataLoader`` or any iterable.

    Raises:
        ValueError: It is used up by iterating and cannot be copied (a generator).
    """
    if not isinstance(loader, DataLoader):
        return _copied(loader, {}) if isinstance(loader, Iterator) else loader
    other = copy.copy(loader)
    iterable = isinstance(loader.dataset, IterableDataset)
    memo: dict[int, Any] = {} if iterable else {id(loader.dataset): loader.dataset}
    state = {name: loader.__dict__.get(name) for name in ("sampler", "batch_sampler", "generator")}
    if iterable:
        state["dataset"] = loader.dataset
    other.__dict__.update(_copied(state, memo), _iterator=None)
    other.__dict__["_DataLoader__multiprocessing_context"] = loader.multiprocessing_context
    other.__dict__["persistent_workers"] = False
    return other


def _copied(thing: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(thing, memo)
    except Exception as error:  # whatever the user's classes raise
        raise ValueError(
            f"calibration would use up the training data ({error}); call calibrate(module, batches) "
            "with batches of your own before the fit."
        ) from error
