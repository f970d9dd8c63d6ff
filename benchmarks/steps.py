"""Peak memory and time of a training step, for variants that take turns: what adapters.py and distillation.py share."""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from isogrid.training.distillation import cross_entropy
from isogrid.training.memory import peak_bytes, resting_bytes

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers in a block of the Llama architecture."""


def llama_config(vocabulary: int, hidden: int, layers: int) -> LlamaConfig:
    """Heads of 64, two to a key, and a feed-forward layer three times as wide."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        use_cache=False,
    )


def by_labels(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(model(ids), targets)


@dataclass
class Variant:
    """A way to train, and what was measured of it.

    Args:
        name: of its row.
        model: what trains.
        beside: the name of the variant that it is compared with.
        loss: of the model, ids and targets [sequences, tokens].
        teacher_bytes: what is held besides.
    """

    name: str
    model: nn.Module
    beside: str
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = by_labels
    teacher_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.model.train()

    def step(self, ids: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model, ids, targets).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def measure_memory(self, ids: Tensor, targets: Tensor) -> None:
        """The peak of one step, with parameters, optimizer state and the teacher."""
        self.optimizer.zero_grad()
        peak = peak_bytes(partial(self.step, ids, targets))
        self.optimizer.zero_grad()
        self.peak_bytes = peak + resting_bytes(self.model, self.optimizer) + self.teacher_bytes


def parser(description: str, **defaults: int) -> ArgumentParser:
    """The options that are numbers, --sequences and --length among them, and --json."""
    found = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    for name, default in {"sequences": 4, "length": 256, **defaults}.items():
        found.add_argument(f"--{name}", type=int, default=default)
    found.add_argument("--json", type=Path, help="write the figures to this file too")
    return found


def tokens(vocabulary: int, given: Any) -> tuple[Tensor, Tensor]:
    """Random ids and targets, int64 [sequences, length] each."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(vocabulary, (2, given.sequences, given.length), generator=generator)
    return ids, targets


def measured(found: Sequence[Variant], ids: Tensor, targets: Tensor, rounds: int) -> list[list[str]]:
    """Measure all variants; a row of each: its name, peak in MB and seconds, both also beside another's."""
    for variant in found:
        variant.step(ids, targets)
        variant.measure_memory(ids, targets)
        variant.seconds.clear()
    for _ in range(rounds):
        for variant in found:
            variant.step(ids, targets)
    by_name = {variant.name: variant for variant in found}
    rows = []
    for variant in found:
        other = by_name[variant.beside]
        memory, seconds = variant.peak_bytes, median(variant.seconds)
        rows.append([variant.name, f"{memory / 1e6:.0f}", f"{memory / other.peak_bytes:.2f}",
                     f"{seconds:.2f}", f"{seconds / median(other.seconds):.2f}"])  # fmt: skip
    return rows


def figures(found: Sequence[Variant]) -> dict[str, list[float]]:
    """Peak in bytes and seconds of a step, by name."""
    return {variant.name: [variant.peak_bytes, median(variant.seconds)] for variant in found}
