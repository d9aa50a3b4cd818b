"""What a layer has refreshed for itself: rows of A, columns and rows of B, and their places."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NOTHING", "Own", "packed", "put", "replaced", "unpacked"]

# Note [Own rows]
# A layer that refreshed k rows keeps those k rows of A and columns of B with their places; the rest it reads
# from the shared ones. For a product the two are put together (a copy of (m + n) r numbers, against T times
# as many operations), inside the functions that compute: backward keeps what is shared and what is own, and
# puts them together again. Rows of B that entries of b scale are whole rows: they cover the layer's columns.


class Own(NamedTuple):
    """A layer's own rows and columns; None where it has none. See Note [Own rows].

    Attributes:
        rows: Of A, (k, n).
        at: Their places, (k,).
        columns: Of B, (m, l).
        columns_at: Their places, (l,).
        lines: Rows of B, (j, r).
        lines_at: Their places, (j,).
    """

    rows: Tensor | None = None
    at: Tensor | None = None
    columns: Tensor | None = None
    columns_at: Tensor | None = None
    lines: Tensor | None = None
    lines_at: Tensor | None = None

    def down(self, A: Tensor) -> Tensor:
        """The layer's A; ``A`` itself where it has no rows of its own."""
        return put(A, 0, self.rows, self.at)

    def up(self, B: Tensor) -> Tensor:
        """The layer's B; ``B`` itself where it has nothing of its own."""
        return put(put(B, 1, self.columns, self.columns_at), 0, self.lines, self.lines_at)

    def part(self, B: Tensor, row: int, m: int) -> tuple[Tensor, Own]:
        """``B`` and what is own for m rows of B alone."""
        if m == B.shape[0]:
            return B, self
        if self.lines is not None:
            return self.up(B)[row : row + m], Own(self.rows, self.at)
        columns = None if self.columns is None else self.columns[row : row + m]
        return B[row : row + m], self._replace(columns=columns)

    def to(self, *args: Any) -> Own:
        """As ``Tensor.to`` of a dtype, places as they are."""
        return Own(*(t if t is None or not t.is_floating_point() else t.to(*args) for t in self))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        return tuple(t for t in self if t is not None)


NOTHING = Own()


def put(M: Tensor, dim: int, values: Tensor | None, places: Tensor | None) -> Tensor:
    """``M`` with other values at some places along a dimension; ``M`` itself where there are none."""
    if values is None or places is None:
        return M
    if dim == 1:  # B has its columns contiguous, and so have those that are own
        return M.t().index_copy(0, places, values.t().to(M.dtype)).t()
    return M.index_copy(0, places, values.to(M.dtype))


def replaced(
    values: Tensor | None, places: Tensor | None, dim: int, chosen: Sequence[int], new: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (``dim`` 0) or columns (1) with others put among them, by ascending places.

    Args:
        values: Those that are there.
        places: Theirs, ascending.
        dim: Along which.
        chosen: Places of ``new``, ascending.
        new: Take the place of what is there, or come beside it.
    """
    where = torch.tensor(list(chosen), dtype=torch.long, device=new.device)
    if values is None or places is None:
        return new.clone(), where
    every: Tensor = torch.cat([places, where]).unique()  # type: ignore[no-untyped-call]
    shape = list(new.shape)
    shape[dim] = len(every)
    out = new.new_empty(shape)
    out.index_copy_(dim, torch.searchsorted(every, places), values)
    out.index_copy_(dim, torch.searchsorted(every, where), new)
    return out, every


def packed(record: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record of refreshes whose lists of rows are strings: a bit for every row, in base 64.

    Columns of B that turn with rows of A are said once: ``"=A_768_3"``.
    """
    return [{**entry, "rows": _pack(entry["rows"])} for entry in record]


def unpacked(record: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record as it is kept: rows as ascending lists, whether they were packed or not.

    Raises:
        KeyError, ValueError: A string is not one of :func:`packed`.
    """
    return [{**entry, "rows": _unpack(entry["rows"])} for entry in record]


def _pack(rows: dict[str, list[int]]) -> dict[str, str]:
    told: dict[tuple[int, ...], str] = {}
    out = {}
    for key, chosen in rows.items():
        first = told.setdefault(tuple(chosen), key)
        out[key] = _bits(chosen) if first == key else f"={first}"
    return out


def _bits(rows: Sequence[int]) -> str:
    bits = bytearray(max(rows, default=-1) // 8 + 1)
    for row in rows:
        bits[row // 8] |= 1 << row % 8
    return base64.b64encode(bits).decode()


def _unpack(rows: dict[str, Any]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for key, told in rows.items():
        if not isinstance(told, str):
            out[key] = told
        elif told.startswith("="):
            out[key] = list(out[told[1:]])
        else:
            bits = base64.b64decode(told, validate=True)
            out[key] = [
                8 * place + bit for place, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1
            ]
    return out
