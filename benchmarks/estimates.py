"""What `isogrid.estimate` says a training run will take, beside what it then takes: memory and time.

Every row is one way to train a model of Llama's architecture, in a process of its own. Memory is that of tensors at the
worst moment of a step, parameters and optimizer state included; time is that of steps after the first, in which
compilers work.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --hidden 512 --steps 8 --json estimates.json
    python benchmarks/estimates.py --row w8a8
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from steps import parser
from torch import Tensor

import isogrid as ig
from isogrid.training.memory import peak_bytes, resting_bytes
from isogrid.training.optimizers import make_optimizer

LAYERS = [f"*.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]


def prepared(model: Any, ids: Tensor, scheme: str, target: str = "vllm") -> Any:
    rules = [ig.Rule(match="Linear", range="minmax")] if scheme.startswith("w2") else []
    plan = ig.plan(model, target=target, scheme=scheme, rules=rules, example_inputs={"input_ids": ids[:1, :8]})
    return ig.prepare(model, plan)


def integers(model: Any, ids: Tensor) -> Any:
    return ig.calibrate(prepared(model, ids, "w8a8"), [{"input_ids": ids[:1]}])


def checkpointed(model: Any, ids: Tensor) -> Any:
    ig.checkpoint_activations(prepared(model, ids, "w4a16"))
    return model


def adapted(model: Any, ids: Tensor, scheme: str, target: str, method: Any) -> Any:
    ig.add_adapters(prepared(model, ids, scheme, target), 16, 32, LAYERS, method=method)
    return model


def scales(model: Any, ids: Tensor) -> Any:
    ig.freeze_codes(prepared(model, ids, "w2a16-asym"))
    return model


ROWS: dict[str, tuple[str, str, Callable[[Any, Tensor], Any]]] = {
    "float": ("float", "adamw", lambda model, ids: model),
    "w4a16": ("QAT, w4a16", "adamw", lambda model, ids: prepared(model, ids, "w4a16")),
    "w4a16-8bit": ("QAT, w4a16", "adamw8bit", lambda model, ids: prepared(model, ids, "w4a16")),
    "w8a8": ("QAT, w8a8", "adamw", integers),
    "checkpointed": ("QAT, w4a16, activation checkpointing", "adamw", checkpointed),
    "l4q": ("LoRA-QAT, w4a16", "adamw", lambda model, ids: adapted(model, ids, "w4a16", "vllm", "l4q")),
    "qlora": ("QLoRA, nf4", "adamw", lambda model, ids: adapted(model, ids, "nf4-double", "bitsandbytes", "qlora")),
    "scales": ("scales over codes, 2 bits", "adamw", scales),
}


def measured(name: str, given: argparse.Namespace) -> dict[str, float]:
    """One row, in this process."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=given.hidden, intermediate_size=3 * given.hidden, num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64, num_key_value_heads=given.hidden // 128, use_cache=False,
    )  # fmt: skip
    ids, targets = torch.randint(2048, (2, given.sequences, given.length))
    _, optimizer, make = ROWS[name]
    model = make(transformers.LlamaForCausalLM(config), ids)
    model.train()

    def loss(count: int) -> Tensor:
        return F.cross_entropy(model(input_ids=ids[:count]).logits.flatten(0, 1), targets[:count].flatten())

    found = ig.estimate(model, loss, given.sequences, given.steps, optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": 1e-5}] if name == "float" else ig.parameter_groups(model, lr=1e-5)
    stepper = make_optimizer(optimizer, groups)

    def step() -> None:
        stepper.zero_grad()
        loss(given.sequences).backward()
        stepper.step()

    step()
    stepper.zero_grad()
    peak = resting_bytes(model, stepper) + peak_bytes(step)
    seconds = []
    for _ in range(given.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "estimated bytes": found.peak,
        "bytes": peak,
        "estimated seconds": found.seconds / given.steps,
        "seconds": median(seconds),
    }


def main() -> None:
    options = parser(__doc__, hidden=256, layers=3, sequences=8, length=128, steps=5)
    options.add_argument("--row", choices=ROWS, help="measure this row alone")
    given = options.parse_args()
    if given.row is not None:
        print(json.dumps(measured(given.row, given)))
        return
    table = Table("training", "optimizer", "estimated [MiB]", "measured", "off by", "estimated [s a step]", "measured",
                  "off by")  # fmt: skip
    rows = {}
    for name, (title, optimizer, _) in ROWS.items():
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True, check=True)
        rows[name] = row = json.loads(done.stdout.splitlines()[-1])
        cells = []
        for what, unit, digits in (("bytes", 2**20, 1), ("seconds", 1, 3)):
            said, was = row[f"estimated {what}"], row[what]
            cells += [f"{said / unit:.{digits}f}", f"{was / unit:.{digits}f}", f"{said / was - 1:+.1%}"]
        table.add_row(title, optimizer, *cells)
    Console(width=140).print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
