"""Peak memory and time of a step with adapters: inside the quantiser, beside 4-bit codes, and as PEFT has them.

All variants are one language model of the Llama architecture with updates of the same rank on the same layers. Peak
memory is what tensors occupy at the worst moment of a step as the allocator reports it, with parameters, gradients and
optimizer state. Steps of all variants take turns.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --hidden 512 --rounds 3
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import isogrid as ig
from isogrid.training.memory import resting_bytes

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN = {"match": [f"*.{name}" for name in LAYERS], "alpha": 32}


@dataclass
class Variant:
    """A way to train, and what was measured of it."""

    name: str
    model: nn.Module
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.model.train()

    def step(self, ids: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(input_ids=ids).logits.flatten(0, 1), targets.flatten()).backward()
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
        self.optimizer.zero_grad()
        self.peak_bytes = peak + resting_bytes(self.model, self.optimizer)
        self.seconds.pop()


def prepared(model: nn.Module, scheme: str, ids: Tensor, target: str) -> nn.Module:
    inputs = {"input_ids": ids[:1, :8]}
    model = copy.deepcopy(model)
    return ig.prepare(model, ig.plan(model, target=target, scheme=scheme, example_inputs=inputs))


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=LAYERS)
    return peft.get_peft_model(model, config)


def in_four_bits(model: Any) -> nn.Module:
    """As bitsandbytes keeps it, frozen."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    return loaded.requires_grad_(False)


def variants(hidden: int, layers: int, rank: int, ids: Tensor) -> list[Variant]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    inside, beside = prepared(model, "w4a16", ids, "vllm"), prepared(model, "nf4-double", ids, "bitsandbytes")
    ig.add_adapters(inside, rank, **OWN)
    ig.add_adapters(beside, rank, method="qlora", **OWN)
    return [
        Variant("LoRA on the float model, PEFT", with_lora(copy.deepcopy(model), rank)),
        Variant("L4Q in w4a16, Isogrid", inside),
        Variant("all weights in w4a16, Isogrid", prepared(model, "w4a16", ids, "vllm")),
        Variant("QLoRA in NF4, PEFT and bitsandbytes", with_lora(in_four_bits(model), rank)),
        Variant("QLoRA in NF4, Isogrid", beside),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 3, "hidden": 256, "layers": 3, "rank": 16, "sequences": 4, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(8192, (2, given.sequences, given.length), generator=generator)
    found = variants(given.hidden, given.layers, given.rank, ids)
    for variant in found:
        variant.step(ids, targets)
        variant.measure_memory(ids, targets)
        variant.seconds.clear()
    for _ in range(given.rounds):
        for variant in found:
            variant.step(ids, targets)
    table = Table("what trains", "peak MB", "/ LoRA", "seconds a step", "/ LoRA")
    first = found[0]
    for variant in found:
        table.add_row(
            variant.name, f"{variant.peak_bytes / 1e6:.0f}", f"{variant.peak_bytes / first.peak_bytes:.2f}",
            f"{median(variant.seconds):.2f}", f"{median(variant.seconds) / median(first.seconds):.2f}",
        )  # fmt: skip
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps({v.name: [v.peak_bytes, median(v.seconds)] for v in found}, indent=1))


if __name__ == "__main__":
    main()
