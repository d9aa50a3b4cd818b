"""What an adapter would cost, before anything is downloaded: a model, best on ``meta``, adapted, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from lightning_uora.adapters import (
    AdaptedAround,
    AdaptedExperts,
    AdaptedModule,
    active_experts,
    attach_uora,
    attachment_of,
    factored_flops,
    find_heads,
    merged_flops,
    named_adapters,
    trained_parameters,
)
from lightning_uora.config import UORAConfig, require_choice
from lightning_uora.reports.step_peak import saved_bytes

__all__ = ["Inspection", "LayerCost", "inspect_model"]

LORA_RANK = 8
FLOAT16, FLOAT32 = 2, 4
ADAMW = 16
"""Bytes that a trained float32 number takes: itself, its gradient, AdamW's two moments."""


# Note [What an adapter adds to a training step]
# Against the frozen model, by the counts of functional.py. Factored: the product A x is kept for backward.
# Merged: the effective weight and the layer's input are, which a frozen layer would not keep; where layers
# share an input (q, k and v) it is counted for each. A and B are counted once; under share="layer" each layer
# keeps the rows that it refreshed, which is given beside, for the share of rows that the default schedule
# refreshed in runs here. Of a quantised base adapters are factored; its linear layers but heads and output
# embeddings take what bitsandbytes takes: 4 bits and a scale (double: of 8 bits) for 64 numbers, or 8 bits
# and a scale for each row. Of experts those count that one token sees; quantisers leave them as they are.

# Note [Peak of a step]
# The base, A and B, what trains with its gradient and AdamW's moments, what is kept for backward (see
# Note [Saved without numbers]), and the room that products take: three times the largest weight in the dtype
# that it computes in (five times where it is dequantised first), and of the adapter's largest layer two
# (m, r) products in float32 and one in that dtype. That room is what `benchmarks/memory.py` showed on a CPU:
# by it the peaks on two layers of an 8B come out within 10 % at ranks 256 and 1024 (bfloat16 -4 and -9 %, nf4
# -3 and +4 %). A whole 1B comes out 15 % (bfloat16) and 30 % (nf4) too low, a Mixtral block 32 %: not
# explained.

OWN_SHARE = 0.14
"""Of a layer's rows that four default refreshes turn: 12, 15 and 14 % on the digits, docstrings and manual of
``benchmarks/one_line.py`` at rank 64 (seed 0, 1e-3, constant)."""
QUANTISED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0}
"""Bytes of a number, scales included."""


@dataclass(frozen=True)
class LayerCost:
    """One adapted module at a number of tokens: sizes, the form it takes and what that adds to a step."""

    name: str
    kind: str
    m: int
    n: int
    form: str
    adapter_params: int
    lora_params: int
    extra_flops_per_token: float
    frozen_flops_per_token: int
    activation_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found. Bytes are for training with AdamW; A and B have the model's dtype."""

    model: str
    rank: int
    tokens: int
    base_params: int
    head_params: int
    layers: tuple[LayerCost, ...]
    projection_bytes: int
    own_projection_bytes: int
    vera_projection_bytes: int
    stored_projection_bytes: int
    base_bytes: int
    quantize: str | None = None
    peak_bytes: int | None = None

    @property
    def adapter_params(self) -> int:
        """Trained numbers in d and b; PEFT's VeRA of the same rank trains as many."""
        return sum(layer.adapter_params for layer in self.layers)

    def totals(self) -> dict[str, Any]:
        """Sums over the layers, see Note [What an adapter adds to a training step]."""
        lora = sum(layer.lora_params for layer in self.layers)
        frozen = sum(layer.frozen_flops_per_token for layer in self.layers)
        extra = sum(layer.extra_flops_per_token for layer in self.layers)
        return {
            "base_params": self.base_params,
            "base_bytes": self.base_bytes,
            "peak_bytes": self.peak_bytes,
            "head_params": self.head_params,
            "adapter_params": self.adapter_params,
            "vera_params": self.adapter_params,
            "lora_r8_params": lora,
            "adapter_bytes": FLOAT32 * self.adapter_params + self.stored_projection_bytes,
            "vera_bytes": FLOAT32 * self.adapter_params + self.vera_projection_bytes,
            "lora_r8_bytes": FLOAT32 * lora,
            "projection_bytes": self.projection_bytes,
            "own_projection_bytes": self.own_projection_bytes,
            "training_state_bytes": ADAMW * self.adapter_params,
            "activation_bytes": sum(layer.activation_bytes for layer in self.layers),
            "extra_flops_per_token": extra,
            "extra_flops_fraction": extra / frozen,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {
            "version": 1,
            "model": self.model,
            "quantize": self.quantize,
            "rank": self.rank,
            "tokens": self.tokens,
            "totals": self.totals(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def table(self) -> Table:
        """A rich table: layers of one shape in one line, then the totals."""
        title = f"{self.model}, rank {self.rank}, {self.tokens:,} tokens per step"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
        table.add_column("layers", no_wrap=True)
        for column in ("number", "m x n", "form", "trainable", "LoRA r 8", "FLOPs/token"):
            table.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
        for (pattern, m, n, form), layers in self._by_pattern().items():
            table.add_row(pattern, f"{len(layers):,}", f"{m} x {n}", form, *_sums(layers))
        table.add_section()
        table.add_row("all", f"{len(self.layers):,}", "", "", *_sums(self.layers))
        return table

    def lines(self) -> Iterator[str]:
        """What the table does not say, a sentence each."""
        t = self.totals()
        yield (
            f"trainable: {t['adapter_params']:,} ({t['adapter_params'] / self.base_params:.4%} of "
            f"{self.base_params:,}), heads {self.head_params:,}; LoRA r 8 {t['lora_r8_params']:,} "
            f"({t['lora_r8_params'] / t['adapter_params']:.0f} x); VeRA r {self.rank} {t['vera_params']:,}"
        )
        yield (
            f"adapter on disk: {_bytes(t['adapter_bytes'])}; LoRA r 8 {_bytes(t['lora_r8_bytes'])}; VeRA "
            f"with its projections {_bytes(t['vera_bytes'])}"
        )
        yield (
            f"extra memory in training: A and B {_bytes(t['projection_bytes'])} (after the default "
            f"refreshes about {_bytes(t['own_projection_bytes'])} more), vectors with AdamW "
            f"{_bytes(t['training_state_bytes'])}, kept for backward {_bytes(t['activation_bytes'])}"
        )
        how = f", linear layers in {self.quantize} except heads and experts" if self.quantize else ""
        yield f"the frozen base: {_bytes(t['base_bytes'])}{how}"
        if self.peak_bytes is not None:
            yield f"peak memory of a training step: about {_bytes(self.peak_bytes)}, without checkpointing"
        else:
            yield "peak memory of a training step: unknown, this model does not run without its weights"
        yield f"extra FLOPs: +{t['extra_flops_fraction']:.1%} over these layers when frozen"

    def _by_pattern(self) -> dict[tuple[str, int, int, str], list[LayerCost]]:
        """Layers of one place in every block: their name with ``*`` for the numbers, sizes and form."""
        groups: dict[tuple[str, int, int, str], list[LayerCost]] = {}
        for layer in self.layers:
            pattern = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            groups.setdefault((pattern or "(root)", layer.m, layer.n, layer.form), []).append(layer)
        return groups


def inspect_model(
    model: nn.Module,
    config: UORAConfig,
    tokens: int = 2048,
    name: str = "",
    quantize: str | None = None,
) -> Inspection:
    """Adapt ``model`` and count what the adapter costs. The model stays adapted; give it on ``meta``.

    Args:
        model: Any module, best made under ``torch.device("meta")``: only shapes are looked at.
        config: What to adapt and how.
        tokens: Rows that each layer sees in a training step (batch x sequence length; of a convolution,
            batch x output positions).
        name: What to call the model in the report.
        quantize: Count the base as quantised: ``"nf4"``, ``"fp4"``, ``"nf4-double"`` or ``"int8"``.

    Raises:
        ValueError: ``tokens`` is below 1, ``quantize`` is another word, or as
            :func:`~lightning_uora.attach_uora`.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1.")
    if quantize is not None:
        require_choice("quantize", quantize, tuple(QUANTISED))
        config = replace(config, compute="factored")
    base_params = sum(p.numel() for p in model.parameters())
    packed = {id(p) for p in _linear_weights(model)} if quantize else set()
    base_bytes = sum(
        round(p.numel() * (QUANTISED[quantize] if quantize and id(p) in packed else p.element_size()))
        for p in model.parameters()
    )
    attach_uora(model, config)
    adapters = dict(named_adapters(model))
    layers = tuple(_cost(layer_name, module, tokens) for layer_name, module in adapters.items())
    buffers = attachment_of(model, "inspection").owner.named_buffers()
    sizes = {buffer_name: b.numel() * b.element_size() for buffer_name, b in buffers}
    parts = [part for module in adapters.values() for part in module.adapted_parts]
    own = [f"B_{layer.m}" for layer in layers]
    own += [f"A_{n}" for module in adapters.values() for n in {part.n for part in module.adapted_parts}]
    given = (
        {n: None for n in own if n[0] == "A"} if config.share == "model" else [n for n in own if n[0] == "A"]
    )
    stored = sum(FLOAT16 * config.rank * int(n.split("_")[1]) for n in given)
    largest = max(part.n for part in parts) + max(layer.m for layer in layers)
    trained = sum(p.numel() for p in trained_parameters(model).values())
    saved = saved_bytes(model, tokens) if all(p.is_meta for p in model.parameters()) else None
    fixed = base_bytes + sum(sizes.values()) + ADAMW * trained
    peak = None if saved is None else fixed + saved + _room(adapters.values(), config.rank, quantize)
    return Inspection(
        model=name or type(model).__name__,
        rank=config.rank,
        tokens=tokens,
        base_params=base_params,
        head_params=trained - sum(layer.adapter_params for layer in layers),
        layers=layers,
        projection_bytes=sum(sizes.values()),
        own_projection_bytes=round(OWN_SHARE * sum(sizes[name] for name in own))
        if config.share == "layer"
        else 0,
        vera_projection_bytes=FLOAT32 * config.rank * largest,
        stored_projection_bytes=stored if config.init == "inputs" else 0,
        base_bytes=base_bytes,
        quantize=quantize,
        peak_bytes=peak,
    )


def _room(layers: Iterable[AdaptedModule], rank: int, quantize: str | None) -> int:
    """What products take besides, see Note [Peak of a step]."""
    largest = max(
        (_width_of(layer) * part.m * part.n, part.m) for layer in layers for part in layer.adapted_parts
    )
    weight, m = largest
    return (5 if quantize else 3) * weight + rank * m * (2 * FLOAT32 + FLOAT16)


def _linear_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that quantisers take: of linear layers, not of heads nor of what is tied to an embedding."""
    heads = tuple(f"{name}." for name in find_heads(model))
    kept = {id(m._parameters["weight"]) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        outside = module is output or f"{name}.".startswith(heads)
        if isinstance(module, nn.Linear) and weight is not None and not outside and id(weight) not in kept:
            yield weight


def _cost(name: str, module: AdaptedModule, tokens: int) -> LayerCost:
    """See Note [What an adapter adds to a training step]."""
    rank, form, parts = module.uora_d.shape[-1], module.form(tokens), module.adapted_parts
    flops = factored_flops if form == "factored" else merged_flops
    experts = isinstance(module, AdaptedExperts)
    active, all_of_them = (active_experts(module), len(module.uora_d)) if experts else (1, 1)
    rows = tokens * active
    extra = sum(flops(rows, part.m, part.n, rank) for part in parts)
    size = module.uora_d.element_size() if isinstance(module, AdaptedAround) else _width_of(module)
    kept = sum(
        rows * rank if form == "factored" else all_of_them * part.m * part.n + rows * part.n for part in parts
    )
    return LayerCost(
        name=name,
        kind=module.original_class.__name__,
        m=sum(part.m for part in parts),
        n=parts[0].n,
        form=form,
        adapter_params=module.uora_d.numel() + module.uora_b.numel(),
        lora_params=all_of_them * sum(LORA_RANK * (part.m + part.n) for part in parts),
        extra_flops_per_token=extra / tokens,
        frozen_flops_per_token=active * sum(4 * part.m * part.n for part in parts),
        activation_bytes=size * kept,
    )


def _width_of(module: AdaptedModule) -> int:
    """Bytes of one number of the weight."""
    weights = (module.home._parameters[part.name] for part in module.adapted_parts)
    return max(W.element_size() for W in weights if W is not None)


def _sums(layers: Sequence[LayerCost]) -> tuple[str, str, str]:
    return (
        f"{sum(layer.adapter_params for layer in layers):,}",
        _short(sum(layer.lora_params for layer in layers)),
        f"+{_short(sum(layer.extra_flops_per_token for layer in layers))}",
    )


def _short(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000 or unit == "T":
            return f"{count:.0f}" if not unit else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _bytes(count: float) -> str:
    return f"{_short(count)}B" if count >= 1000 else f"{count:.0f} B"
