"""Small causal language models, pretrained on the spot on half of the standard library's functions.

The stand-in for GPT-2 and Llama where no weights can be downloaded. Pretraining takes a minute or two and is
kept in the output folder, as a folder that ``from_pretrained`` reads.
"""

from __future__ import annotations

import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
from bundled import BadInputError, Documented, documented
from compare import quiet_trainer
from lightning.pytorch import LightningModule, seed_everything
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_uora import param_groups

LENGTH = 128
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def functions(held_out: bool) -> list[Documented]:
    """Documented functions with arguments: the half for pretraining, or the other half for adapting."""
    found = [entry for entry in documented() if entry.arguments and len(entry.arguments) <= 6]
    return [e for e in found if (zlib.crc32(f"{e.module}.{e.name}".encode()) % 2 == 1) is held_out]


def signature(entry: Documented) -> str:
    """``shutil.copyfile(src, dst, follow_symlinks=True)``."""
    arguments = (name if default is None else f"{name}={default}" for name, default in entry.arguments or ())
    return f"{entry.module}.{entry.name}({', '.join(arguments)})"


class LanguageModel(LightningModule):
    """A causal language model on batches with labels; UORA's vectors have a learning rate of their own."""

    def __init__(self, model: nn.Module, lr: float = 1e-3, vector_lr: float = 3e-2) -> None:
        super().__init__()
        self.model, self.lr, self.vector_lr = model, lr, vector_lr

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Without a cache: with one, transformers does not keep packed texts apart."""
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        answered = int((batch["labels"][:, 1:] != -100).sum())
        self.log("held_out_loss", self.loss(batch), batch_size=answered)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(param_groups(self, self.lr, self.vector_lr))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load(
    name: str, small: str | None, folder: Path, epochs: int, four_bits: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal model of the hub with its tokenizer, or a small ``"gpt2"``, ``"llama"`` or ``"mixtral"``.

    With ``four_bits`` its linear layers are packed to nf4 as they are loaded.

    Raises:
        BadInputError: The tokenizer has no token to pad or to end with; bitsandbytes is missing.
    """
    if small is not None:
        name = str(folder / f"pretrained-{small}-{epochs}")
        if not Path(name, "config.json").exists():
            _pretrain(small, epochs, name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token is None:
        raise BadInputError(f"the tokenizer of {name!r} has no end-of-sequence token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    more = {"quantization_config": _nf4()} if four_bits else {}
    return AutoModelForCausalLM.from_pretrained(name, **more), tokenizer


def _nf4() -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise BadInputError("--load-4bit needs bitsandbytes: pip install 'lightning-uora[quantized]'")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)


def _pretrain(kind: str, epochs: int, folder: str) -> None:
    """Train a tokenizer and a model of half a million parameters on signatures and docstrings."""
    seed_everything(0, verbose=False)
    texts = [f"{signature(e)}\n{e.doc}" for e in documented() if not e.arguments]
    texts += [f"{signature(e)}\n{e.doc}" for e in functions(held_out=False)] * 2
    tokenizer = _tokenizer(texts)
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    size, special = len(tokenizer), {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=size, n_positions=256, n_embd=128, n_layer=4, n_head=4, **special)
    else:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": size}
        if kind == "llama":
            config = LlamaConfig(**sizes, **special)
        else:
            sizes["intermediate_size"] = 128
            config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, **special)
    module = LanguageModel(AutoModelForCausalLM.from_config(config), lr=3e-3)
    print(f"pretraining a small {kind} on {len(ids):,} tokens, once; kept in {folder}")
    batches = DataLoader(
        TensorDataset(rows),
        16,
        shuffle=True,
        collate_fn=lambda rows: dict.fromkeys(("input_ids", "labels"), torch.stack([r for (r,) in rows])),
    )
    quiet_trainer(epochs).fit(module, batches)
    module.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, 2000, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        padding_side="left",
        chat_template=CHAT,
        model_input_names=["input_ids", "attention_mask"],
    )
