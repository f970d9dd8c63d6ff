"""What training a language model on a 2-bit grid takes in memory: in float, all of it, one block at a time.

The model is of Llama's architecture. Every row trains a copy of it for the same steps, in a process of its own. Its
peak is what the model takes before, parameters and buffers, and what PyTorch's allocator hands out in training at the
worst moment: gradients, optimizer state, activations and whatever is made on the way.

    python benchmarks/low_memory.py
    python benchmarks/low_memory.py --blocks 48 --hidden 512 --json low_memory.json
    python benchmarks/low_memory.py --row blockwise
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import LAYERS, llama_config, parser
from torch import Tensor, nn

import isogrid as ig
from isogrid.training.memory import peak_bytes, tensor_bytes
from isogrid.training.optimizers import make_optimizer


def config(arguments: argparse.Namespace) -> Any:
    return llama_config(256, arguments.hidden, arguments.blocks)


def float_model(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config(arguments))


def batches(arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.sequences, arguments.length)
    return [{"input_ids": torch.randint(0, 256, shape, generator=generator)} for _ in range(arguments.steps)]


Training = tuple[nn.Module, Callable[[], object]]
"""A model, and what trains it."""


def training(model: Any, optimizer: str, groups: list[dict[str, Any]], data: list[dict[str, Tensor]]) -> Training:
    def train() -> None:
        stepper = make_optimizer(optimizer, groups)
        model.train()
        for batch in data:
            stepper.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            stepper.step()

    return model, train


def in_float(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    model = float_model(arguments)
    return training(model, optimizer, [{"params": list(model.parameters()), "lr": 1e-5}], batches(arguments))


def rules(arguments: argparse.Namespace) -> list[ig.Rule]:
    # The extremes, for a range by least squared error has an hour of its own and no gradient to keep.
    return [ig.Rule(match="lm_head", keep="float"), ig.Rule(match="Linear", range="minmax")]


def prepared(arguments: argparse.Namespace) -> Any:
    model = float_model(arguments)
    plan = ig.plan(model, scheme="w2a16-asym", rules=rules(arguments), example_inputs=batches(arguments)[0])
    return ig.prepare(model, plan)


def full(arguments: argparse.Namespace, optimizer: str, weights: Path, checkpointing: bool = False) -> Training:
    model = prepared(arguments)
    if checkpointing:
        ig.checkpoint_activations(model)
    return training(model, optimizer, ig.parameter_groups(model, lr=1e-5), batches(arguments))


def scales(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    model = prepared(arguments)
    ig.freeze_codes(model)
    return training(model, optimizer, ig.parameter_groups(model, lr=1e-5), batches(arguments))


def blockwise(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    model, settings = prepared(arguments), ig.Blockwise(epochs=1, optimizer=optimizer)
    return model, lambda: ig.train_blockwise(model, batches(arguments), settings)


def on_disk(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights():
        model = LlamaForCausalLM(config(arguments))
    data, settings = batches(arguments), ig.Blockwise(epochs=1, optimizer=optimizer)
    plan = ig.plan(model, scheme="w2a16-asym", rules=rules(arguments), example_inputs=data[0])
    folder = weights / "run"
    return model, lambda: ig.train_blockwise_on_disk(model, plan, weights, data, settings, folder=folder)


def qlora_of_peft(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    import peft
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": four_bits, "device_map": "cpu", "dtype": torch.float32}
    model = LlamaForCausalLM.from_pretrained(weights, **options).requires_grad_(False)
    adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(LAYERS))
    adapted = peft.get_peft_model(model, adapters)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return training(adapted, optimizer, [{"params": trained, "lr": 1e-5}], batches(arguments))


def qlora(arguments: argparse.Namespace, optimizer: str, weights: Path) -> Training:
    model = float_model(arguments)
    absmax = [ig.Rule(match="Linear", range="absmax")]  # as bitsandbytes has it
    plan = ig.plan(model, scheme="nf4-double", rules=absmax, example_inputs=batches(arguments)[0])
    ig.add_adapters(ig.prepare(model, plan), 16, 32, [f"*.{name}" for name in LAYERS], method="qlora")
    return training(model, optimizer, ig.parameter_groups(model, lr=1e-5), batches(arguments))


ROWS: dict[str, tuple[str, str, Callable[..., Training]]] = {
    "float": ("float, all weights", "adamw", in_float),
    "full": ("QAT, all weights", "adamw", full),
    "full-checkpointed": ("QAT, activation checkpointing", "adamw", lambda a, o, w: full(a, o, w, True)),
    "full-8bit": ("QAT, all weights", "adamw8bit", full),
    "scales": ("QAT, scales over codes", "adamw", scales),
    "qlora": ("QLoRA, rank 16", "adamw", qlora),
    "qlora-peft": ("QLoRA, rank 16: PEFT and bitsandbytes", "adamw", qlora_of_peft),
    "blockwise": ("block-wise, model in memory", "adamw", blockwise),
    "blockwise-8bit": ("block-wise, model in memory", "adamw8bit", blockwise),
    "disk": ("block-wise from shards", "adamw", on_disk),
    "disk-8bit": ("block-wise from shards", "adamw8bit", on_disk),
}


def measured(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One row, in this process."""
    _, optimizer, function = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        float_model(arguments).save_pretrained(folder, max_shard_size="64MB")
        if "8bit" in optimizer:  # compiled once, or the compiler's tensors count
            weight = nn.Parameter(torch.zeros(64, 64))
            weight.grad = torch.zeros_like(weight)
            make_optimizer(optimizer, [{"params": [weight], "lr": 1e-5}]).step()
        model, train = function(arguments, optimizer, Path(folder))
        held = tensor_bytes([*model.parameters(), *model.buffers()])
        start = time.perf_counter()
        added = peak_bytes(train)
        return {"model": held, "added": added, "seconds": time.perf_counter() - start}


def main() -> None:
    options = parser(__doc__, blocks=8, hidden=1024, sequences=2, length=32, steps=2)
    options.add_argument("--row", choices=ROWS, help="measure this row alone")
    arguments = options.parse_args()
    if arguments.row is not None:
        print(json.dumps(measured(arguments.row, arguments)))
        return
    model = float_model(arguments)
    block, whole = tensor_bytes(model.model.layers[0].parameters()), tensor_bytes(model.parameters())
    del model
    table = Table("training", "optimizer", "model [MiB]", "and training [MiB]", "in blocks", "peak [MiB]", "seconds")
    rows = []
    for name, (title, optimizer, _) in ROWS.items():
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"row": name, **found, "block": block, "float": whole})
        held, added = found["model"], found["added"]
        table.add_row(title, optimizer, f"{held / 2**20:.1f}", f"{added / 2**20:.1f}", f"{added / block:.2f}",
                      f"{(held + added) / 2**20:.1f}", f"{found['seconds']:.0f}")  # fmt: skip
    print(f"{arguments.blocks} blocks of {block / 2**20:.2f} MiB, a model of {whole / 2**20:.1f} MiB in float32")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
