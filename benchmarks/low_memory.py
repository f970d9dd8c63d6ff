"""What training a language model on a 2-bit grid takes in memory: in float, all of it, one block at a time.

The model is of Llama's architecture, with many blocks. Every row trains a copy of it for the same steps, in a process
of its own. The peak is what PyTorch's allocator holds at the worst moment: weights, gradients, optimizer state,
activations and whatever is made on the way.

    python benchmarks/low_memory.py
    python benchmarks/low_memory.py --blocks 48 --hidden 512 --json low_memory.json
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
from torch import Tensor, nn

import isogrid as ig
from isogrid.training.memory import peak_bytes, tensor_bytes
from isogrid.training.optimizers import make_optimizer


def config(arguments: argparse.Namespace) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 128,
        use_cache=False,
    )


def float_model(arguments: argparse.Namespace) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config(arguments))


def batches(arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.sequences, arguments.length)
    return [{"input_ids": torch.randint(0, 256, shape, generator=generator)} for _ in range(arguments.steps)]


def train(model: Any, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]]) -> None:
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def in_float(arguments: argparse.Namespace, optimizer: str) -> None:
    model = float_model(arguments)
    train(model, make_optimizer(optimizer, [{"params": list(model.parameters()), "lr": 1e-5}]), batches(arguments))


def prepared(arguments: argparse.Namespace) -> Any:
    model = float_model(arguments)
    # The extremes, for a range by least squared error has an hour of its own and no gradient to keep.
    rules = [ig.Rule(match="Linear", range="minmax"), ig.Rule(match="lm_head", keep="float")]
    plan = ig.plan(model, scheme="w2a16-asym", rules=rules[::-1], example_inputs=batches(arguments)[0])
    return ig.prepare(model, plan)


def full(arguments: argparse.Namespace, optimizer: str, checkpointing: bool = False) -> None:
    model = prepared(arguments)
    if checkpointing:
        ig.checkpoint_activations(model)
    train(model, make_optimizer(optimizer, ig.parameter_groups(model, lr=1e-5)), batches(arguments))


def blockwise(arguments: argparse.Namespace, optimizer: str) -> None:
    ig.train_blockwise(prepared(arguments), batches(arguments), ig.Blockwise(epochs=1, optimizer=optimizer))


def on_disk(arguments: argparse.Namespace, optimizer: str, weights: Path) -> None:
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights():
        model = LlamaForCausalLM(config(arguments))
    rules = [ig.Rule(match="lm_head", keep="float"), ig.Rule(match="Linear", range="minmax")]
    data = batches(arguments)
    plan = ig.plan(model, scheme="w2a16-asym", rules=rules, example_inputs=data[0])
    settings = ig.Blockwise(epochs=1, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        ig.train_blockwise_on_disk(model, plan, weights, data, settings, folder=folder)


ROWS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "float": ("float, all weights", "adamw", in_float),
    "full": ("QAT, all weights", "adamw", full),
    "full-checkpointed": ("QAT, activation checkpointing", "adamw", lambda a, o: full(a, o, True)),
    "full-8bit": ("QAT, all weights", "adamw8bit", full),
    "blockwise": ("block-wise, model in memory", "adamw", blockwise),
    "disk": ("block-wise from shards", "adamw", on_disk),
    "disk-8bit": ("block-wise from shards", "adamw8bit", on_disk),
}


def measured(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One row, in this process."""
    _, optimizer, function = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        more: tuple[Path, ...] = ()
        if function is on_disk:
            float_model(arguments).save_pretrained(folder, max_shard_size="4MB")
            more = (Path(folder),)
        if "8bit" in optimizer:  # compiled once, or the compiler's tensors count
            weight = nn.Parameter(torch.zeros(64, 64))
            weight.grad = torch.zeros_like(weight)
            make_optimizer(optimizer, [{"params": [weight], "lr": 1e-5}]).step()
        start = time.perf_counter()
        peak = peak_bytes(lambda: function(arguments, optimizer, *more))
        return {"peak": peak, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--row", choices=ROWS, help="measure this row alone")
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measured(arguments.row, arguments)))
        return
    model = float_model(arguments)
    block, whole = tensor_bytes(model.model.layers[0].parameters()), tensor_bytes(model.parameters())
    del model
    table = Table("training", "optimizer", "peak [MiB]", "of the model", "blocks", "seconds")
    rows = []
    for name, (title, optimizer, _) in ROWS.items():
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"row": name, **found, "block": block, "model": whole})
        peak = found["peak"]
        table.add_row(title, optimizer, f"{peak / 2**20:.1f}", f"{peak / whole:.2f}", f"{peak / block:.1f}",
                      f"{found['seconds']:.0f}")  # fmt: skip
    print(f"{arguments.blocks} blocks of {block / 2**20:.2f} MiB, a model of {whole / 2**20:.1f} MiB in float32")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
