"""Principal axes of streamed rows, and the patches of convolutions, against literal float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_uora.inputs.moments import (
    Axes,
    ExactMoment,
    SketchedMoment,
    is_exact,
    principal_rows,
    sketch_size,
)
from lightning_uora.inputs.patches import patches


def literal_axes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors as rows and eigenvalues of sum x x^T, largest first, in float64."""
    C = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x.double():
        C += torch.outer(row, row)
    values, vectors = torch.linalg.eigh(C)
    return vectors.t().flip(0), values.flip(0)


def rows_with_spectrum(count: int, n: int, power: float) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(n, n))[0]
    return (torch.randn(count, n) * torch.arange(1.0, n + 1) ** -power) @ basis.t() + 0.1


def sines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Sines of the principal angles between two row spaces."""
    Q = torch.linalg.qr(found.double().t())[0].t()
    return torch.linalg.svdvals(Q - Q @ expected.double().t() @ expected.double())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_exact_moment_has_the_axes_of_the_literal_one(dtype):
    x = rows_with_spectrum(37, 7, 0.7).to(dtype)
    moment = ExactMoment(7, torch.device("cpu"))
    for part in x.split(5):
        moment.add(part)
    expected, values = literal_axes(x)
    axes = moment.axes()
    torch.testing.assert_close(axes.values, values, rtol=1e-5, atol=1e-5)
    assert (axes.rows * expected).sum(1).abs().min() > 1 - 1e-8


def sketch(x: torch.Tensor, count: int) -> Axes:
    moment = SketchedMoment(torch.randn(x.shape[1], sketch_size(count), generator=generator()))
    for number in range(moment.passes):
        if number:
            moment.next_pass()
        for part in x.split(50):
            moment.add(part)
    return moment.axes()


def test_the_sketch_finds_the_leading_axes_without_an_n_by_n_matrix():
    x = rows_with_spectrum(2000, 300, 1.0)
    axes = sketch(x, 12)
    expected, values = literal_axes(x)
    found, best = ((x.double() @ rows[:12].t()).square().sum() for rows in (axes.rows, expected))
    assert found > 0.9995 * best
    assert sines(axes.rows[:12], expected[:12]).max() < 0.15  # the last of them is near the next
    assert sines(axes.rows[:6], expected[:6]).max() < 0.03
    torch.testing.assert_close(axes.values[:12], values[:12], rtol=3e-2, atol=0)
    identity = torch.eye(len(axes.rows), dtype=torch.float64)
    torch.testing.assert_close(axes.rows @ axes.rows.t(), identity, atol=1e-9, rtol=0)
    assert len(axes.rows) <= sketch_size(12) == 21


def test_the_second_pass_of_the_sketch_is_what_makes_it_good():
    """The range of the first pass alone contains the axes worse than the axes found after the second."""
    x = rows_with_spectrum(2000, 300, 1.0)
    moment = SketchedMoment(torch.randn(300, 24, generator=generator()))
    moment.add(x)
    moment.next_pass()
    expected = literal_axes(x)[0][:12]
    assert sines(moment.basis.t(), expected).max() > 3 * sines(sketch(x, 12).rows[:12], expected).max()


@pytest.mark.parametrize("rank", [1, 5])
def test_the_sketch_of_rows_of_low_rank_has_that_many_axes(rank: int):
    x = torch.randn(400, rank) @ torch.randn(rank, 300)
    axes = sketch(x, 12)
    assert len(axes.present()) == rank
    assert sines(axes.present(), literal_axes(x)[0][:rank]).max() < 1e-3


def test_a_moment_of_nothing_but_zeros_has_no_axes():
    exact = ExactMoment(7, torch.device("cpu"))
    exact.add(torch.zeros(4, 7))
    assert len(exact.axes().present()) == 0
    assert len(sketch(torch.zeros(4, 300), 3).present()) == 0


def test_what_is_held_is_the_smaller_of_moment_and_sketch_above_the_limit():
    assert is_exact(256, 1)
    assert not is_exact(257, 1)
    assert is_exact(2 * sketch_size(256), 256)
    assert not is_exact(2 * sketch_size(256) + 1, 256)
    assert [sketch_size(count) for count in (1, 16, 64, 256)] == [9, 28, 112, 384]


def test_rows_are_the_leading_axes_with_a_fixed_sign_at_the_norm_of_the_draw():
    x = rows_with_spectrum(60, 7, 0.7)
    moment = ExactMoment(7, torch.device("cpu"))
    moment.add(x)
    A = principal_rows(moment.axes(), 3, 7, generator())
    expected = literal_axes(x)[0][:3]
    for row, axis in zip(A, expected, strict=True):
        largest = axis[axis.abs().argmax()]
        torch.testing.assert_close(row.double(), math.sqrt(2) * axis * largest.sign(), atol=1e-3, rtol=0)
    assert torch.equal(A, A.half().float())


@pytest.mark.parametrize("seed", [0, 1])
def test_missing_axes_are_drawn_orthogonal_to_those_that_are_there(seed: int):
    x = torch.randn(50, 2) @ torch.randn(2, 7)
    moment = ExactMoment(7, torch.device("cpu"))
    moment.add(x)
    A = principal_rows(moment.axes(), 5, 7, generator(seed))
    torch.testing.assert_close(A @ A.t(), 2 * torch.eye(5), atol=5e-3, rtol=0)
    assert sines(A[:2] / math.sqrt(2), literal_axes(x)[0][:2]).max() < 1e-2
    again = principal_rows(moment.axes(), 5, 7, generator(seed))
    other = principal_rows(moment.axes(), 5, 7, generator(seed + 9))
    assert torch.equal(A, again)
    assert torch.equal(A[:2], other[:2]) and not torch.allclose(A[2:], other[2:], atol=0.1)


def test_rows_beyond_the_width_come_in_further_orthogonal_blocks():
    moment = ExactMoment(3, torch.device("cpu"))
    moment.add(torch.randn(50, 3))
    A = principal_rows(moment.axes(), 7, 3, generator())
    for block in A.split(3):
        torch.testing.assert_close(block @ block.t(), 2 * torch.eye(len(block)), atol=5e-3, rtol=0)


def test_axes_away_from_a_basis_are_those_of_the_projected_moment():
    x = rows_with_spectrum(60, 7, 0.5)
    moment = ExactMoment(7, torch.device("cpu"))
    moment.add(x)
    basis = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0]
    expected, values = literal_axes(x.double() - x.double() @ basis @ basis.t())
    axes = moment.axes().away_from(basis)
    assert len(axes.rows) == 4
    torch.testing.assert_close(axes.values, values[:4], rtol=1e-4, atol=1e-4)
    assert (axes.rows * expected[:4]).sum(1).abs().min() > 1 - 1e-6


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {"kernel_size": 3}),
        (1, {"kernel_size": 4, "padding": "same"}),
        (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
        (2, {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1), "groups": 2}),
        (2, {"kernel_size": (2, 3), "padding": "same", "dilation": 2}),
        (2, {"kernel_size": 3, "padding": "valid", "groups": 4}),
        (3, {"kernel_size": (1, 2, 3), "stride": 2, "padding": 1}),
    ],
)
def test_patches_times_the_weight_are_the_convolution(axes: int, options):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1](4, 8, bias=False, **options).double()
    x = torch.randn(2, 4, *(7, 6, 8)[:axes], dtype=torch.float64)
    used = [conv.stride, conv.padding, conv.dilation, conv.groups]
    found = patches(x, conv.weight.shape[2:], *used, most=10**6, generator=generator())
    W = conv.weight.reshape(conv.groups, 8 // conv.groups, -1)
    products = torch.einsum("pgn,gmn->pgm", found.reshape(-1, conv.groups, W.shape[2]), W).flatten(1)
    expected = conv(x).movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(products, expected)


def test_a_few_patches_are_picked_by_the_generator_alone():
    x = torch.randn(2, 4, 9, 9)
    every = {tuple(row.tolist()) for row in patches(x, (3, 3), 1, 0, 1, 2, 10**6, generator())}
    state = torch.get_rng_state()
    few = patches(x, (3, 3), 1, 0, 1, 2, 20, generator())
    assert torch.equal(state, torch.get_rng_state())
    assert few.shape == (20, 18)
    assert {tuple(row.tolist()) for row in few} <= every
    assert torch.equal(few, patches(x, (3, 3), 1, 0, 1, 2, 20, generator()))
    assert not torch.equal(few, patches(x, (3, 3), 1, 0, 1, 2, 20, generator(1)))


def test_patches_of_one_image_without_a_batch_axis():
    x = torch.randn(4, 5, 5)
    assert torch.equal(
        patches(x, (3, 3), 1, 0, 1, 1, 99, generator()), patches(x[None], (3, 3), 1, 0, 1, 1, 99, generator())
    )
