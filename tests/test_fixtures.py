"""What version 0.1.0 wrote still loads, with the outputs that were stored beside it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lightning_uora import UORACallback, load_adapter, load_from_checkpoint
from tests.fixtures.model import FOLDER, SAVED_AT, STEPS, Module, base, batches
from tests.fixtures.write import SCHEDULE, SETTINGS

EXPECTED = load_file(FOLDER / "expected.safetensors")


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["record", "shared", "inputs"])
def test_adapter_folders_load(name: str):
    model = base()
    adapted = load_adapter(model, FOLDER / name)
    assert adapted == ["conv", "attention", "attention.out_proj", "wide", "narrow"]
    with torch.no_grad():
        close(model.eval()(EXPECTED["x"]), EXPECTED[name])
        assert (model(EXPECTED["x"]) - base().eval()(EXPECTED["x"])).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_checkpoints_load_without_a_trainer(kind: str):
    module = load_from_checkpoint(Module, FOLDER / f"{kind}.ckpt")
    with torch.no_grad():
        close(module.eval()(EXPECTED["x"]), EXPECTED[f"{kind}-saved"])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_checkpoints_resume_to_the_same_end(kind: str):
    """With a refresh after the step at which they were written."""
    settings = {**SETTINGS, "batch_norm": "moving"}  # as it was then
    module, callback = Module(), UORACallback(**settings, reinit=SCHEDULE, checkpoint=kind)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=[callback], enable_checkpointing=False, **options
    )
    with pytest.warns(UserWarning, match=r"In the checkpoint's run AdamW had no group for the vectors"):
        trainer.fit(module, batches(), ckpt_path=FOLDER / f"{kind}.ckpt")
    assert [entry["step"] for entry in callback.refreshes] == [2, 4, 6, 8]
    assert SAVED_AT == 7
    with torch.no_grad():
        close(module.eval()(EXPECTED["x"]), EXPECTED[f"{kind}-end"])


@pytest.mark.filterwarnings("ignore")
def test_a_resume_says_that_batch_norm_moved_in_that_run():
    callback = UORACallback(**SETTINGS, reinit=SCHEDULE)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "enable_checkpointing": False}
    run = Trainer(max_steps=STEPS, callbacks=[callback], **options)
    with pytest.warns(UserWarning, match=r"before batch_norm.*'model.norm'.*batch_norm='moving'"):
        run.fit(Module(), batches(), ckpt_path=FOLDER / "full.ckpt")
