"""Inputs for a transformers model, made from its configuration and the names of forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

BATCH, LENGTH = 2, 8
Inputs = dict[str, Any]
VISION = (
    "vision_config",
    "image_config",
    "vision",
    "backbone_config",
    "encoder_config",
    "visual_config",
    "encoder",
)
AUDIO = ("audio_config", "audio_encoder_config", "encoder_config", "audio_encoder", "speech_config")
TEXT = ("text_config", "decoder_config", "decoder", "text", "thinker_config", "text_encoder", "llm_config")


def find(config: PretrainedConfig, names: tuple[str, ...], parts: tuple[str, ...], default: Any) -> Any:
    """The first field of these names, in the parts that should have it, then anywhere."""
    candidates = [vars(config)[p] for p in parts if isinstance(vars(config).get(p), PretrainedConfig)]
    inner = [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    for place in [*candidates, config, *inner]:
        for name in names:
            value = getattr(place, name, None)
            if value is not None and not isinstance(value, bool):
                return value
    for place in inner:
        value = find(place, names, parts, None)
        if value is not None:
            return value
    return default


def pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


class Makers:
    """One method for each kind of argument."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length: int = LENGTH) -> Tensor:
        size = int(find(self.config, ("vocab_size",), TEXT, 50))
        return torch.randint(3, max(4, min(size, 90)), (BATCH, length), generator=self.generator)

    def image(self) -> Tensor:
        channels = find(self.config, ("num_channels", "in_channels", "in_chans"), VISION, 3)
        size = find(self.config, ("image_size", "img_size", "input_size"), VISION, 64)
        return self.normal(BATCH, int(channels), *pair(size))

    def small_image(self) -> Tensor:
        channels = find(self.config, ("num_channels", "in_channels"), VISION, 3)
        return self.normal(BATCH, int(channels), 64, 64)

    def video(self, channels_first: bool = False) -> Tensor:
        frames = find(self.config, ("num_frames", "tubelet_frames", "frames_per_clip"), VISION, 4)
        image = self.image()
        video = image[:, None].repeat(1, int(frames), 1, 1, 1)
        return video.transpose(1, 2) if channels_first else video

    def tubes(self) -> Tensor:
        image = self.image()
        return image[:, None].repeat(1, int(find(self.config, ("num_frames",), VISION, 4)), 1, 1, 1)

    def features(self, time_last: bool) -> Tensor:
        bins = find(
            self.config,
            ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "num_mel_filters"),
            AUDIO,
            80,
        )
        steps = find(self.config, ("max_source_positions",), AUDIO, 0)
        length = 2 * int(steps) if time_last and 0 < int(steps) <= 1500 else 64
        if not time_last:
            return self.normal(BATCH, int(find(self.config, ("max_length",), AUDIO, 64)), int(bins))
        return self.normal(BATCH, int(bins), length)

    def waveform(self, channels: bool = False) -> Tensor:
        wave = self.normal(BATCH, 1600)
        return wave[:, None] if channels else wave

    def hidden(
        self, names: tuple[str, ...] = ("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim")
    ) -> Tensor:
        return self.normal(BATCH, LENGTH, int(find(self.config, names, TEXT, 32)))

    def boxes(self) -> Tensor:
        corners = torch.randint(0, 50, (BATCH, LENGTH, 4), generator=self.generator)
        return corners.sort(dim=-1).values[..., [0, 1, 2, 3]]

    def patches(self) -> Tensor:
        """A flat run of patches, as models of varying resolution take them: 4 by 4 of one image."""
        patch, channels = pair(find(self.config, ("patch_size",), VISION, 16)), 3
        frames = int(find(self.config, ("temporal_patch_size",), VISION, 1))
        return self.normal(16, channels * frames * patch[0] * patch[1])

    def grid(self) -> Tensor:
        return torch.tensor([[1, 4, 4]])

    def past(self) -> Tensor:
        lags = find(self.config, ("lags_sequence",), (), [0])
        length = int(find(self.config, ("context_length",), (), 32)) + (
            max(lags) if isinstance(lags, list) else 0
        )
        size = int(find(self.config, ("num_input_channels", "input_size"), (), 1))
        return self.normal(BATCH, length) if size == 1 else self.normal(BATCH, length, size)


def candidates(model: nn.Module, config: PretrainedConfig) -> Iterator[tuple[str, Inputs]]:
    """Sets of inputs to try, the fullest first, each with a name for the table."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    make = Makers(config)
    variants = {name: made for name, made in table(make).items() if name in parameters}
    main = str(getattr(model, "main_input_name", ""))
    for chosen in choices(variants, required, main):
        for picks in range(max((len(variants[name]) for name in chosen), default=0)):
            try:
                values = {name: variants[name][min(picks, len(variants[name]) - 1)]() for name in chosen}
            except (TypeError, ValueError, RuntimeError):
                continue
            yield "+".join(sorted(values)), with_companions(values, parameters)


def choices(variants: dict[str, Any], required: list[str], main: str) -> list[tuple[str, ...]]:
    """Which arguments together: everything but double modalities, then fewer, down to what is required."""
    needed = tuple(name for name in required if name in variants)
    text = tuple(n for n in ("input_ids", "decoder_input_ids") if n in variants)
    senses = [n for n in variants if n in SENSES and not (text and n in EMBEDDED)]
    others = tuple(n for n in variants if n in ALONG)
    sets: list[tuple[str, ...]] = []
    for sense in [(s,) for s in senses] + [()]:
        for words in (text, ()):
            for along in (others, ()):
                sets.append((*words, *sense, *along))
    sets.append((main,) if main in variants else ())
    sets += [(name,) for name in variants]
    full = [tuple(dict.fromkeys((*needed, *s))) for s in sets]
    return [s for s in dict.fromkeys(full) if s]


SENSES = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "audio_values",
    "flattened_patches",
    "past_values",
    "image_pixel_values",
    "hidden_states",
    "inputs_embeds",
    "spectrogram",
    "codes",
)
EMBEDDED = ("hidden_states", "inputs_embeds")
ALONG = ("bbox", "image_grid_thw", "grid_thw", "visual_feats", "visual_pos", "image")


def table(make: Makers) -> dict[str, list[Callable[[], Any]]]:
    """For each argument, what it may be, the likeliest first."""
    images = [make.image, make.small_image, make.patches, make.video]
    states = [make.hidden, lambda: make.hidden()[0], make.patches, lambda: make.hidden().transpose(1, 2)]
    return {
        "input_ids": [make.ids, lambda: make.ids(64)],
        "decoder_input_ids": [make.ids],
        "pixel_values": images,
        "pixel_values_videos": [make.video, make.patches],
        "image_pixel_values": images,
        "image": [make.image],
        "input_features": [lambda: make.features(True), lambda: make.features(False)],
        "input_values": [make.waveform, lambda: make.waveform(True), lambda: make.features(False)],
        "audio_values": [make.waveform, lambda: make.waveform(True)],
        "spectrogram": [lambda: make.features(False)],
        "flattened_patches": [
            lambda: torch.cat([torch.ones(BATCH, 4, 2), make.normal(BATCH, 4, 3 * 16 * 16)], dim=-1)
        ],
        "hidden_states": states,
        "inputs_embeds": states,
        "encoder_hidden_states": [make.hidden],
        "image_embeddings": [lambda: make.normal(1, int(find(make.config, ("hidden_size",), (), 32)), 8, 8)],
        "bbox": [make.boxes],
        "image_grid_thw": [make.grid],
        "grid_thw": [make.grid],
        "past_values": [make.past],
        "visual_feats": [lambda: make.normal(BATCH, 3, int(find(make.config, ("visual_feat_dim",), (), 32)))],
        "visual_pos": [lambda: torch.rand(BATCH, 3, 4)],
        "attention_mask": [lambda: torch.ones(BATCH, LENGTH, dtype=torch.long)],
    }


def with_companions(values: Inputs, parameters: Any) -> Inputs:
    """Switches that keep the output plain, where forward has them."""
    if "use_cache" in parameters:
        values["use_cache"] = False
    if "mm_token_type_ids" in parameters and "input_ids" in values:
        values["mm_token_type_ids"] = torch.zeros_like(values["input_ids"])
    if "past_values" in values:
        values |= time_series(values["past_values"], parameters)
    return values


def time_series(past: Tensor, parameters: Any) -> Inputs:
    along = {
        "past_time_features": past.new_ones(*past.shape[:2], 1),
        "past_observed_mask": torch.ones_like(past),
    }
    return {name: value for name, value in along.items() if name in parameters}
