"""The update where each row of the input has vectors of its own: those of the expert that it is sent to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters.functional import (
    NO_GRADIENT,
    as_layer_has,
    compute_dtype,
    flat_rows,
    no_autocast,
    wants_plain,
)
from lightning_uora.adapters.own_rows import NOTHING, Own

__all__ = ["add_by_row_", "delta_by_row"]

# Note [Two products for all rows]
# Adapters that share A and B differ in two thin vectors. Kept as tables D (K, r) and b (K, m), a batch whose
# rows belong to different ones takes the same two products as one adapter, with rows of the tables picked by
# row: z = A x, y = B (D[i] z), out = b[i] y. Backward needs z alone: dL/db[i] sums g y (y is made again), and
# with u = B^T (b[i] g), dL/dD[i] sums u z and dL/dx = A^T (D[i] u). Entries that no row has picked get zeros.


class _DeltaByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        index: Tensor,
        A: Tensor,
        B: Tensor,
        D: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        rows: Tensor | None,
        at: Tensor | None,
        columns: Tensor | None,
        columns_at: Tensor | None,
        lines: Tensor | None,
        lines_at: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        A, B = as_layer_has(A, B, (rows, at, columns, columns_at, lines, lines_at))
        with no_autocast(x.device):
            z = flat_rows(x).to(dtype) @ A.to(dtype).t()
            out = _times(_up(z, D[index], B, dtype), b[index]).to(dtype)
            return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], b.shape[1])), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, index, A, B, D, b, ctx.dtype, *own = inputs
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(index, A, B, D, b, output[1], *own)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g, grad_z = grad_outputs
        index, A, B, D, b, z, *own = ctx.saved_tensors
        A, B = as_layer_has(A, B, own)
        need_x, _, _, _, need_D, need_b, *_ = ctx.needs_input_grad
        grad_x = grad_D = grad_b = u = None
        if g is not None:
            g, picked = flat_rows(g), D[index]
            if need_b:
                grad_b = _summed(g * _up(z, picked, B, ctx.dtype), index, b)
            if need_x or need_D:
                w = _times(g, b[index]).to(ctx.dtype) @ B.to(ctx.dtype)
                u = _times(w, picked).to(ctx.dtype)
                grad_D = _summed(w * z, index, D) if need_D else None
        if grad_z is not None:  # of a second derivative
            u = grad_z if u is None else u + grad_z
        if need_x and u is not None:
            grad_x = (u @ A.to(u.dtype)).to(ctx.x_dtype).reshape(ctx.shape)
        return grad_x, None, None, None, grad_D, grad_b, None, *NO_GRADIENT


def _up(z: Tensor, picked: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    return _times(z, picked).to(dtype) @ B.to(dtype).t()


def _times(rows: Tensor, picked: Tensor) -> Tensor:
    """Rows (S T, k) by what was picked for each of S (S, k)."""
    if len(rows) == len(picked):
        return rows * picked
    return (rows.reshape(len(picked), -1, rows.shape[1]) * picked[:, None]).reshape(rows.shape)


def _summed(values: Tensor, index: Tensor, table: Tensor) -> Tensor:
    if len(values) != len(index):
        values = values.reshape(len(index), -1, values.shape[1]).sum(1)
    return torch.zeros_like(table).index_add(0, index, values.to(table.dtype))


def delta_by_row(
    x: Tensor, index: Tensor, A: Tensor, B: Tensor, D: Tensor, b: Tensor, own: Own = NOTHING
) -> Tensor:
    """``b[i] * (B (D[i] * (A x)))`` for row x with i = ``index`` of it; differentiable in x, D and b.

    One index may stand for T rows in a sequence (the tokens of a sample).

    Saves ``A x`` for backward, not x. See Note [Two products for all rows].

    Shape:
        - ``x``: (..., n), S T rows; ``index``: (S,) of integers below K; ``A``: (r, n); ``B``: (m, r); ``D``:
          (K, r); ``b``: (K, m). Returns (..., m) in the dtype of the products.

    Source: VeRA (arXiv:2310.11454) eq. 2 for each row; tables picked by row are *ours*.
    """
    dtype = compute_dtype(x.device, x.dtype)
    if wants_plain():
        A, B = as_layer_has(A, B, own)
        with no_autocast(x.device):
            y = _up(flat_rows(x).to(dtype) @ A.to(dtype).t(), D[index], B, dtype)
            return _times(y, b[index]).to(dtype).reshape(*x.shape[:-1], b.shape[1])
    out, _ = _DeltaByRow.apply(x, index, A, B, D, b, dtype, *own)
    result: Tensor = out
    return result


def add_by_row_(
    out: Tensor, x: Tensor, index: Tensor, A: Tensor, B: Tensor, D: Tensor, b: Tensor, own: Own = NOTHING
) -> bool:
    """Add :func:`delta_by_row` to ``out`` (..., m) in its memory, without gradients.

    Returns:
        Whether that was done; not where dtypes differ or ``out`` is no plain memory of its own.
    """
    dtype = compute_dtype(x.device, x.dtype)
    if (
        not (out.dtype == dtype == b.dtype)
        or not out.is_contiguous()
        or out.is_inference() != x.is_inference()
    ):
        return False
    A, B = as_layer_has(A, B, own)
    with no_autocast(x.device):
        y = _up(flat_rows(x).to(dtype) @ A.to(dtype).t(), D[index], B, dtype)
    samples = len(index)
    out.view(samples, -1, b.shape[1]).addcmul_(y.view(samples, -1, b.shape[1]), b[index][:, None])
    return True
