"""Peak memory and time of a distillation step beside a step with cross-entropy, on the built-in language model.

Peak memory is what tensors occupy at the worst moment of a step as the allocator reports it, with parameters, optimizer
state and the teacher. Steps of all variants take turns, so that whatever else the machine does falls on all of them.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --vocabulary 32000 --rounds 3
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import isogrid as ig
from isogrid.training.distillation import cross_entropy


@dataclass
class Variant:
    """A way to train, and what was measured of it."""

    name: str
    beside: str
    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    teacher_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def step(self, ids: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model, ids, targets).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def measure_memory(self, ids: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step(ids, targets)
        results: Any = profile.profiler
        now = peak = 0
        for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        resting = [*self.model.parameters(), *self.model.buffers(), *(t for t in state if isinstance(t, Tensor))]
        self.peak_bytes = peak + sum(t.numel() * t.element_size() for t in resting) + self.teacher_bytes
        self.seconds.pop()


def language_model(vocabulary: int, ids: Tensor, trains: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ig.prepare(model, ig.plan(model, scheme="w4a16", example_inputs={"input_ids": ids}))
    ig.calibrate(model, [{"input_ids": ids}])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "everything" or "quantizer" in name)
    return model.train()


def variants(vocabulary: int, ids: Tensor) -> list[Variant]:
    def by_labels(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(ids), targets)

    def by(teacher: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
            guide = teacher(ids).logits
            return ig.Distillation()(model(ids), guide, overwrite_teacher=True)

        return loss

    found = []
    for trains in ("scales", "everything"):
        cross = f"{trains}, cross-entropy"
        found.append(Variant(cross, cross, language_model(vocabulary, ids, trains), by_labels))
        for how, options in {"": {}, " in 8 bits": {"format": "int8/channel"}}.items():
            if trains == "scales" and how:
                continue
            model = language_model(vocabulary, ids, trains)
            teacher: Any = ig.teacher(model, **options)
            found.append(Variant(f"{trains}, teacher{how}", cross, model, by(teacher), teacher.kept_bytes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(arguments.vocabulary, (2, arguments.sequences, arguments.length), generator=generator)
    found = variants(arguments.vocabulary, ids)
    for variant in found:
        variant.step(ids, targets)
        variant.measure_memory(ids, targets)
        variant.seconds.clear()
    for _ in range(arguments.rounds):
        for variant in found:
            variant.step(ids, targets)
    peaks = {variant.name: variant.peak_bytes for variant in found}
    times = {variant.name: median(variant.seconds) for variant in found}
    table = Table("what trains, on what", "peak MB", "/ cross-entropy", "seconds a step", "/ cross-entropy")
    for variant in found:
        table.add_row(
            variant.name, f"{variant.peak_bytes / 1e6:.0f}", f"{variant.peak_bytes / peaks[variant.beside]:.2f}",
            f"{times[variant.name]:.2f}", f"{times[variant.name] / times[variant.beside]:.2f}",
        )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({name: [peaks[name], times[name]] for name in peaks}, indent=1))


if __name__ == "__main__":
    main()
