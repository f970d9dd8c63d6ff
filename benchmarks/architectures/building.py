"""What the tables of architectures are written with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], Any]


@dataclass(frozen=True)
class Architecture:
    """A model of the zoo.

    Attributes:
        build: makes it, in float, with random weights.
        inputs: makes a batch of two examples, new numbers at each call: a tuple, or a dictionary of keyword arguments.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs


def image(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, channels, size, size)}


def plain_image(size: int = 32, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def text(length: int = 16) -> dict[str, Tensor]:
    """Token numbers and a mask; the second example is shorter."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length * 3 // 4 :] = 0
    return {"input_ids": torch.randint(3, 90, (2, length)), "attention_mask": mask}


def image_and_text(size: int = 32) -> dict[str, Tensor]:
    return {**text(), **image(size)}


def sound(samples: int = 2000) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, samples)}


def mel() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 64)}


def spectrogram() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 32, 16)}


def prompt() -> dict[str, Tensor]:
    """An image and one point on it, as SAM takes them."""
    return {**image(64), "input_points": torch.rand(2, 1, 1, 2) * 64}


def configured(model: str, configuration: str, **settings: Any) -> nn.Module:
    """A model of `transformers` of this configuration."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, configuration)(**settings))


def of(model: str, configuration: str, inputs: Inputs, **settings: Any) -> Architecture:
    return Architecture(partial(configured, model, configuration, **settings), inputs)


ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGE = {**ENCODER, "image_size": 32, "patch_size": 8}
TEXT = {**ENCODER, "vocab_size": 99, "max_position_embeddings": 40}
SOUND = {
    **ENCODER,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
