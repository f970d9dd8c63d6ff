"""Peak memory and time of a distillation step beside a step with cross-entropy, on the built-in language model.

Peak memory is what tensors occupy at the worst moment of a step as the allocator reports it, with parameters, optimizer
state and the teacher. Steps of all variants take turns, so that whatever else the machine does falls on all of them.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --vocabulary 32000 --rounds 3
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import Variant, figures, llama_config, measured, parser, tokens
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import isogrid as ig


def language_model(vocabulary: int, ids: Tensor, trains: str) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(vocabulary, 256, 3))
    ig.prepare(model, ig.plan(model, scheme="w4a16", example_inputs={"input_ids": ids}))
    ig.calibrate(model, [{"input_ids": ids}])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "everything" or "quantizer" in name)
    return model


def variants(vocabulary: int, ids: Tensor) -> list[Variant]:
    def by(teacher: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
            guide = teacher(ids).logits
            return ig.Distillation()(model(ids), guide, overwrite_teacher=True)

        return loss

    found = []
    for trains in ("scales", "everything"):
        cross = f"{trains}, cross-entropy"
        found.append(Variant(cross, language_model(vocabulary, ids, trains), cross))
        for how, options in {"": {}, " in 8 bits": {"format": "int8/channel"}}.items():
            if trains == "scales" and how:
                continue
            model = language_model(vocabulary, ids, trains)
            teacher: Any = ig.teacher(model, **options)
            found.append(Variant(f"{trains}, teacher{how}", model, cross, by(teacher), teacher.kept_bytes))
    return found


def main() -> None:
    given = parser(__doc__, rounds=5, vocabulary=8192).parse_args()
    ids, targets = tokens(given.vocabulary, given)
    found = variants(given.vocabulary, ids)
    table = Table("what trains, on what", "peak MB", "/ cross-entropy", "seconds a step", "/ cross-entropy")
    for row in measured(found, ids, targets, given.rounds):
        table.add_row(*row)
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(figures(found), indent=1))


if __name__ == "__main__":
    main()
