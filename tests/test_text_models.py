"""transformers' text models in training and generation: what the attention preset knows, end to end."""

from __future__ import annotations

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lightning_uora import UORAConfig, attach_uora, detach_uora, named_adapters, param_groups
from tests import families
from tests.toys import callback, trainer

CAUSAL = ["GPT2", "GPTNeoX", "Bloom", "OPT", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "Mixtral"]
ENCODER = ["Bert", "Roberta", "Electra", "Deberta", "DebertaV2", "DistilBert", "Albert"]
SEQ2SEQ = ["T5", "Bart"]
IDS = torch.tensor([[5, 9, 7, 33, 21, 8], [4, 6, 30, 11, 17, 9]])
pytestmark = pytest.mark.filterwarnings("ignore")


def build(name: str, tie: bool = True) -> nn.Module:
    """A tiny random model with its task head, in eval mode, constant parameters given a spread."""
    options = {**families.TEXT, **families.SEQ2SEQ}[name]
    kind = {
        **dict.fromkeys(CAUSAL, AutoModelForCausalLM),
        **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
        **dict.fromkeys(ENCODER, AutoModelForSequenceClassification),
    }[name]
    special = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tie}
    if name in SEQ2SEQ:
        special["decoder_start_token_id"] = 0
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**options, **special})
    return families.wake(kind.from_config(config).eval())


def adapted(name: str, **options) -> nn.Module:
    """The same with adapters that do something."""
    model = build(name)
    attach_uora(model, UORAConfig(**{"rank": 4, "trainable_modules": (), **options}))
    generator = torch.Generator().manual_seed(1)
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.3, generator=generator)
    return model


def batch(name: str) -> dict[str, torch.Tensor]:
    labels = torch.tensor([0, 1]) if name in ENCODER else IDS
    return {"input_ids": IDS, "labels": labels}


def vector_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if "uora_" in name}


class Text(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(name)

    def training_step(self, batch, batch_index):
        loss = self.model(**batch).loss
        self.losses = [*getattr(self, "losses", ()), loss.item()]
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self, 1e-2, 0.1))


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER, *SEQ2SEQ])
def test_one_callback_trains_the_family(name: str):
    """The loss on one repeated batch falls, every vector moves, the base does not."""
    module = Text(name)
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    base = {n: p.clone() for n, p in module.named_parameters()}
    adapter = callback(target_modules="attention", trainable_modules=())
    trainer(adapter, max_epochs=1).fit(module, DataLoader([batch(name)] * 12, batch_size=None))
    assert module.losses[-1] < module.losses[0]
    for n, module_ in named_adapters(module):
        assert module_.uora_b.abs().max() > 0, n
        assert (module_.uora_d - 0.1).abs().max() > 0, n
    assert all(torch.equal(p, base[n]) for n, p in module.named_parameters() if n in base)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER, *SEQ2SEQ])
def test_gradient_checkpointing_changes_no_gradient(name: str):
    model = adapted(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has none for this family")
    model(**batch(name)).loss.backward()
    expected = vector_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for rate in ("attention_dropout", "dropout", "activation_dropout", "layerdrop", "dropout_prob"):
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    model(**batch(name), **({} if name in ENCODER else {"use_cache": False})).loss.backward()
    found = vector_gradients(model)
    assert all(g.abs().max() > 0 for g in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_reentrant_checkpointing_works_once_the_inputs_ask_for_gradients(name: str):
    """The frozen embedding's output needs a gradient, or the reentrant form cuts the graph (transformers)."""
    model = adapted(name)
    model(**batch(name)).loss.backward()
    expected = vector_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model(**batch(name), use_cache=False).loss.backward()
    for key, gradient in vector_gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padded_generation_equals_generation_one_by_one(name: str):
    """With a cache and without, adapted and merged."""
    model = adapted(name)
    short, long = [7, 33, 21], [4, 6, 30, 11, 17]
    padded = torch.tensor([[0, 0, *short], long])
    mask = (torch.tensor([[0, 0, 1, 1, 1], [1] * 5])).long()
    how = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    together = model.generate(input_ids=padded, attention_mask=mask, **how)[:, 5:]
    alone = [
        model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **how)[
            0, len(ids) :
        ]
        for ids in (short, long)
    ]
    assert torch.equal(together, torch.stack(alone))
    uncached = model.generate(input_ids=padded, attention_mask=mask, use_cache=False, **how)[:, 5:]
    assert torch.equal(together, uncached)
    detach_uora(model, merge=True)
    assert torch.equal(together, model.generate(input_ids=padded, attention_mask=mask, **how)[:, 5:])


@pytest.mark.parametrize("name", CAUSAL)
def test_adapters_change_what_is_generated_from(name: str):
    """Logits with a cache equal those without; and differ from the base's."""
    model, base = adapted(name), build(name)
    with torch.no_grad():
        full = model(input_ids=IDS).logits
        first = model(input_ids=IDS[:, :4], use_cache=True)
        rest = model(input_ids=IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(rest, full[:, 4:], atol=1e-4, rtol=1e-4)
        assert (full - base(input_ids=IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_generation_with_and_without_a_cache(name: str):
    model = adapted(name)
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    cached = model.generate(input_ids=IDS, attention_mask=mask, **how)
    assert torch.equal(cached, model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **how))
    detach_uora(model, merge=True)
    assert torch.equal(cached, model.generate(input_ids=IDS, attention_mask=mask, **how))


@pytest.mark.parametrize("name", ["GPT2", "Llama", "T5", "Bart"])
@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_tied_embeddings_stay_tied_and_untouched(name: str, target: str):
    model = build(name)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is output
    before = embedding.clone()
    names = attach_uora(model, UORAConfig(rank=4, target_modules=target, trainable_modules=()))
    assert not any("lm_head" in adapted_name for adapted_name in names)
    model.tie_weights()
    model(**batch(name)).loss.backward()
    assert all(g.abs().max() > 0 for key, g in vector_gradients(model).items() if key.endswith("uora_b"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    detach_uora(model, merge=True)
    assert torch.equal(model.get_output_embeddings().weight, before)


@pytest.mark.parametrize("name", ["GPT2", "Phi3", "Bloom", "GPTNeoX"])
def test_a_fused_projection_is_adapted_as_one(name: str):
    (fused,) = {n.rsplit(".", 1)[-1] for n, m in named_adapters(adapted(name)) if m.uora_b.numel() > 16}
    assert fused in ("c_attn", "qkv_proj", "query_key_value")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_grouped_query_attention_has_narrower_keys_and_values(name: str):
    sizes = {n.rsplit(".", 1)[-1]: m.uora_b.numel() for n, m in named_adapters(adapted(name))}
    assert sizes["k_proj"] == sizes["v_proj"] == sizes["q_proj"] // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama", "T5"])
def test_from_pretrained_in_half_precision_trains_float32_vectors(name: str, dtype, tmp_path):
    """At lr 1e-4 a bfloat16 vector would stay where it was: 0.1 has no neighbour that near."""
    build(name).save_pretrained(tmp_path)
    kind = type(build(name))
    half = {"dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype": dtype}
    model = kind.from_pretrained(tmp_path, **half)
    assert dtype in {p.dtype for p in model.parameters()}  # T5 keeps some of float16 in float32
    attach_uora(model, UORAConfig(rank=4, trainable_modules=()))
    base = kind.from_pretrained(tmp_path, **half).requires_grad_(False)
    with torch.no_grad():  # and frozen: only then are kernels sure to be the same
        assert torch.equal(model(**batch(name)).loss, base(**batch(name)).loss)
    for _, module in named_adapters(model):
        nn.init.normal_(module.uora_b, std=0.1, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(param_groups(model, 1e-4, 1e-4))
    model(**batch(name)).loss.backward()
    optimizer.step()
    for key, module in named_adapters(model):
        assert module.uora_d.dtype == module.uora_b.dtype == torch.float32
        moved = (module.uora_d.detach() - torch.tensor(0.1)).abs()
        assert 0 < moved.max() < 1.1e-4, key
