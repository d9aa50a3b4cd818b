"""Every precision of the Trainer that a CPU has: vectors are float32 and move, both forms agree."""

from __future__ import annotations

import pytest
import torch

from lightning_uora import UORAConfig, attach_uora, named_adapters
from tests.toys import Toy, callback, data, trainer

PRECISIONS = {
    "32-true": 1e-5,
    "64-true": 1e-5,  # the vectors stay float32
    "bf16-mixed": 5e-2,
    "bf16-true": 5e-2,
    "16-true": 5e-3,
}
RUNS = list(PRECISIONS)


class Slow(Toy):
    """At a rate that bfloat16 vectors would not feel: 0.1 has no bfloat16 neighbour within 1e-4."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)


@pytest.mark.filterwarnings("ignore:AdamW trains the vectors at lr=0.0001", "ignore:The adapters")
@pytest.mark.parametrize("precision", RUNS)
def test_vectors_move_at_a_small_rate(precision: str):
    """Both vectors: d from the second step on, when b has left zero."""
    torch.manual_seed(0)
    model = Slow()
    trainer(callback(trainable_modules=()), precision=precision).fit(model, data(32))
    for name, module in named_adapters(model):
        assert module.uora_d.dtype == module.uora_b.dtype == torch.float32
        assert 0 < (module.uora_d.detach() - torch.tensor(0.1)).abs().max() < 2e-3, name
        assert 0 < module.uora_b.abs().max() < 2e-3, name


@pytest.mark.filterwarnings("ignore:weight_decay=0.01 pulls the vectors")
@pytest.mark.parametrize("precision", RUNS)
def test_merged_output_equals_factored_output_within_the_precision(precision: str):
    """In training mode with gradients, under the precision plugin's own forward context."""
    outputs = []
    for compute in ("merged", "factored"):
        torch.manual_seed(0)
        model, run = (
            Toy(),
            trainer(callback(compute=compute, trainable_modules=()), precision=precision, max_epochs=1),
        )
        run.fit(model, data())
        for seed, (_, module) in enumerate(named_adapters(model)):
            torch.nn.init.normal_(module.uora_b, std=0.5, generator=torch.Generator().manual_seed(seed))
            torch.nn.init.constant_(module.uora_d, 0.7)
        plugin = run.precision_plugin
        x = plugin.convert_input(torch.randn(9, 6, generator=torch.Generator().manual_seed(5)))
        with plugin.forward_context():
            outputs.append(model.train()(x).float())
    scale = outputs[0].abs().max()
    assert scale > 0.1
    assert (outputs[0] - outputs[1]).abs().max() <= PRECISIONS[precision] * scale


def test_mixed_half_precision_is_bfloat16_on_a_cpu():
    """Lightning says so in a warning; the adapters train."""
    model = Toy()
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        run = trainer(callback(), precision="16-mixed")
    run.fit(model, data())
    assert all(module.uora_b.abs().max() > 0 for _, module in named_adapters(model))


def test_a_cast_of_the_whole_model_leaves_the_vectors_alone():
    model = Toy()
    attach_uora(model, UORAConfig(rank=4, target_modules="all-linear"))
    model.to(torch.float16).to(torch.bfloat16).double().half()
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["uora_d"] == kinds["uora_b"] == torch.float32
    assert kinds["weight"] == torch.float16
