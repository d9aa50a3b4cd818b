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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_uora.adapters.draws import Init, draw_down, draw_up
from lightning_uora.adapters.matrix_names import PLACES, is_own, lacking, shared_name, whole_name
from lightning_uora.adapters.own_rows import NOTHING, Own, packed, replaced, unpacked
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

    replay: ClassVar[Callable[[Projections, list[dict[str, Any]], dict[str, Tensor], Collection[str]], None]]
    """How matrices are rebuilt from a record; ``reinit``, which knows how rows turn, puts it here."""

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
        self.name = "default"  # of the adapter
        self.disabled = 0
        self.mixing = False  # switched off by a mixed batch
        self.set_off = False  # by set_adapter(model, None)
        self.displaced: dict[str, nn.Parameter] = {}  # by what trains besides, see Note [Adapters on a shelf]
        self.requires_grad_before: dict[str, bool] = {}
        self.left: tuple[str, ...] = ()  # the user's own layers that stay frozen at their start
        self.adapted: tuple[str, ...] = ()  # names of its layers within the root, by their index
        self.kept: tuple[str, ...] = ()  # parts that the user froze, beside parts that train
        self.trained: list[str] = []  # besides d and b, within the root: see Note [What trains]
        self.outside: dict[
            str, list[str]
        ] = {}  # likewise around it, by what the root's names begin with there
        self.root: weakref.ref[nn.Module] | None = None  # which was attached to
        self.made_by: weakref.ref[Any] | None = None  # the callback that did
        self.record: list[dict[str, Any]] = []
        self.base_prints: dict[str, tuple[Any, list[Any]]] = {}
        self.gradients: dict[tuple[int, str], Tensor] | None = None  # collected for growth="gradient"
        # for growth="inputs": of a buffer, orthogonal to a basis, so many unused principal axes
        self.unused_axes: Callable[[str, Tensor, int], Tensor] | None = None
        self.on_read: Callable[[Tensor, nn.Module, str], None] | None = None  # told of every weight read
        self.on_input: Callable[[nn.Module, Tensor], None] | None = None  # told of every input of experts
        self.calibrated = False
        self.has_own = False  # some layer has rows of its own
        self.resized: list[
            str
        ] = []  # buffers of layers whose height has changed: the seed cannot redraw them
        self.elsewhere: dict[Any, Any] = {}  # copies for layers on other devices, with what they are of
        self.drawn: dict[str, tuple[int, int]] = {}  # where the draw stands, and its version: see reset
        sizes = (sorted(widths), sorted(heights))
        if device.type != "meta":
            _require_room(config.rank, sum(map(sum, sizes)))
        for name in [f"A_{n}" for n in sizes[0]] + [f"B_{m}" for m in sizes[1]]:
            self.register_buffer(
                name, self._draw(name).to(device, dtype) if device.type != "meta" else self._meta(name, dtype)
            )
            self.drawn[name] = self._standing(name)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "elsewhere": {}, "drawn": {}, "root": None, "made_by": None}

    def sources(self, n: int, m: int, layer: int) -> tuple[Tensor, Tensor, Own]:
        """What a layer computes with: A (r, n), B (m, r), and what stands for rows and columns of them."""
        get = self._buffers.get
        A = get(f"A_{n}_{layer}")
        rows = f"A_{n}_{layer}:rows"
        own = NOTHING
        if self.has_own:
            columns, lines = f"B_{m}_{layer}:columns", f"B_{m}_{layer}:rows"
            names = (rows, rows + PLACES, columns, columns + PLACES, lines, lines + PLACES)
            own = Own(*map(get, names))
        return cast(Tensor, self._buffers[f"A_{n}"] if A is None else A), self._shared(f"B_{m}"), own

    def _shared(self, name: str) -> Tensor:
        return cast(Tensor, self._buffers[name])

    def down(self, n: int, layer: int | None = None) -> Tensor:
        """A for width n, shape (r, n): as the layer has it, or the shared one."""
        if layer is None:
            return self._shared(f"A_{n}")
        whole = self._buffers.get(f"A_{n}_{layer}")
        rows, at = (self._buffers.get(f"A_{n}_{layer}:rows{end}") for end in ("", PLACES))
        return Own(rows, at).down(self._shared(f"A_{n}") if whole is None else whole)

    def up(self, m: int, layer: int | None = None) -> Tensor:
        """B for height m, shape (m, r): as the layer has it, or the shared one."""
        if layer is None:
            return self._shared(f"B_{m}")
        parts = [f"B_{m}_{layer}:{part}{end}" for part in ("columns", "rows") for end in ("", PLACES)]
        return Own(None, None, *map(self._buffers.get, parts)).up(self._shared(f"B_{m}"))

    def found_on(self, device: torch.device, *given: Tensor | None) -> list[Any]:
        """A and B on the device of a layer that is elsewhere; drawn first where that layer got storage."""
        if any(M is not None and M.is_meta for M in given) and device.type != "meta":
            names = {id(buffer): name for name, buffer in self._buffers.items()}
            wanted = [None if M is None else names[id(M)] for M in given]
            self.to_empty(device=device)
            given = tuple(None if name is None else self._buffers.get(name) for name in wanted)
        return [None if M is None else self._copy_on(device, M) for M in given]

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
        """A or B by the name that a record gives it: as a layer has it (``A_768_3``), or the shared one."""
        side, size, *layer = name.split("_")
        index = int(layer[0]) if layer else None
        return self.down(int(size), index) if side == "A" else self.up(int(size), index)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """All that there is of A and B, by buffer; see Note [Names of A and B]."""
        named = cast("dict[str, Tensor]", self._buffers)
        return {name: M for name, M in named.items() if not name.endswith(PLACES)}

    def put(self, name: str, values: Tensor) -> None:
        """Take a whole matrix; a layer's own is kept as the rows that differ from the shared ones."""
        if not is_own(name):
            self._shared(name).copy_(values)
            return
        shared = self._shared(shared_name(name))
        if self._is_whole(name):
            self._register(name, values.to(shared.device, torch.half))
            return
        values = values.to(shared.device, shared.dtype)
        differ = values != shared
        if name[0] == "A":
            at = differ.any(1).nonzero().flatten().tolist()
            self._own(f"{name}:rows", 0, at, values[at])
        else:
            columns = differ.sum(0) * 2 > differ.shape[0]  # d turned them; b turned what is left
            at, rest = columns.nonzero().flatten().tolist(), differ & ~columns
            self._own(f"{name}:columns", 1, at, values[:, at])
            at = rest.any(1).nonzero().flatten().tolist()
            self._own(f"{name}:rows", 0, at, values[at])

    def turn(self, key: str, chosen: Sequence[int], values: Tensor) -> None:
        """Take turned rows, by the name that a record gives them.

        Args:
            key: ``A_9``: rows of A; ``B_7``: columns of B; ``B_7:rows``: rows of B; of a layer
                (``A_9_3``), or shared.
            chosen: Their places, ascending.
            values: The new rows (or columns, as rows), one for each place.
        """
        name = whole_name(key)
        shared = self._shared(shared_name(name))
        values = self.rounded(name, values).to(shared.device, shared.dtype)
        columns = name[0] == "B" and not key.endswith(":rows")
        if not is_own(name) or self._is_whole(name):
            M = self._shared(name)
            (M.t() if columns else M)[list(chosen)] = values.to(M.dtype)
        elif not columns:
            self._own(f"{name}:rows", 0, chosen, values)
        else:
            self._own(f"{name}:columns", 1, chosen, values.t())
            lines, at = (self._buffers.get(f"{name}:rows{end}") for end in ("", PLACES))
            if lines is not None and at is not None:
                lines[:, list(chosen)] = values.t()[at]

    def own_rows(self, name: str) -> tuple[Tensor, list[int]] | None:
        """A layer's own rows of A (``A_9_3``), or columns of B as rows (``B_7_3``), and their places."""
        values, places = (
            self._buffers.get(f"{name}:{'rows' if name[0] == 'A' else 'columns'}{end}")
            for end in ("", PLACES)
        )
        if values is None or places is None:
            return None
        return (values if name[0] == "A" else values.t()), places.tolist()

    def _is_whole(self, name: str) -> bool:
        """Whether a layer's own matrix is kept whole: A from its own inputs."""
        return name[0] == "A" and self.config.init == "inputs"

    def _own(self, name: str, dim: int, chosen: Sequence[int], values: Tensor) -> None:
        if not chosen:
            return
        values, places = replaced(
            self._buffers.get(name), self._buffers.get(name + PLACES), dim, chosen, values
        )
        self._register(name, values)
        self._register(name + PLACES, places)

    def _register(self, name: str, values: Tensor) -> None:
        if name.endswith(":columns"):  # contiguous, as in B
            values = values.t().contiguous().t()
        self.register_buffer(name, values)
        self.elsewhere.clear()  # copies of what stood here before
        self.has_own = self.has_own or is_own(name)

    @property
    def uncalibrated(self) -> bool:
        """Whether A should come from the inputs and does not yet."""
        return self.config.init == "inputs" and not self.calibrated

    def require_calibrated(self, action: str) -> None:
        """Raise ``ValueError`` where A should come from the inputs and does not yet."""
        if self.uncalibrated:
            raise ValueError(
                f"{action} needs A, and with init='inputs' A comes from calibrate(model, batches); call "
                "it first. UORACallback calls it when training starts, but Lightning's finders run "
                "earlier: before them, call it yourself."
            )

    def resize(self, old: int, new: int, layer: int, others: set[int]) -> None:
        """B for a layer whose height has changed: its rows as they were, new ones from the seed.

        Args:
            old: Height until now.
            new: Height from now on.
            layer: The layer's index.
            others: Heights of the other layers, whose B stays.
        """
        B, kept = self._shared(f"B_{old}"), min(old, new)
        if f"B_{new}" not in self._buffers:
            rows = self._draw(f"B_{new}").to(B.device, B.dtype)
            rows[:kept] = B[:kept]
            self.register_buffer(f"B_{new}", rows)
            self.resized.append(f"B_{new}")
        self._resize_own(f"B_{old}_{layer}", f"B_{new}_{layer}", self._shared(f"B_{new}"))
        if old not in others:
            self._buffers.pop(f"B_{old}", None)
        self.resized = [name for name in self.resized if name in self._buffers]

    def _resize_own(self, old: str, new: str, shared: Tensor) -> None:
        """A layer's own columns and rows of B at another height."""
        take = self._buffers.pop
        columns, at = (take(f"{old}:columns{end}", None) for end in ("", PLACES))
        lines, where = (take(f"{old}:rows{end}", None) for end in ("", PLACES))
        if columns is not None and at is not None:
            longer = shared[:, at]
            kept = min(len(longer), len(columns))
            longer[:kept] = columns[:kept]
            self._own(f"{new}:columns", 1, at.tolist(), longer)
            self.resized.append(f"{new}:columns")
        if lines is not None and where is not None and bool((where < len(shared)).any()):
            stay = where < len(shared)
            self._own(f"{new}:rows", 0, where[stay].tolist(), lines[stay])
            self.resized.append(f"{new}:rows")

    def stored(self) -> dict[str, Tensor]:
        """What seed and record cannot rebuild.

        A from the inputs, as float16, which holds it exactly; B of layers that were resized.
        """
        named = cast("dict[str, Tensor]", self._buffers)
        wanted = (name + end for name in self.resized for end in ("", PLACES))
        kept = {name: named[name] for name in wanted if name in named}
        if self.config.init != "inputs":
            return kept
        own = self.config.share == "layer"
        return kept | {n: A.half() for n, A in self.matrices.items() if n[0] == "A" and is_own(n) == own}

    def rounded(self, name: str, values: Tensor) -> Tensor:
        """``values`` for the buffer of that name, as they will be stored."""
        return values.half().to(values.dtype) if self.config.init == "inputs" and name[0] == "A" else values

    def reset(self) -> None:
        """Back to the seeded draw: no own copies, no record. What was not written since its draw stays."""
        self._drop_own(keep=())
        self.record = []
        for name in self._buffers:
            if self.drawn.get(name) != self._standing(name):
                self._shared(name).copy_(self._draw(name))
                self.drawn[name] = self._standing(name)

    def _standing(self, name: str) -> tuple[int, int]:
        M = self._shared(name)
        return (0, -1) if M.is_meta else (M.data_ptr(), M._version)

    def set(self, values: dict[str, Tensor]) -> None:
        """Take A and B as they are given; own rows that are not among them are dropped.

        Raises:
            ValueError: A name, a shape or a place is not this owner's.
        """
        self.require_known(values)
        self._drop_own(keep=())
        self.take(values)

    def take(self, values: dict[str, Tensor]) -> None:
        """As :meth:`set`, of some of A and B, known to fit; the others stay."""
        for name in sorted(values, key=is_own):  # shared ones first
            value = values[name]
            if ":" not in name:
                self.put(name, value)
            elif not name.endswith(PLACES):
                shared = self._shared(shared_name(name))
                self._register(name, value.to(shared.device, shared.dtype, copy=True))
                self._register(name + PLACES, values[name + PLACES].to(shared.device, copy=True))

    def require_known(self, values: dict[str, Tensor]) -> None:
        """Raise ``ValueError`` where a name, a shape or a place is not this owner's."""
        for name, value in values.items():
            if not (name.endswith(PLACES) or self._is_known(name, value, values.get(name + PLACES))):
                raise ValueError(f"{name} of shape {tuple(value.shape)} is not a projection of this model.")

    def _is_known(self, name: str, value: Tensor, places: Tensor | None) -> bool:
        shared, form = self._buffers.get(shared_name(name)), name.partition(":")[2]
        if shared is None or value.dim() != 2:
            return False
        if not form:
            return value.shape == shared.shape
        dim = 1 if form == "columns" else 0
        if (
            form not in ("rows", "columns")
            or places is None
            or places.dim() != 1
            or places.is_floating_point()
        ):
            return False
        fits = value.shape[1 - dim] == shared.shape[1 - dim] and len(places) == value.shape[dim]
        ascending = places.diff() > 0
        inside = len(places) > 0 and int(places[0]) >= 0 and int(places[-1]) < shared.shape[dim]
        return fits and inside and bool(ascending.all())

    def names_ever(self, layers: int) -> list[str]:
        """Every buffer name that may exist in a run with that many layers."""
        shared = [name for name in self._buffers if not is_own(name)]
        forms = ("", ":rows", f":rows{PLACES}", ":columns", f":columns{PLACES}")
        return shared + [f"{n}_{layer}{form}" for n in shared for layer in range(layers) for form in forms]

    def _drop_own(self, keep: Iterable[str]) -> None:
        for name in [name for name in self._buffers if is_own(name) and name not in keep]:
            del self._buffers[name]
        self.has_own = any(map(is_own, self._buffers))

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
        whole = [name for name in self._buffers if is_own(name) and ":" not in name]
        exact = {name: cast(Tensor, self._buffers[name]) for name in whole}
        self.drawn.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        aside = nn.ParameterList(self.displaced.values())  # stands nowhere in the model
        aside._apply(fn)  # type: ignore[no-untyped-call]
        for name, A in exact.items():  # from the inputs: moved, not cast
            moved = cast(Tensor, self._buffers[name])
            if moved.dtype != A.dtype:
                self._buffers[name] = A.to(moved.device)
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
    # this owner changes nothing: of vectors alone it cannot be told which A and B they were trained with.
    # Where it has the record and lacks A or B (people save what trains), they are rebuilt, or it is an error.

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """See Note [Record and own copies in the state dict]."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.record or self.calibrated or self.resized:
            told = {"version": 2, "refreshes": packed(self.record), "calibrated": self.calibrated}
            told |= {"resized": self.resized} if self.resized else {}
            told |= {"own": sorted(filter(is_own, self._buffers)), "draw": self._drawn_by()}
            text = json.dumps(told).encode()
            destination[f"{prefix}record"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _drawn_by(self) -> dict[str, Any]:
        """What A and B depend on besides their sizes and the record."""
        return {field: getattr(self.config, field) for field in ("rank", "init", "seed", "share")}

    @override
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """See Note [Record and own copies in the state dict]."""
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not names:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        record = state_dict.pop(f"{prefix}record", None)
        told = {} if record is None else json.loads(bytes(record.tolist()))
        told["refreshes"] = unpacked(told.get("refreshes", []))
        absent = lacking(names, [name for name in self._buffers if not is_own(name)], told)
        if absent and (why := self._not_from_record(absent, told)):
            error_msgs.append(f"{prefix.rstrip('.')}: {why}")
            return
        self.record = told["refreshes"]
        self.calibrated, self.resized = told.get("calibrated", False), told.get("resized", [])
        self._make_room(state_dict, prefix, names)
        errors = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if absent and len(error_msgs) == errors:
            self._rebuild(absent, local_metadata.get("assign_to_params_buffers", False), record)

    def _not_from_record(self, absent: Collection[str], told: dict[str, Any]) -> str:
        """Why seed and record cannot bring back what a state dict lacks; empty where they can."""
        mine, theirs = self._drawn_by(), told.get("draw", {})
        other = next((field for field, value in theirs.items() if value != mine.get(field)), "")
        if other:
            return (
                f"the state dict lacks {min(absent)!r}, and its run had {other}={theirs[other]!r}, but "
                f"this model has {other}={mine[other]!r}; attach with the run's configuration, or keep A "
                "and B in the state dict."
            )
        own, resized = self.config.share == "layer", set(map(whole_name, told.get("resized", ())))
        inputs = self.config.init == "inputs" and told.get("calibrated", False)
        lost = sorted(n for n in absent if n in resized or (inputs and n[0] == "A" and is_own(n) == own))
        if inputs and own and "own" not in told and not lost:
            lost = sorted(absent)
        if not lost:
            return ""
        what = "A comes from the inputs" if lost[0][0] == "A" else "its layer was resized"
        return (
            f"the state dict lacks {lost[0]!r}, which cannot be rebuilt from the record ({what}); "
            "keep it in the state dict, or use save_adapter and load_adapter."
        )

    @torch.no_grad()
    def _rebuild(self, absent: Collection[str], assigned: bool, record: Tensor | None) -> None:
        """What a state dict lacked, from the seed and the record; all else stays as it was loaded."""
        device = "cpu" if record is None else record.device
        for name in [name for name, buffer in self._buffers.items() if cast(Tensor, buffer).is_meta]:
            if not assigned:
                return  # nothing was loaded
            self._buffers[name] = torch.empty_like(cast(Tensor, self._buffers[name]), device=device)
        given = {n: cast(Tensor, b).clone() for n, b in self._buffers.items() if whole_name(n) not in absent}
        Projections.replay(self, self.record, given, absent)

    def _make_room(self, state_dict: dict[str, Any], prefix: str, names: list[str]) -> None:
        """Own rows as the state dict has them; whole copies, of before, become rows there."""
        self._drop_own(keep=())
        for name in names:
            shared = self._buffers.get(shared_name(name))
            if not is_own(name) or shared is None:
                continue
            if ":" in name or self._is_whole(name):
                value = state_dict[f"{prefix}{name}"]
                dtype = (
                    None if name.endswith(PLACES) else torch.half if self._is_whole(name) else shared.dtype
                )
                self._register(name, torch.empty_like(value, device=shared.device, dtype=dtype))
                continue
            whole = state_dict.pop(f"{prefix}{name}")
            drawn = state_dict.get(f"{prefix}{shared_name(name)}", shared)
            if whole.shape != drawn.shape:
                state_dict[f"{prefix}{name}"] = whole  # torch says what does not fit
                continue
            ours, self._buffers[shared_name(name)] = shared, drawn
            self.put(name, whole)
            self._buffers[shared_name(name)] = ours
            for key in [key for key in self._buffers if whole_name(key) == name]:
                state_dict[f"{prefix}{key}"] = self._buffers[key]
                self._register(key, torch.empty_like(cast(Tensor, self._buffers[key]), device=shared.device))

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
        raise ValueError(
            f"{action} inside torch.inference_mode() would leave a model that cannot train; call it outside."
        )
