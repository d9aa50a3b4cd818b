"""The method written out literally, in float64, with loops where a loop is clearest. The oracle of the
tests.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta(A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``diag(b) B diag(d) A`` entry by entry: sum over i of b_j B_ji d_i A_ik."""
    A, B, d, b = (t.detach().double() for t in (A, B, d, b))
    out = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(A.shape[0]):
        out += torch.outer(b * B[:, i], d[i] * A[i])
    return out


def effective_weight(W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """W + delta, the trailing axes of W read as one."""
    return (W.detach().double().reshape(W.shape[0], -1) + delta(A, B, d, b)).reshape(W.shape)


def linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``x W_eff^T + bias``."""
    out = x.detach().double() @ effective_weight(W, A, B, d, b).t()
    return out if bias is None else out + bias.detach().double()
