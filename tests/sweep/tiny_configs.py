"""transformers: configurations made small by what their fields are called, in several degrees.

No degree fits all: a ratio of widths survives division, a rotary section does not. So there are recipes,
tried in order until one gives a model that runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

LAYERS = re.compile(r"^(?!num_feat_extract)(\w+_)?(layers|layer|depth|blocks|n_layers?)$")
DEPTHS = re.compile(r"^(\w+_)?(depths|layers|num_blocks|blocks)$")
WIDTH = re.compile(
    r"(size|sizes|dim|dims|rank|d_model|d_kv|d_ff|n_embd|n_inner|d_inner|channels|width|widths)$"
)
NO_WIDTH = re.compile(
    r"image|patch|vocab|window|position|max|chunk|block|kernel|codebook|bucket|num_channels|in_channels"
    r"|batch|type|stride|audio_channels|input_size|pool|memory"
)
EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)$")
PER_TOKEN = re.compile(r"^(num_experts_per_tok|top_k|moe_top_k|moe_k|num_experts_per_token)$")
GROUPS = re.compile(r"^(n_group|topk_group|num_expert_group)$")
TOKEN = re.compile(r"(_token_id|_token_index|_idx|_token_ids)$")
NARROW = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embed_dim": 64,
    "hidden_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_ff": 96,
    "d_kv": 16,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "projection_dim": 64,
    "embedding_size": 64,
    "moe_intermediate_size": 32,
}
VOCABULARY = 160
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
BACKBONE = {"backbone_config": RESNET}
SERIES = {"prediction_length": 4, "context_length": 16}
REQUIRED: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "dab-detr": BACKBONE,
    "conditional_detr": BACKBONE,
    "deformable_detr": BACKBONE,
    "detr": BACKBONE,
    "table-transformer": BACKBONE,
    "esm": {"vocab_size": 33},
}
"""What a type cannot be built or run without."""
COEFFICIENTS = {"width_coefficient": 0.5, "depth_coefficient": 0.3}


@dataclass
class Recipe:
    """How far each kind of field is taken down."""

    name: str
    divide: int = 1
    narrow: bool = False
    layers: int | None = 2
    images: bool = True
    tokens: dict[int, int] = field(default_factory=dict)


def recipes() -> list[Recipe]:
    return [
        Recipe("eighth", divide=8),
        Recipe("narrow", narrow=True),
        Recipe("quarter", divide=4),
        Recipe("shallow"),
        Recipe("shallow, whole images", images=False),
        Recipe("eighth, all layers", divide=8, layers=None, images=False),
        Recipe("default", layers=None, images=False),
    ]


def shrink(config: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    """A new configuration of the same class; parts are shrunk alike."""
    changed: dict[str, Any] = {}
    count = layer_count(config)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            changed[name] = shrink(value, recipe)
        elif not name.startswith("_") and not isinstance(value, bool):
            new = smaller(name, value, config, recipe, count)
            if new is not value and new != value:
                changed[name] = new
    return type(config)(**{**changed, **REQUIRED.get(config.model_type, {})})


def layer_count(config: PretrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        value = vars(config).get(name)
        if isinstance(value, int):
            return value
    return None


def smaller(name: str, value: Any, config: PretrainedConfig, recipe: Recipe, count: int | None) -> Any:
    """The new value of one field; the old one where nothing is to be done."""
    if name in COEFFICIENTS and recipe.layers:
        return min(value, COEFFICIENTS[name])
    if isinstance(value, int):
        return smaller_number(name, value, config, recipe)
    if isinstance(value, (list, tuple)) and value:
        return smaller_list(name, value, recipe, count)
    if isinstance(value, dict) and (recipe.divide > 1 or recipe.narrow):
        divide = 8 if recipe.narrow else recipe.divide  # 128 wide heads become 16
        sections = {
            k: [max(1, n // divide) for n in v] for k, v in value.items() if "section" in str(k) and v
        }
        if name == "rope_parameters" and "rope_theta" in value and not sections:
            sections = {"mrope_section": [2, 3, 3]}  # what multimodal models assume for 128, at 16
        return {**value, **sections} if sections else value
    return value


def smaller_number(name: str, value: int, config: PretrainedConfig, recipe: Recipe) -> int:
    rules: list[tuple[bool, Callable[[], int]]] = [
        (name.endswith(("vocab_size", "vocab", "num_embeddings")), lambda: min(value, VOCABULARY)),
        (bool(TOKEN.search(name)), lambda: token(value, recipe)),
        (bool(EXPERTS.search(name)), lambda: min(value, 4)),
        (bool(PER_TOKEN.search(name)), lambda: min(value, 2)),
        (bool(GROUPS.search(name)), lambda: min(value, 1)),
        (name.endswith("chunk_size") and value >= 64, lambda: 8),
        (name == "first_k_dense_replace", lambda: min(value, 1)),
        (bool(LAYERS.search(name)), lambda: min(value, recipe.layers or value)),
        (name == "image_size" and recipe.images, lambda: image_size(value, config)),
        (recipe.narrow and name in NARROW, lambda: min(value, NARROW[name])),
        (divisible(name, value, recipe), lambda: value // recipe.divide),
    ]
    return next((new() for applies, new in rules if applies), value)


def divisible(name: str, value: int, recipe: Recipe) -> bool:
    wide = value >= 4 * recipe.divide and value % recipe.divide == 0
    return recipe.divide > 1 and wide and bool(WIDTH.search(name)) and not NO_WIDTH.search(name)


def image_size(value: int, config: PretrainedConfig) -> int:
    patch = vars(config).get("patch_size")
    return min(value, 4 * patch) if isinstance(patch, int) else value


def token(value: int, recipe: Recipe) -> int:
    """Special tokens keep apart from one another, and inside the small vocabulary."""
    if value < VOCABULARY - 60:
        return value
    return recipe.tokens.setdefault(value, VOCABULARY - 60 + len(recipe.tokens) % 60)


def smaller_list(name: str, value: Any, recipe: Recipe, count: int | None) -> Any:
    kind = type(value)
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if numbers and DEPTHS.search(name) and recipe.layers:
        return kind(min(v, recipe.layers) for v in value)
    if count and recipe.layers and len(value) == count and count > recipe.layers:
        return kind(kinds_of_layer(value, recipe.layers))
    if numbers and TOKEN.search(name):
        return kind(token(v, recipe) for v in value)
    if numbers and all(divisible(name, v, recipe) for v in value):
        return kind(v // recipe.divide for v in value)
    return value


def kinds_of_layer(values: Any, layers: int) -> list[Any]:
    """As many layers as there are to be, of different kinds where there are some."""
    kinds = list(dict.fromkeys(v for v in values if isinstance(v, str)))
    return (kinds if len(kinds) > 1 else list(values))[:layers]
