"""Peak memory and time of a step with adapters: inside the quantiser, beside 4-bit codes, and as PEFT has them.

All variants are one language model of the Llama architecture with updates of the same rank on the same layers. Peak
memory is what tensors occupy at the worst moment of a step as the allocator reports it, with parameters, gradients and
optimizer state. Steps of all variants take turns.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --hidden 512 --rounds 3
"""

import copy
import json
import tempfile
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from steps import LAYERS, Variant, figures, llama_config, measured, parser, tokens
from torch import Tensor, nn

import isogrid as ig

OWN = {"match": [f"*.{name}" for name in LAYERS], "alpha": 32}


def prepared(model: nn.Module, scheme: str, ids: Tensor, target: str) -> nn.Module:
    inputs = {"input_ids": ids[:1, :8]}
    model = copy.deepcopy(model)
    return ig.prepare(model, ig.plan(model, target=target, scheme=scheme, example_inputs=inputs))


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=list(LAYERS))
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
    model = transformers.LlamaForCausalLM(llama_config(8192, hidden, layers))
    inside, beside = prepared(model, "w4a16", ids, "vllm"), prepared(model, "nf4-double", ids, "bitsandbytes")
    ig.add_adapters(inside, rank, **OWN)
    ig.add_adapters(beside, rank, method="qlora", **OWN)
    lora = "LoRA on the float model, PEFT"
    return [
        Variant(lora, with_lora(copy.deepcopy(model), rank), lora),
        Variant("L4Q in w4a16, Isogrid", inside, lora),
        Variant("all weights in w4a16, Isogrid", prepared(model, "w4a16", ids, "vllm"), lora),
        Variant("QLoRA in NF4, PEFT and bitsandbytes", with_lora(in_four_bits(model), rank), lora),
        Variant("QLoRA in NF4, Isogrid", beside, lora),
    ]


def main() -> None:
    given = parser(__doc__, rounds=3, hidden=256, layers=3, rank=16).parse_args()
    ids, targets = tokens(8192, given)
    found = variants(given.hidden, given.layers, given.rank, ids)
    table = Table("what trains", "peak MB", "/ LoRA", "seconds a step", "/ LoRA")
    for row in measured(found, ids, targets, given.rounds):
        table.add_row(*row)
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures(found), indent=1))


if __name__ == "__main__":
    main()
