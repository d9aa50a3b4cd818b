"""Shared settings: small models, two threads, no network."""

from __future__ import annotations

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _own_random_state():
    """Every test starts from the same global state and leaves none behind."""
    torch.manual_seed(0)
    yield
    torch.manual_seed(0)
