"""The mathematics and the draws against the literal float64 reference and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_uora.adapters.draws import draw_down, draw_up
from lightning_uora.adapters.functional import (
    add_delta,
    factored_flops,
    factored_linear,
    merged_flops,
)
from tests import reference

# (m, n, r): rank below, between and above both dimensions, and 1
SIZES = [(5, 7, 3), (7, 5, 6), (5, 7, 11), (1, 3, 2), (4, 1, 5), (3, 2, 1)]


def random(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
def test_add_delta_equals_the_literal_reference(m: int, n: int, r: int):
    W, A, B, d, b = random(m, n), random(r, n), random(m, r), random(r), random(m)
    torch.testing.assert_close(add_delta(W, A, B, d, b), reference.effective_weight(W, A, B, d, b))


def test_add_delta_reads_trailing_axes_as_one():
    W, A, B, d, b = random(5, 2, 3, 3), random(4, 18), random(5, 4), random(4), random(5)
    out = add_delta(W, A, B, d, b)
    assert out.shape == W.shape
    torch.testing.assert_close(out, reference.effective_weight(W, A, B, d, b))


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
def test_add_delta_passes_gradcheck_and_gradgradcheck(m: int, n: int, r: int):
    W, d, b = random(m, n, grad=True), random(r, grad=True), random(m, grad=True)
    A, B = random(r, n), random(m, r)
    assert torch.autograd.gradcheck(lambda W, d, b: add_delta(W, A, B, d, b), (W, d, b))
    assert torch.autograd.gradgradcheck(lambda W, d, b: add_delta(W, A, B, d, b), (W, d, b))


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
@pytest.mark.parametrize("transposed", [False, True])
def test_factored_linear_equals_the_reference(m: int, n: int, r: int, leading: tuple, transposed: bool):
    x, W, bias = random(*leading, n), random(m, n), random(m)
    A, B, d, b = random(r, n), random(m, r), random(r), random(m)
    own = W.t().contiguous() if transposed else W
    out = factored_linear(x, own, bias, A, B, d, b, transposed=transposed)
    torch.testing.assert_close(out, reference.linear(x, W, bias, A, B, d, b))


@pytest.mark.parametrize(("m", "n", "r"), SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_factored_linear_passes_gradcheck_and_gradgradcheck(m: int, n: int, r: int, transposed: bool, drops):
    """Towards everything but A and B, the second derivative through the saved product included."""
    x, other = random(2, 3, n, grad=True), random(2, 3, n, grad=True)
    W, bias = random(*((n, m) if transposed else (m, n)), grad=True), random(m, grad=True)
    d, b = random(r, grad=True), random(m, grad=True)
    A, B = random(r, n), random(m, r)

    def run(x: Tensor, other: Tensor, W: Tensor, bias: Tensor, d: Tensor, b: Tensor) -> Tensor:
        dropped = other if drops else None
        out = factored_linear(x, W, bias, A, B, d, b, dropped=dropped, transposed=transposed)
        return out if drops else out + 0 * other.sum()

    assert torch.autograd.gradcheck(run, (x, other, W, bias, d, b))
    assert torch.autograd.gradgradcheck(run, (x, other, W, bias, d, b))


@pytest.mark.parametrize("frozen", ["x", "vectors"])
def test_factored_linear_with_a_part_frozen_has_the_other_parts_gradients(frozen: str):
    A, B, W = random(3, 7), random(5, 3), random(5, 7)
    x, d, b = random(4, 7, grad=True), random(3, grad=True), random(5, grad=True)
    factored_linear(x, W, None, A, B, d, b).square().sum().backward()
    whole = {"x": x.grad, "d": d.grad, "b": b.grad}
    y, e, c = x.detach(), d.detach(), b.detach()
    for t in (e, c) if frozen == "x" else (y,):
        t.requires_grad_(True)
    factored_linear(y, W, None, A, B, e, c).square().sum().backward()
    for name, t in (("d", e), ("b", c)) if frozen == "x" else (("x", y),):
        torch.testing.assert_close(t.grad, whole[name])


def saved_sizes(make) -> list[int]:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        make()
    return sorted(sizes)


def test_merged_form_saves_only_the_projections_and_the_vectors():
    """No (m, n) intermediate is kept for backward."""
    m, n, r = 11, 13, 3
    W, A, B, d, b = random(m, n), random(r, n), random(m, r), random(r, grad=True), random(m, grad=True)
    assert saved_sizes(lambda: add_delta(W, A, B, d, b)) == sorted([r * n, m * r, r, m])


def test_factored_form_saves_the_low_rank_product_and_not_the_wide_one():
    """(T, r) is kept; neither (T, m) nor the input, which only a weight that trains needs."""
    m, n, r, tokens = 11, 13, 3, 17
    x, W = random(tokens, n, grad=True), random(m, n)
    A, B, d, b = random(r, n), random(m, r), random(r, grad=True), random(m, grad=True)
    kept = [r * n, m * r, r, m, tokens * r, m * n]
    assert saved_sizes(lambda: factored_linear(x, W, None, A, B, d, b)) == sorted(kept)
    W.requires_grad_(True)
    assert saved_sizes(lambda: factored_linear(x, W, None, A, B, d, b)) == sorted([*kept, tokens * n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_b_changes_no_bit(dtype: torch.dtype):
    m, n, r = 5, 7, 3
    W, A, B = random(m, n, dtype=dtype), random(r, n, dtype=dtype), random(m, r, dtype=dtype)
    d, b = torch.full((r,), 0.1), torch.zeros(m)
    x, bias = random(4, n, dtype=dtype), random(m, dtype=dtype)
    assert torch.equal(add_delta(W, A, B, d, b), W)
    own = torch.nn.functional.linear(x, W, bias)
    assert torch.equal(factored_linear(x, W, bias, A, B, d, b), own)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_the_reference_forward_and_backward(dtype: torch.dtype, tolerance: float):
    """float32 vectors with base and projections in ``dtype``: outputs in ``dtype``, gradients in float32."""
    m, n, r = 33, 47, 16
    W, A, B = random(m, n, dtype=dtype), random(r, n, dtype=dtype), random(m, r, dtype=dtype)
    d, b = random(r, dtype=torch.float32, grad=True), random(m, dtype=torch.float32, grad=True)
    G = random(m, n, dtype=dtype)
    out = add_delta(W, A, B, d, b)
    out.backward(G)
    assert out.dtype == dtype
    assert d.grad.dtype == b.grad.dtype == torch.float32
    H = (G.double() @ A.double().t()) * B.double()
    for got, want in [
        (out, reference.effective_weight(W, A, B, d, b)),
        (b.grad, H @ d.detach().double()),
        (d.grad, b.detach().double() @ H),
    ]:
        assert (got.double() - want).norm() < tolerance * want.norm()


def test_autocast_uses_its_dtype_forward_and_backward_and_keeps_the_weights():
    m, n, r, tokens = 16, 16, 8, 4
    W, A, B = (random(*s, dtype=torch.float32) for s in ((m, n), (r, n), (m, r)))
    d, b = random(r, dtype=torch.float32, grad=True), random(m, dtype=torch.float32, grad=True)
    x = random(tokens, n, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = torch.nn.functional.linear(x, add_delta(W, A, B, d, b))
        factored = factored_linear(x, W, None, A, B, d, b)
    assert merged.dtype == factored.dtype == torch.bfloat16
    want = reference.linear(x, W, None, A, B, d, b)
    for got in (merged, factored):
        assert (got.double() - want).norm() < 2e-2 * want.norm()
        grads = torch.autograd.grad(got.float().sum(), (d, b), retain_graph=True)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("init", ["orthogonal", "kaiming_uniform"])
def test_draws_have_veras_variance_and_a_column_major_b(init):
    """Variance 2/n for A and 2/r for B, as Kaiming-uniform with fan-in gives (VeRA)."""
    generator = torch.Generator().manual_seed(1)
    A = draw_down(90, 60, init, generator)
    B = draw_up(70, 90, init, generator)
    assert A.shape == (90, 60)
    assert B.shape == (70, 90)
    assert B.t().is_contiguous()
    assert A.var().item() == pytest.approx(2 / 60, rel=0.05)
    assert B.var().item() == pytest.approx(2 / 90, rel=0.05)


def test_kaiming_draw_stays_inside_its_bound():
    A = draw_down(50, 40, "kaiming_uniform", torch.Generator().manual_seed(0))
    bound = (6 / 40) ** 0.5
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.98 * bound


def test_orthogonal_rows_are_orthogonal_in_independent_blocks():
    """Rank above the dimension: blocks of n rows, each orthogonal, at norm sqrt(2)."""
    A = draw_down(8, 3, "orthogonal", torch.Generator().manual_seed(0), torch.float64)
    for block in A.split(3):
        torch.testing.assert_close(block @ block.t(), 2 * torch.eye(len(block), dtype=torch.float64))
    assert (A[:3] @ A[3:6].t()).abs().max() > 0.1
    B = draw_up(3, 8, "orthogonal", torch.Generator().manual_seed(0), torch.float64)
    for block in B.t().split(3):
        torch.testing.assert_close(block @ block.t(), 2 * 3 / 8 * torch.eye(len(block), dtype=torch.float64))


def test_orthogonal_draw_is_uniform_and_not_biased_by_the_signs_of_r():
    """Haar: entries have mean 0 and variance 1/n. A bare LAPACK Q fails: its first entry is never
    positive.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([draw_down(2, 3, "orthogonal", generator) for _ in range(2000)]) / 2**0.5
    assert first.mean(0).abs().max() < 0.06
    torch.testing.assert_close(first.var(0), torch.full((2, 3), 1 / 3), atol=0.03, rtol=0)


def test_draws_depend_on_their_generator_alone_and_not_on_threads():
    before = torch.get_rng_state()
    one = draw_down(32, 96, "orthogonal", torch.Generator().manual_seed(5))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    two = draw_down(32, 96, "orthogonal", torch.Generator().manual_seed(5))
    torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_cost_model_counts_the_products_and_crosses_once_in_tokens():
    """Merged costs 2Tmn + 4mnr, factored 4Tr(m+n) + 2Tmr: factored wins for few tokens, merged for many at
    high rank.
    """
    assert merged_flops(10, 5, 7, 3) == 2 * 10 * 5 * 7 + 4 * 5 * 7 * 3
    assert factored_flops(10, 5, 7, 3) == 4 * 10 * 3 * (5 + 7) + 2 * 10 * 5 * 3
    assert factored_flops(8, 576, 192, 1024) < merged_flops(8, 576, 192, 1024)
    assert factored_flops(1576, 576, 192, 1024) > merged_flops(1576, 576, 192, 1024)
    assert factored_flops(788, 1152, 384, 64) < merged_flops(788, 1152, 384, 64)
