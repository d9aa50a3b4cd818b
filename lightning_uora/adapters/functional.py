"""Pure tensor mathematics of UORA: the two ways to apply an adapter, and what each costs.

Shape letters, used everywhere in this package:

====== ========== ==========================================================================
symbol shape      what
====== ========== ==========================================================================
``W``  (m, n)     frozen weight, m = out features, n = in features (of a convolution: in/groups x kernel)
``A``  (r, n)     frozen random projection down
``B``  (m, r)     frozen random projection up
``d``  (r,)       trainable vector between the projections
``b``  (m,)       trainable vector on the output
``x``  (..., n)   input of a Linear-like layer; T is the number of its rows ("tokens")
====== ========== ==========================================================================

The adapted weight is ``W + diag(b) B diag(d) A`` (VeRA, arXiv:2310.11454, eq. 2; UORA, arXiv:2505.20154).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_uora.adapters.own_rows import NOTHING, Own, put

__all__ = [
    "NO_GRADIENT",
    "add_delta",
    "as_layer_has",
    "base_product",
    "compute_dtype",
    "factored_delta",
    "factored_flops",
    "factored_linear",
    "flat_rows",
    "merged_flops",
    "no_autocast",
    "wants_plain",
]


# Note [Gradient without activations]
# With G = dL/dW_eff, the derivative of diag(b) B diag(d) A needs one matrix only, H = (G A^T) * B of shape
# (m, r): dL/db = H d and dL/dd = b^T H. For the factored form G = g^T x, hence G A^T = g^T (A x): the same
# two lines with the (T, r) product A x in place of A. Neither form keeps an (m, n) or a (T, m) intermediate
# for backward.


def _vector_gradients(Kt: Tensor, B: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of d and b from ``K^T = A (dL/dW_eff)^T``, see Note [Gradient without activations]."""
    Ht = Kt.to(d.dtype).mul_(B.t())
    return Ht @ b, d @ Ht


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else ``default``."""
    return torch.get_autocast_dtype(device.type) if _autocasts(device) else default


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: the functions below cast by themselves."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


# Note [Plain operations]
# The functions below save memory by a backward of their own. Whoever looks inside needs ordinary operations:
# torch.func's transforms (per-sample gradients), forward-mode differentiation, and tracers that write a graph
# down (torch.export, ONNX, jit.trace). They get the same formula, and torch differentiates it.


def wants_plain() -> bool:
    """Whether somebody looks inside, see Note [Plain operations]."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    transforms: bool = torch._C._are_functorch_transforms_active()
    return (
        transforms
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _delta(
    W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype, *own: Tensor | None
) -> Tensor:
    A, B = as_layer_has(A, B, own)
    with no_autocast(W.device):
        wide = torch.promote_types(W.dtype, b.dtype)
        P = B.to(dtype) @ (d.to(wide)[:, None] * A).to(dtype)  # A may have 16 bits where W has 64
        rows = b.to(wide).reshape(-1, *[1] * (W.dim() - 1))
        return torch.addcmul(W.to(wide), rows, P.to(wide).reshape(W.shape)).to(W.dtype)


# The functions below name all six of Own's: torch.compile counts a starred argument of a Function wrongly.


def as_layer_has(A: Tensor, B: Tensor, own: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """A and B as one layer has them; ``own`` is in the order of :class:`Own`."""
    rows, at, columns, columns_at, lines, lines_at = own
    return put(A, 0, rows, at), put(put(B, 1, columns, columns_at), 0, lines, lines_at)


class _AddDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        W: Tensor,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        rows: Tensor | None,
        at: Tensor | None,
        columns: Tensor | None,
        columns_at: Tensor | None,
        lines: Tensor | None,
        lines_at: Tensor | None,
    ) -> Tensor:
        out = _delta(W, A, B, d, b, dtype, rows, at, columns, columns_at, lines, lines_at)
        # W's memory format decides the kernel of a convolution, and the layout of what it returns
        return out if out.stride() == W.stride() else torch.empty_like(W).copy_(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, A, B, d, b, ctx.dtype, *own = inputs
        ctx.save_for_backward(A, B, d, b, *own)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (G,) = grad_outputs
        A, B, d, b, *own = ctx.saved_tensors
        grad_d = grad_b = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            A, B = as_layer_has(A, B, own)
            Kt = A.to(ctx.dtype) @ G.reshape(b.numel(), -1).to(ctx.dtype).t()
            grad_d, grad_b = _vector_gradients(Kt, B, d, b)
        return (G if ctx.needs_input_grad[0] else None), None, None, grad_d, grad_b, None, *NO_GRADIENT


NO_GRADIENT = (None,) * len(NOTHING)
"""Of what is a layer's own."""


def add_delta(W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, own: Own = NOTHING) -> Tensor:
    """Effective weight ``W + diag(b) B diag(d) A``, differentiable in d and b (and in W where it trains).

    Saves only A, B, d and b for backward, never an (m, n) intermediate. With ``b = 0`` the result equals W
    exactly. The sum is formed in the wider of the dtypes of W and b, then rounded to W's. Inside autocast the
    matrix products run in autocast's dtype, forward and backward. ``own`` is what stands for rows and columns
    of A and B here, see Note [Own rows].

    Shape:
        - ``W``: (m, n), or (m, ...) with the trailing axes multiplying to n; ``A``: (r, n); ``B``: (m, r);
          ``d``: (r,); ``b``: (m,).
        - Returns the shape, dtype and memory format of ``W``.

    Source: VeRA (arXiv:2310.11454) eq. 2; the backward is ours, see Note [Gradient without activations].
    """
    dtype = compute_dtype(W.device, W.dtype)
    if wants_plain():
        return _delta(W, A, B, d, b, dtype, *own)
    result: Tensor = _AddDelta.apply(W, A, B, d, b, dtype, *own)
    return result


# Note [The layer inside the factored form]
# h = x W^T + bias is made by the same function, so that the adapter's product can be added to it in place: a
# second (T, m) tensor costs more time than the two low-rank products. The gradient towards x is likewise
# summed in place. A x is an output, because a second derivative must reach x through what was saved.


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        dropped: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        transposed: bool,
        rows: Tensor | None,
        at: Tensor | None,
        columns: Tensor | None,
        columns_at: Tensor | None,
        lines: Tensor | None,
        lines_at: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h = base_product(x, W, bias, transposed)
        A, B = as_layer_has(A, B, (rows, at, columns, columns_at, lines, lines_at))
        with no_autocast(x.device):
            z = flat_rows(x if dropped is None else dropped).to(dtype) @ A.to(dtype).t()
            up = (b[:, None] * B).to(dtype).t()
            flat, scaled = flat_rows(h), (z * d).to(dtype)
            if h.dtype == dtype:
                flat.addmm_(scaled, up)
            else:
                flat.add_((scaled @ up).to(h.dtype))
            return torch.ops.aten._unsafe_view(flat, h.shape), z  # no view: a model may write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, dropped, W, _, A, B, d, b, ctx.dtype, ctx.transposed, *own = inputs
        ctx.shape, ctx.x_dtype, ctx.drops = x.shape, x.dtype, dropped is not None
        ctx.save_for_backward(A, B, d, b, output[1], W, x if ctx.needs_input_grad[2] else None, *own)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g, grad_z = grad_outputs
        A, B, d, b, z, W, x, *own = ctx.saved_tensors
        A, B = as_layer_has(A, B, own)
        need_x, need_dropped, need_W, need_bias, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        grad_x = grad_dropped = grad_W = grad_bias = grad_d = grad_b = u = None
        if g is not None:
            g = flat_rows(g)
            low = g.to(ctx.dtype)
            if need_x:
                grad_x = g @ (W.t() if ctx.transposed else W).to(g.dtype)
            if need_dropped or (need_x and not ctx.drops):
                u = ((low @ (b[:, None] * B).to(ctx.dtype)) * d).to(ctx.dtype)
            if need_W:
                grad_W = flat_rows(x).to(g.dtype).t() @ g
                grad_W = (grad_W if ctx.transposed else grad_W.t()).to(W.dtype)
            if need_bias:
                grad_bias = g.sum(0)
            if need_d or need_b:
                grad_d, grad_b = _vector_gradients(z.t() @ low, B, d, b)
        if grad_z is not None:  # of a second derivative
            u = grad_z if u is None else u + grad_z
        if u is not None and ctx.drops:
            grad_dropped = (u @ A.to(u.dtype)).to(ctx.x_dtype).reshape(ctx.shape)
        elif u is not None:
            grad_x = _add_product(grad_x, u, A.to(u.dtype))
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.shape)
        return (
            grad_x,
            grad_dropped,
            grad_W,
            grad_bias,
            None,
            None,
            grad_d,
            grad_b,
            None,
            None,
            *NO_GRADIENT,
        )


def flat_rows(t: Tensor) -> Tensor:
    """(..., n) as (T, n)."""
    return t.reshape(-1, t.shape[-1])


def _add_product(total: Tensor | None, u: Tensor, A: Tensor) -> Tensor:
    """``total + u A``, in place where the dtypes allow."""
    if total is None:
        return u @ A
    return total.addmm_(u, A) if total.dtype == u.dtype else total + (u @ A).to(total.dtype)


def _plain_factored(
    x: Tensor,
    dropped: Tensor | None,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    transposed: bool,
    *own: Tensor | None,
) -> Tensor:
    """See Note [Plain operations]."""
    h = base_product(x, W, bias, transposed)
    A, B = as_layer_has(A, B, own)
    with no_autocast(x.device):
        z = (x if dropped is None else dropped).to(dtype) @ A.to(dtype).t()
        return h + ((z * d).to(dtype) @ (b[:, None] * B).to(dtype).t()).to(h.dtype)


def base_product(x: Tensor, W: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The base's own product with its frozen weight, by the same kernel as without an adapter."""
    if not transposed:
        return torch.nn.functional.linear(x, W, bias)
    if bias is None:
        return torch.matmul(x, W)
    return torch.addmm(bias, flat_rows(x), W).reshape(*x.shape[:-1], W.shape[1])


def factored_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
    own: Own = NOTHING,
    *,
    dropped: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """A linear layer plus its adapter: ``x W^T + bias + b * (B (d * (A x)))``, differentiable but in A and B.

    Saves ``A x`` for backward and neither the (T, m) product nor x (x where W trains). With ``b = 0`` the
    result equals the layer's own exactly (where W wants a gradient as much there as here).

    Args:
        x: The layer's input.
        W: Its weight.
        bias: Its bias, if there is one.
        A: Projection down.
        B: Projection up.
        d: Vector between them.
        b: Vector on the output.
        own: What stands for rows and columns of A and B here, see Note [Own rows].
        dropped: What the adapter sees in place of x (x with dropout).
        transposed: W is (n, m), as in transformers' ``Conv1D`` (which has a bias).

    Shape:
        - ``x``: (..., n); ``W``: (m, n); ``bias``: (m,); ``A``: (r, n); ``B``: (m, r); ``d``: (r,); ``b``:
          (m,). Returns (..., m).

    Source: VeRA (arXiv:2310.11454) eq. 2; the backward is ours, see Note [Gradient without activations] and
    Note [The layer inside the factored form].
    """
    dtype = compute_dtype(x.device, x.dtype)
    if wants_plain():
        return _plain_factored(x, dropped, W, bias, A, B, d, b, dtype, transposed, *own)
    out, _ = _FactoredLinear.apply(x, dropped, W, bias, A, B, d, b, dtype, transposed, *own)
    result: Tensor = out
    return result


class _FactoredDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        d: Tensor,
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
            out = (z * d).to(dtype) @ (b[:, None] * B).to(dtype).t()
            return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], b.numel())), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, A, B, d, b, ctx.dtype, *own = inputs
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(A, B, d, b, output[1], *own)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        g, grad_z = grad_outputs
        A, B, d, b, z, *own = ctx.saved_tensors
        A, B = as_layer_has(A, B, own)
        need_x, _, _, need_d, need_b, *_ = ctx.needs_input_grad
        grad_x = grad_d = grad_b = u = None
        if g is not None:
            low = flat_rows(g).to(ctx.dtype)
            if need_x:
                u = ((low @ (b[:, None] * B).to(ctx.dtype)) * d).to(ctx.dtype)
            if need_d or need_b:
                grad_d, grad_b = _vector_gradients(z.t() @ low, B, d, b)
        if grad_z is not None:  # of a second derivative
            u = grad_z if u is None else u + grad_z
        if u is not None:
            grad_x = (u @ A.to(u.dtype)).to(ctx.x_dtype).reshape(ctx.shape)
        return grad_x, None, None, grad_d, grad_b, None, *NO_GRADIENT


def factored_delta(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, own: Own = NOTHING) -> Tensor:
    """``b * (B (d * (A x)))`` alone, for a base that computes by itself; differentiable in x, d and b.

    Saves ``A x`` for backward, not x.

    Shape:
        - As :func:`factored_linear`; returns (..., m) in the dtype of the products.

    Source: VeRA (arXiv:2310.11454) eq. 2; the backward is ours, see Note [Gradient without activations].
    """
    dtype = compute_dtype(x.device, x.dtype)
    if wants_plain():
        A, B = as_layer_has(A, B, own)
        with no_autocast(x.device):
            z = x.to(dtype) @ A.to(dtype).t()
            return (z * d).to(dtype) @ (b[:, None] * B).to(dtype).t()
    out, _ = _FactoredDelta.apply(x, A, B, d, b, dtype, *own)
    result: Tensor = out
    return result


def merged_flops(tokens: int, m: int, n: int, r: int) -> int:
    """Extra floating-point operations of a training step through :func:`add_delta` and the layer's forward.

    ``dL/dW_eff`` (2 T m n), the product B A forward (2 m n r) and G A^T backward (2 m n r).
    """
    return 2 * tokens * m * n + 4 * m * n * r


def factored_flops(tokens: int, m: int, n: int, r: int) -> int:
    """Extra floating-point operations of one training step through :func:`factored_linear`.

    Forward 2 T r (m + n); backward the same towards x, and 2 T m r for the vectors.
    """
    return 4 * tokens * r * (m + n) + 2 * tokens * m * r
