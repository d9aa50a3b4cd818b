"""Whether the memory of an effective weight was written to, by whatever name: if so, it is handed on."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Handed", "Watch"]

# Note [Who writes to an effective weight]
# Views, `out=`, `_foreach_`, optimizers: torch has too many ways to write to be overridden one by one, but
# all of them move the version that a tensor shares with its views. A watch remembers the version. It looks
# again when the layer is read, saved or loaded, and when the last view is gone: it hangs on the tensor that
# owns the memory, which views keep alive, and dies with it. So `layer.weight[:2].fill_(7.0)` reads back at
# once. NumPy, DLPack, storages and pointers move no version: once one was asked for, the numbers are
# compared too. Storages and pointers do not even keep the tensor; the layer does, until it is read again.


class Watch:
    """Of the memory of one effective weight. See Note [Who writes to an effective weight].

    Args:
        weight: The effective weight.
        sink: Gets the whole weight after a write.
        handed: Of its layer, where there is one.
    """

    __slots__ = ("__weakref__", "handed", "memory", "numbers", "sink", "version")

    def __init__(self, weight: Tensor, sink: Callable[[Tensor], None], handed: Handed | None = None) -> None:
        self.memory = weight.detach()  # shares memory and version, and keeps nothing else
        self.version = self.memory._version
        self.numbers: Tensor | None = None
        self.sink, self.handed = sink, handed

    @property
    def written(self) -> bool:
        """Whether somebody has written since the last look."""
        if self.memory._version != self.version:
            return True
        return self.numbers is not None and not torch.equal(self.memory, self.numbers)

    def flush(self) -> None:
        """Hand on what was written."""
        if self.written:
            self.hand_on()

    def hand_on(self) -> None:
        """The whole weight, to the sink."""
        self.version = self.memory._version
        with torch.inference_mode(False), torch.no_grad():
            if self.numbers is not None:
                self.numbers.copy_(self.memory)
            self.sink(self.memory)

    def expose(self, until_read: bool = False) -> None:
        """Somebody can write without moving the version from now on, maybe with nothing that keeps this."""
        if self.numbers is None:
            with torch.inference_mode(False):
                self.numbers = self.memory.clone()
        if until_read and self.handed is not None:
            self.handed.exposed.append(self)

    def __del__(self) -> None:
        self.flush()


class Handed:
    """The effective weights of one parameter of a layer that somebody may still write to.

    Args:
        layer: The adapted module.
        name: Of the parameter.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = weakref.ref(layer), name
        self.watches: list[weakref.ref[Watch]] = []
        self.exposed: list[Watch] = []

    def watch(self, weight: Tensor) -> Watch:
        """A new one."""
        made = Watch(weight, self._write, self)
        self.watches = [ref for ref in self.watches if ref() is not None]
        self.watches.append(weakref.ref(made))
        return made

    def settle(self) -> None:
        """Hand on what was written so far."""
        for ref in self.watches:
            if (watch := ref()) is not None:
                watch.flush()
        self.exposed.clear()

    def _write(self, weight: Tensor) -> None:
        layer = self.layer()
        if layer is None:  # its layer is gone
            return
        if "_uora" in layer.__dict__:
            layer._uora_write(self.name, weight)  # type: ignore[operator]
        elif isinstance(W := layer._parameters.get(self.name), Tensor):  # detached since
            W.copy_(weight)
