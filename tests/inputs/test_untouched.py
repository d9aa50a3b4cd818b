"""Looking at a model or at a loader leaves no trace."""

from __future__ import annotations

import random
from collections import deque

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchmetrics.aggregation import CatMetric, MeanMetric

from lightning_uora.inputs.untouched import unchanged
from lightning_uora.trainer.loaders import twin


class Busy(nn.Module):
    """Changes whatever a forward may change, except parameters."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.mean, self.cat = MeanMetric(), CatMetric()
        self.seen, self.last = [], None
        self.count, self.names, self.queue = {"calls": 0}, {"a"}, deque([1.0])
        self.plain = torch.zeros(2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.norm(x)
        self.mean(y.mean())
        self.cat(y[0])
        self.seen.append(y)
        self.last = y
        self.count["calls"] += 1
        self.names.add("b")
        self.queue.append(float(torch.rand(())) + random.random() + numpy.random.rand())
        self.plain += 1
        self.steps += 1
        self.new = y
        return y


def facts(model: Busy):
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    own = (list(model.seen), model.last, dict(model.count), set(model.names), list(model.queue))
    metrics = (
        model.mean.update_count,
        model.cat.update_count,
        len(model.cat.value),
        model.mean.mean_value.item(),
    )
    flags = [module.training for module in model.modules()]
    states = (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist())
    return buffers, own, metrics, flags, model.plain.tolist(), sorted(model.__dict__), states


@pytest.mark.parametrize("fails", [False, True])
def test_everything_a_forward_moves_is_put_back(fails: bool):
    model = Busy()
    model.norm.eval()
    model(torch.randn(4, 3))
    del model.new
    before, plain = facts(model), model.plain
    seen = []
    try:
        with unchanged(model):
            assert not any(module.training for module in model.modules())
            for _ in range(2):
                model.norm.train()(torch.randn(4, 3))
                seen.append(model(torch.randn(4, 3)))
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = facts(model)
    assert all(torch.equal(b, after[0][name]) for name, b in before[0].items())
    assert after[1:] == before[1:]
    assert model.plain is plain
    assert len(seen) == 2


def test_a_module_may_be_left_out():
    model = Busy()
    with unchanged(model, but=model):
        model(torch.randn(4, 3))
    assert len(model.seen) == 1
    assert model.norm.num_batches_tracked == 0


def numbers() -> TensorDataset:
    return TensorDataset(torch.arange(12.0))


class Counting(IterableDataset):
    """Where it is, is its state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 12:
            self.at += 1
            yield torch.tensor(float(self.at))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "in order": lambda: DataLoader(numbers(), 4),
    "shuffled": lambda: DataLoader(numbers(), 4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(numbers(), 4, shuffle=True, generator=seeded()),
    "a sampler with a generator": lambda: DataLoader(
        numbers(), 4, sampler=RandomSampler(numbers(), generator=seeded())
    ),
    "iterable": lambda: DataLoader(Counting(), 4),
    "workers": lambda: DataLoader(
        numbers(), 4, shuffle=True, generator=seeded(), num_workers=1, persistent_workers=True
    ),
    "a list": lambda: [[torch.ones(4)], [torch.zeros(4)]],
    "an iterator": lambda: iter([[torch.ones(4)], [torch.zeros(4)]]),
}


def batches(loader) -> list[torch.Tensor]:
    return [batch[0] if isinstance(batch, list) else batch for batch in loader]


@pytest.mark.parametrize("kind", LOADERS)
def test_after_its_twin_a_loader_gives_the_batches_it_would_have_given(kind: str):
    torch.manual_seed(5)
    expected = batches(LOADERS[kind]())
    torch.manual_seed(5)
    loader = LOADERS[kind]()
    with unchanged(nn.Linear(1, 1)):
        looked = [batch for batch, _ in zip(batches(twin(loader)), range(2), strict=False)]
    torch.manual_seed(5)
    assert len(looked) == 2
    found = batches(loader)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_twin_shares_the_data():
    loader = DataLoader(numbers(), 4, shuffle=True)
    other = twin(loader)
    assert other.dataset is loader.dataset
    assert other.sampler.data_source is loader.dataset
    assert other.sampler is not loader.sampler


def test_what_iterating_uses_up_is_refused_with_advice():
    with pytest.raises(
        ValueError, match=r"would use up the training data .*call calibrate\(module, batches\) with"
    ):
        twin(x for x in range(3))


def test_a_twin_and_its_sampler_draw_from_one_generator():
    other = twin(DataLoader(numbers(), 4, shuffle=True, generator=seeded()))
    assert other.generator is other.sampler.generator
