"""The one owner of all A and B: a module at the root of the adapted model.

A tensor registered in two layers stops being shared at the first ``.to()``; a module that the layers merely
refer to does not. Layers reach their projections through the owner, which alone registers them, so state-dict
keys do not repeat and ``deepcopy``, ``pickle`` and ``.to()`` keep the sharing.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.adapters.draws import Init, draw_down, draw_up
from lightning_uora.config import UORAConfig

__all__ = ["OWNER", "Projections", "require_no_inference_mode", "seeded_generator"]

OWNER = "uora_projections"
"""Name under which the owner is registered at the root of an adapted model."""


def seeded_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``labels`` alone."""
    text = ":".join(map(str, (seed, *labels)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _require_room(rank: int, entries: int) -> None:
    """Raise ``ValueError`` where A and B, drawn in float32 on the CPU, are more than its memory."""
    needed, memory = 4 * rank * entries, _memory()
    if needed > memory:
        raise ValueError(
            f"rank={rank} would need {needed / 1e9:,.1f} GB for A and B, and this machine has "
            f"{memory / 1e9:,.1f} GB; choose a smaller rank."
        )


def _memory() -> float:
    """Bytes of physical memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _is_own(name: str) -> bool:
    """Whether a buffer is one layer's own (``A_768_3``) and not shared (``A_768``)."""
    return name.count("_") == 2


class Projections(nn.Module):
    """A for every distinct width n and B for every distinct height m, drawn from the seed.

    The draw of ``A_n`` depends on (seed, r, n) only and that of ``B_m`` on (seed, m, r): adapting other
    layers as well changes nothing for those that were adapted before. Buffers follow the model's device and
    dtype.

    Args:
        config: Rank, draw and seed.
        widths: Distinct n of the adapted weights.
        heights: Distinct m of the adapted weights.
        device: Where the adapted weights are; on ``meta`` nothing is drawn until the model gets storage.
        dtype: The widest dtype of the adapted weights.

    Raises:
        ValueError: A and B would need more than the machine's memory.
    """

    def __init__(
        self,
        config: UORAConfig,
        widths: Iterable[int],
        heights: Iterable[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.disabled = 0
        self.requires_grad_before: dict[str, bool] = {}
        self.left: tuple[str, ...] = ()  # the user's own layers that stay frozen at their start
        self.adapted: tuple[str, ...] = ()  # names of its layers within the root, by their index
        self.kept: tuple[str, ...] = ()  # parts that the user froze, beside parts that train
        self.trained: list[str] = []  # besides d and b, within the root: see Note [What trains]
        self.outside: dict[
            str, list[str]
        ] = {}  # likewise around it, by what the root's names begin with there
        self.root: weakref.ref[nn.Module] | None = None  # which was attached to
        self.record: list[dict[str, Any]] = []
        self.base_prints: dict[str, tuple[Any, list[Any]]] = {}
        self.gradients: dict[tuple[int, str], Tensor] | None = None  # collected for growth="gradient"
        # for growth="inputs": of a buffer, orthogonal to a basis, so many unused principal axes
        self.unused_axes: Callable[[str, Tensor, int], Tensor] | None = None
        self.on_read: Callable[[Tensor, nn.Module, str], None] | None = None  # told of every weight read
        self.calibrated = False
        self.resized: list[
            str
        ] = []  # buffers of layers whose height has changed: the seed cannot redraw them
        self.elsewhere: dict[Any, Any] = {}  # copies for layers on other devices, with what they are of
        sizes = (sorted(widths), sorted(heights))
        if device.type != "meta":
            _require_room(config.rank, sum(map(sum, sizes)))
        for name in [f"A_{n}" for n in sizes[0]] + [f"B_{m}" for m in sizes[1]]:
            self.register_buffer(
                name, self._draw(name).to(device, dtype) if device.type != "meta" else self._meta(name, dtype)
            )

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "elsewhere": {}, "root": None}

    def down(self, n: int, layer: int | None = None) -> Tensor:
        """A for width n, shape (r, n): the layer's own once it has refreshed it, else the shared one."""
        return cast(Tensor, self._buffers.get(f"A_{n}_{layer}", self._buffers[f"A_{n}"]))

    def up(self, m: int, layer: int | None = None) -> Tensor:
        """B for height m, shape (m, r): the layer's own once it has refreshed it, else the shared one."""
        return cast(Tensor, self._buffers.get(f"B_{m}_{layer}", self._buffers[f"B_{m}"]))

    def found_on(self, device: torch.device, *given: Tensor) -> tuple[Tensor, ...]:
        """A and B on the device of a layer that is elsewhere; drawn first where that layer got storage."""
        if any(M.is_meta for M in given) and device.type != "meta":
            names = {id(buffer): name for name, buffer in self._buffers.items()}
            wanted = [names[id(M)] for M in given]
            self.to_empty(device=device)
            given = tuple(cast(Tensor, self._buffers[name]) for name in wanted)
        return tuple(self._copy_on(device, M) for M in given)

    def _copy_on(self, device: torch.device, M: Tensor) -> Tensor:
        if M.device == device:
            return M
        if type(M) is not Tensor:  # fake ones, which have no pointer
            return M.to(device)
        key = (id(M), M.data_ptr(), M._version)
        found = self.elsewhere.get((id(M), device))
        if found is None or found[0] != key:
            self.elsewhere[id(M), device] = found = (key, M, M.to(device))
        return found[2]

    def current(self, name: str) -> Tensor:
        """What stands for a buffer's name: a layer's own projection if there is one, else the shared one."""
        side, size, *layer = name.split("_")
        index = int(layer[0]) if layer else None
        return self.down(int(size), index) if side == "A" else self.up(int(size), index)

    def writable(self, name: str) -> Tensor:
        """The buffer of that name, to change in place; a layer's own is first copied from the shared one."""
        if name not in self._buffers:
            shared = cast(Tensor, self._buffers[name.rpartition("_")[0]])
            self.register_buffer(name, shared.clone())
        return cast(Tensor, self._buffers[name])

    @property
    def uncalibrated(self) -> bool:
        """Whether A should come from the inputs and does not yet."""
        return self.config.init == "inputs" and not self.calibrated

    def require_calibrated(self, action: str) -> None:
        """Raise ``ValueError`` where A should come from the inputs and does not yet."""
        if self.uncalibrated:
            raise ValueError(
                f"{action} needs A, and with init='inputs' A is found by calibrate(model, batches), which "
                "was not called yet; UORACallback calls it when training starts (Lightning's finders run "
                "before that: calibrate by hand)."
            )

    def resize(self, old: int, new: int, layer: int, others: set[int]) -> None:
        """B for a layer whose height has changed: its rows as they were, new ones from the seed.

        Args:
            old: Height until now.
            new: Height from now on.
            layer: The layer's index.
            others: Heights of the other layers, whose B stays.
        """
        for name in [f"B_{old}", f"B_{old}_{layer}"]:
            B, target = self._buffers.get(name), name.replace(f"_{old}", f"_{new}", 1)
            if B is None or target in self._buffers:
                continue
            rows = self._draw(f"B_{new}").to(B.device, B.dtype)
            kept = min(old, new)
            rows[:kept] = B[:kept]
            self.register_buffer(target, rows)
            self.resized.append(target)
        self._buffers.pop(f"B_{old}_{layer}", None)
        if old not in others:
            self._buffers.pop(f"B_{old}", None)
        self.resized = [name for name in self.resized if name in self._buffers]

    def stored(self) -> dict[str, Tensor]:
        """What seed and record cannot rebuild.

        A from the inputs, as float16, which holds it exactly; B of layers that were resized.
        """
        named = cast("dict[str, Tensor]", self._buffers)
        kept = {name: named[name] for name in self.resized if name in named}
        if self.config.init != "inputs":
            return kept
        own = self.config.share == "layer"
        return kept | {n: A.half() for n, A in named.items() if n[0] == "A" and _is_own(n) == own}

    def rounded(self, name: str, values: Tensor) -> Tensor:
        """``values`` for the buffer of that name, as they will be stored."""
        return values.half().to(values.dtype) if self.config.init == "inputs" and name[0] == "A" else values

    def reset(self) -> None:
        """Back to the seeded draw: no own copies, no record."""
        self._drop_own(keep=())
        self.record = []
        for name, buffer in self._buffers.items():
            cast(Tensor, buffer).copy_(self._draw(name))

    def set(self, values: dict[str, Tensor]) -> None:
        """Take A and B as they are given; own copies that are not among them are dropped.

        Raises:
            ValueError: A name or a shape is not this owner's.
        """
        self.require_known(values)
        self._drop_own(keep=values)
        for name, value in values.items():
            self.writable(name).copy_(value)

    def require_known(self, values: dict[str, Tensor]) -> None:
        """Raise ``ValueError`` where a name or a shape is not this owner's."""
        shared = {name: buffer for name, buffer in self._buffers.items() if not _is_own(name)}
        for name, value in values.items():
            target = shared.get(name.rpartition("_")[0] if _is_own(name) else name)
            if target is None or target.shape != value.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} is not a projection of this model.")

    def names_ever(self, layers: int) -> list[str]:
        """Every buffer name that may exist in a run with that many layers."""
        shared = [name for name in self._buffers if not _is_own(name)]
        return shared + [f"{name}_{layer}" for name in shared for layer in range(layers)]

    def _drop_own(self, keep: Iterable[str]) -> None:
        for name in [name for name in self._buffers if _is_own(name) and name not in keep]:
            del self._buffers[name]

    def _draw(self, name: str) -> Tensor:
        rank, seed = self.config.rank, self.config.seed
        init = cast(Init, "orthogonal" if self.config.init == "inputs" else self.config.init)
        side, size = name.split("_")
        generator = seeded_generator(seed, side, size, rank)
        return (
            draw_down(rank, int(size), init, generator)
            if side == "A"
            else draw_up(int(size), rank, init, generator)
        )

    def _meta(self, name: str, dtype: torch.dtype) -> Tensor:
        side, size = name.split("_")
        empty = torch.empty(self.config.rank, int(size), device="meta", dtype=dtype)
        return empty if side == "A" else empty.t()  # laid out as the draw: products keep their bits

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Projections:
        """As in torch; what had no storage (``meta``) and gets some is drawn, never left undefined."""
        was_meta = [name for name, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not any(cast(Tensor, self._buffers[name]).is_meta for name in was_meta):
            self._drop_own(keep=())
            self.record, self.calibrated = [], False
            was_meta = [name for name in was_meta if name in self._buffers]
        for name in was_meta:
            buffer = cast(Tensor, self._buffers[name])
            if not buffer.is_meta:
                buffer.copy_(self._draw(name))
        return self

    # Note [Record and own copies in the state dict]
    # A and B in a checkpoint are of no use to a resume without the record of how they came about, and a
    # layer's own copies exist only after a refresh or a calibration. So the record travels as one tensor of
    # JSON bytes beside them, and loading makes or removes copies to match. A state dict that knows nothing of
    # this owner changes nothing.

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """See Note [Record and own copies in the state dict]."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.record or self.calibrated or self.resized:
            told = {"version": 1, "refreshes": self.record, "calibrated": self.calibrated}
            told |= {"resized": self.resized} if self.resized else {}
            text = json.dumps(told).encode()
            destination[f"{prefix}record"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if names:
            record = state_dict.pop(f"{prefix}record", None)
            told = {} if record is None else json.loads(bytes(record.tolist()))
            self.record, self.calibrated = told.get("refreshes", []), told.get("calibrated", False)
            self.resized = told.get("resized", [])
            self._drop_own(keep=names)
            for name in names:
                if _is_own(name) and name.rpartition("_")[0] in self._buffers:
                    self.writable(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def forward(self, x: Any) -> Any:
        """The input as it is: the owner is the last thing that an ``nn.Sequential`` root calls."""
        return x

    @override
    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, init={self.config.init!r}, seed={self.config.seed}"


def require_no_inference_mode(action: str) -> None:
    """Raise ``ValueError`` inside ``torch.inference_mode``: what is made there can never be trained."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{action} inside torch.inference_mode() would leave a model that cannot train.")
