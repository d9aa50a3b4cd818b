"""A bank of adapters in folders: loaded when they are first named, the least recently used dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import nn

from lightning_uora.adapters import (
    adapter_names,
    attachment_of,
    is_adapted,
    remove_adapter,
    set_adapter,
    use_adapters,
)
from lightning_uora.storage.adapter_files import BASE, CONFIG_FILE, load_onto_base
from lightning_uora.storage.restoring import Mismatch

__all__ = ["AdapterBank"]

# Note [What a bank keeps]
# The adapters that it has loaded, by when they were last named; those that the user put on the model are not
# its own and stay. A model without adapters gets one that computes nothing, called "(base)": outside of a
# batch it is the one that computes, so the base and its heads are as they were. One thread at a time computes
# with adapters: a mixed batch changes the model for a while.


class AdapterBank:
    """Serves adapters from the folders of a directory, by the folders' names, on one model.

    See Note [What a bank keeps].

    Args:
        model: The base, or a model that has adapters.
        directory: Holds a folder of :func:`save_adapter` for each adapter.
        limit: At most this many are on the model at once, besides those that were there before.
        base_mismatch: As for :func:`load_adapter`.
        head: False leaves out the heads that were trained with the adapters, as :func:`load_adapter` does. On
            one model all heads must have the same shape.

    Raises:
        ValueError: ``limit`` is below 1.
        FileNotFoundError: There is no such directory.

    Example::

        bank = AdapterBank(model, "adapters/", limit=100)
        with bank.use(["german", "polish", None]):  # one for each sample of the batch
            outputs = model(batch)

    Source: *ours*.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        limit: int = 64,
        base_mismatch: Mismatch = "error",
        *,
        head: bool = True,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit} is not allowed; a bank keeps at least one adapter.")
        self.model, self.directory = model, Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"{self.directory} is not a directory; give the one that holds the adapters' folders."
            )
        self.limit, self.base_mismatch, self.head = limit, base_mismatch, head
        self._lock = threading.RLock()
        self._recent: dict[str, None] = {}

    @property
    def names(self) -> list[str]:
        """Names of all adapters in the directory."""
        found = (path.parent.name for path in self.directory.glob(f"*/{CONFIG_FILE}"))
        return sorted(name for name in found if "." not in name)

    @property
    def resident(self) -> list[str]:
        """Names of the loaded adapters, the least recently named first."""
        return list(self._recent)

    def set(self, name: str | None) -> None:
        """Make an adapter the active one, as :func:`set_adapter`; load it first if necessary."""
        with self._lock:
            self._fetch([] if name is None else [name])
            if is_adapted(self.model):  # else it is the base already
                set_adapter(self.model, BASE if name is None and BASE in adapter_names(self.model) else name)

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """As :func:`use_adapters`; adapters that are not there yet are loaded first.

        Other threads wait until the batch is done.

        Raises:
            ValueError: More than ``limit`` different adapters are named; no folder has that name, or it is
                damaged or of another base. The other adapters are then unchanged.
        """
        with self._lock:
            self._fetch(list(dict.fromkeys(name for name in names if name is not None)))
            with use_adapters(self.model, names) if is_adapted(self.model) else nullcontext():
                yield

    def _fetch(self, names: list[str]) -> None:
        here = adapter_names(self.model)
        mine = [name for name in names if name in self._recent or name not in here]
        if len(mine) > self.limit:
            raise ValueError(
                f"{len(mine)} different adapters are named, but the bank's limit is {self.limit}; raise "
                "limit, or name fewer in one batch."
            )
        for name in mine:
            if name in here:
                self._recent.pop(name)
            else:
                self._load(name)
            self._recent[name] = None
        self._drop(keep=mine)

    def _load(self, name: str) -> None:
        folder = self.directory / name
        if Path(name).name != name or "." in name or not (folder / CONFIG_FILE).is_file():
            known = ", ".join(map(repr, self.names[:5])) or "none"
            raise ValueError(f"the bank {self.directory} has no adapter {name!r}; it has {known}.")
        before, off = _computing(self.model)
        try:
            load_onto_base(self.model, folder, self.base_mismatch, name, self.head)
        except ValueError as error:
            raise ValueError(f"adapter {name!r} of the bank: {error}") from error
        set_adapter(self.model, BASE if before is None else before)
        if off:
            set_adapter(self.model, None)

    def _drop(self, keep: list[str]) -> None:
        """The least recently named beyond the limit."""
        while len(self._recent) > self.limit:
            oldest = next(name for name in self._recent if name not in keep)
            del self._recent[oldest]
            before, off = _computing(self.model)
            if before == oldest:
                set_adapter(self.model, next(n for n in adapter_names(self.model) if n != oldest))
                if off:
                    set_adapter(self.model, None)
            remove_adapter(self.model, oldest)


def _computing(model: nn.Module) -> tuple[str | None, bool]:
    """The adapter on the model, and whether it is switched off."""
    if not is_adapted(model):
        return None, False
    owner = attachment_of(model, "a bank").owner
    return owner.name, owner.set_off
