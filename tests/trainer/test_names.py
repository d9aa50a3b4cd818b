"""``UORACallback(adapter_name=...)``: one more task on a module that has adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_uora import (
    UORACallback,
    adapter_names,
    load_adapter,
    named_adapters,
    save_adapter,
    set_adapter,
    use_adapters,
)


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        names, x = batch
        with use_adapters(self, list(names)):
            return self(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


X = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))


def data(seed: int) -> DataLoader:
    y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(X, y), batch_size=4)


def fit(module: Task, seed: int, tmp_path: Any, **options: Any) -> Trainer:
    callback = UORACallback(
        rank=4, target_modules=["body.0", "body.2"], reinit=None, vector_lr=0.05, **options
    )
    trainer = Trainer(
        max_epochs=2,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    trainer.fit(module, data(seed))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_second_task_gets_an_adapter_of_its_own_and_the_first_is_as_it_was(tmp_path):
    module = Task()
    fit(module, 1, tmp_path)
    first = module(X).detach()
    fit(module, 2, tmp_path, adapter_name="second")
    second = module(X).detach()
    assert adapter_names(module) == ["default", "second"]
    assert not torch.equal(first, second)
    set_adapter(module, "default")
    assert torch.equal(module(X), first)
    fit(module, 3, tmp_path, adapter_name="second")
    set_adapter(module, "default")
    assert torch.equal(module(X), first)
    alone = Task()
    fit(alone, 1, tmp_path)
    fit(alone, 4, tmp_path)
    assert adapter_names(alone) == ["default"]


@pytest.mark.filterwarnings("ignore")
def test_a_loaded_adapter_is_the_one_that_trains_on(tmp_path):
    module = Task()
    fit(module, 1, tmp_path, adapter_name="mine")
    save_adapter(module, tmp_path / "adapter")
    other = Task()
    load_adapter(other, tmp_path / "adapter", name="theirs")
    before = [m.uora_b.detach().clone() for _, m in named_adapters(other)]
    fit(other, 2, tmp_path)
    assert adapter_names(other) == ["theirs"]
    after = [m.uora_b for _, m in named_adapters(other)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Named(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> tuple[str, Tensor]:
        return ("default", "second")[place % 2], X[place]


@pytest.mark.filterwarnings("ignore")
def test_a_prediction_takes_names_from_its_batches(tmp_path):
    module = Task()
    fit(module, 1, tmp_path)
    trainer = fit(module, 2, tmp_path, adapter_name="second")
    found = torch.cat(trainer.predict(module, DataLoader(Named(), batch_size=4)))
    second = module(X).detach()
    set_adapter(module, "default")
    first = module(X).detach()
    torch.testing.assert_close(found[::2], first[::2])
    torch.testing.assert_close(found[1::2], second[1::2])


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_a_name_that_cannot_be_is_refused_when_the_callback_is_made(name):
    with pytest.raises(ValueError, match="an adapter's name must not be empty or contain a dot"):
        UORACallback(adapter_name=name)
