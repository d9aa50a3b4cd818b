"""The rows that a convolution's weight multiplies: unfolded patches, a random few of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["patches"]


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    most: int,
    generator: torch.Generator,
) -> Tensor:
    """Patches of ``x`` that a convolution of these settings sees, all or, with replacement, ``most``.

    Only the chosen ones are unfolded. Of a grouped convolution every group's slice of a patch is a row.

    Args:
        x: Input, with or without the batch axis.
        kernel: Size of the kernel, one number for each spatial axis.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: Likewise; zeros.
        dilation: Likewise.
        groups: Likewise.
        most: At most this many rows, at least one patch.
        generator: Picks the patches; on the CPU.

    Shape:
        - ``x``: (N, C, *spatial). Returns (rows, C / groups * prod(kernel)).
    """
    axes = len(kernel)
    x = x if x.dim() == axes + 2 else x.unsqueeze(0)
    steps, gaps = _each(stride, axes), _each(dilation, axes)
    reach = [gap * (k - 1) for gap, k in zip(gaps, kernel, strict=True)]
    before, after = _margins(padding, reach)
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    x = torch.nn.functional.pad(x, sides) if any(sides) else x
    places = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, steps, strict=True)]
    positions = _positions([x.shape[0], *places], max(1, most // groups), generator).to(x.device)
    index: list[Tensor] = [positions[0].reshape(-1, *[1] * (axes + 1))]
    index.append(torch.arange(x.shape[1], device=x.device).reshape(1, -1, *[1] * axes))
    for axis in range(axes):
        offsets = torch.arange(kernel[axis], device=x.device) * gaps[axis]
        where = positions[axis + 1][:, None] * steps[axis] + offsets
        shape = [1] * (axes + 2)
        shape[0], shape[axis + 2] = where.shape
        index.append(where.reshape(shape))
    return x[tuple(index)].reshape(positions.shape[1] * groups, -1)


def _positions(sizes: list[int], most: int, generator: torch.Generator) -> Tensor:
    """(len(sizes), count) indices of places on a grid: all of them, or ``most`` drawn with replacement."""
    total = 1
    for size in sizes:
        total *= size
    flat = torch.arange(total) if total <= most else torch.randint(total, (most,), generator=generator)
    return torch.stack(torch.unravel_index(flat, sizes))


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _margins(padding: int | str | Sequence[int], reach: list[int]) -> tuple[list[int], list[int]]:
    """Zeros before and after each axis; ``"same"`` puts the odd one after."""
    if padding == "valid":
        return [0] * len(reach), [0] * len(reach)
    if padding == "same":
        return [r // 2 for r in reach], [r - r // 2 for r in reach]
    assert not isinstance(padding, str)
    both = _each(padding, len(reach))
    return both, both
