"""Fingerprints: the literal sums, and what they tell apart."""

from __future__ import annotations

import pytest
import torch

from lightning_uora.storage.fingerprints import STRIDE, fingerprint, near


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("count", [5, STRIDE, 2 * STRIDE + 7])
def test_a_fingerprint_is_the_signed_sum_and_the_norm(count: int):
    """Signs repeat every STRIDE entries; sums are those of a literal loop in float64."""
    values = torch.randn(count, generator=generator())
    signs = torch.randint(0, 2, (STRIDE,), generator=generator(), dtype=torch.float64).tolist()
    total = sum((2 * signs[i % STRIDE] - 1) * v for i, v in enumerate(values.double().tolist()))
    assert fingerprint(values) == pytest.approx([total, values.double().square().sum().sqrt().item()])


@pytest.mark.parametrize("count", [50, 3 * STRIDE])
def test_the_same_numbers_in_another_order_are_another_tensor(count: int):
    """The norm cannot tell them apart; the signs do."""
    values = torch.randn(count, generator=generator())
    assert not near(fingerprint(values.flip(0)), fingerprint(values), 1e-5)
    assert near(fingerprint(values.half().float()), fingerprint(values), 1e-2)
