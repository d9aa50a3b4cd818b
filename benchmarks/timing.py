"""What ``step_time.py`` measures with: model shapes, methods, interleaved steps, saved bytes, peak memory."""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from lightning_uora import UORAConfig, attach_uora

METHODS = ("floor", "uora", "uora merged", "uora factored", "peft vera", "peft lora r 8", "full")


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        build: Makes it with so many layers.
        layers: How many it has as published.
        length: Tokens of one example.
        targets: Leaves of the names of the adapted modules.
        floor: Name of the one small parameter that trains in every method, early enough for a backward
            through every block.
        vocabulary: Of token ids; 0 for images.
    """

    build: Callable[[int], nn.Module]
    layers: int
    length: int
    targets: tuple[str, ...]
    floor: str
    vocabulary: int = 0

    def batch(self, size: int) -> Tensor:
        """Random inputs."""
        if self.vocabulary:
            return torch.randint(self.vocabulary, (size, self.length))
        return torch.randn(size, 3, 224, 224)


def _vit(name: str) -> Shape:
    def build(layers: int) -> nn.Module:
        return timm.create_model(f"vit_{name}_patch16_224", num_classes=10, depth=layers)

    return Shape(build, 12, 197, ("qkv",), "cls_token")


def _bert(layers: int) -> nn.Module:
    return BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000))


def _gpt2(layers: int) -> nn.Module:
    return GPT2Model(GPT2Config(n_layer=layers, vocab_size=1000))


def _roberta_large(layers: int) -> nn.Module:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    return RobertaModel(RobertaConfig(num_hidden_layers=layers, vocab_size=1000, **sizes))


def _llama(hidden: int, inner: int, heads: int, groups: int) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
        config = LlamaConfig(
            **sizes, num_key_value_heads=groups, num_hidden_layers=layers, vocab_size=1000, use_cache=False
        )
        return LlamaModel(config)

    return build


LLAMA = (("q_proj", "v_proj"), "layers.0.input_layernorm.weight", 1000)
SHAPES = {
    "ViT-tiny": _vit("tiny"),
    "ViT-small": _vit("small"),
    "ViT-base": _vit("base"),
    "BERT": Shape(_bert, 12, 128, ("query", "value"), "embeddings.LayerNorm.bias", 1000),
    "GPT-2": Shape(_gpt2, 12, 128, ("c_attn",), "wpe.weight", 1000),
    "RoBERTa-large": Shape(_roberta_large, 24, 256, ("query", "value"), "embeddings.LayerNorm.bias", 1000),
    "Llama 1B": Shape(_llama(2048, 8192, 32, 8), 16, 1024, *LLAMA),
    "Llama 8B": Shape(_llama(4096, 14336, 32, 8), 32, 1024, *LLAMA),
}


def build(shape: Shape, base: nn.Module, method: str, rank: int) -> nn.Module:
    """A copy of ``base`` made trainable by one of ``METHODS``."""
    model = copy.deepcopy(base)
    model.requires_grad_(method == "full")
    small = model.get_parameter(shape.floor)
    if method.startswith("uora"):
        how = method.removeprefix("uora").strip() or "auto"
        attach_uora(model, UORAConfig(rank, list(shape.targets), trainable_modules=(), compute=how))
    elif method.startswith("peft"):
        transposed = isinstance(model, GPT2Model)
        kind: dict[str, Any] = {"target_modules": list(shape.targets), "fan_in_fan_out": transposed}
        config = peft.VeraConfig(r=rank, **kind) if "vera" in method else peft.LoraConfig(r=8, **kind)
        model = peft.get_peft_model(model, config)
    small.requires_grad_(True)
    return model.train()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A scalar of everything that the model gives out."""
    out = model(x)
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    return out.float().square().mean()


@dataclass(frozen=True)
class Reading:
    """Of one method: median seconds, ratio to the floor of the same round with quartiles, and memory."""

    seconds: float
    ratio: float
    low: float
    high: float
    saved: int
    peak: int
    trained: int


def interleaved(
    models: dict[str, nn.Module],
    x: Tensor,
    budget: float,
    autocast: bool = False,
    compiled: bool = False,
) -> dict[str, Reading]:
    """Training steps of every model in turn, five to twenty-five rounds, about ``budget`` seconds."""
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in models.items()
    }
    run = {name: torch.compile(model) if compiled else model for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}

    def step(name: str) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(run[name], x)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    started = now(x)
    for name in models:
        step(name)
    once, turn = now(x) - started, 0
    rounds = max(5, min(25, int(budget / once)))
    while turn < rounds:
        for name in models:
            start = now(x)
            step(name)
            times[name].append(now(x) - start)
        turn += 1
    readings = {}
    for name, model in models.items():
        ratios = [a / b for a, b in zip(times[name], times["floor"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        peak = peak_of(lambda name=name: step(name), x)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds, ratio = statistics.median(times[name]), statistics.median(ratios)
        readings[name] = Reading(seconds, ratio, low, high, saved_bytes(model, x, autocast), peak, trained)
    return readings


def now(x: Tensor) -> float:
    """Seconds, once the device of ``x`` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(model: nn.Module, x: Tensor, autocast: bool = False) -> int:
    """Bytes that one forward keeps for backward, without what the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in own:
            seen[pointer] = t.untyped_storage().nbytes()
        return t.detach()  # an output that its own graph held would never be freed

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
    ):
        loss = loss_of(model, x)
        total = sum(seen.values())
    del loss
    return total


def peak_of(work: Callable[[], None], x: Tensor) -> int:
    """Bytes by which memory grows at most during ``work``; on a CPU from Linux's own record, else -1."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else work would grow into what the heap has kept
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return -1


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
