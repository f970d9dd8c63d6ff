"""The table of docs/how-to/rotations.md: what smoothing and rotations are worth before any training.

    python benchmarks/starts.py --folder runs/language

The float model is that of the recipe `llama-q4_0 --demo`, trained if the folder has none. Its linear layers get weights
of 8 bits and inputs of 4, static and per tensor; everything else stays float. Perplexity is of the training forward, on
the first held-out sequences.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import isogrid as ig
from isogrid.recipes.language import LanguageData
from isogrid.recipes.loading import load_recipe
from isogrid.recipes.loop import make_accelerator
from isogrid.recipes.perplexity import predictions, token_loss
from isogrid.recipes.progress import Silent
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import (
    calibration_batches,
    float_model,
    load_float_weights,
    new_model,
    save_float_weights,
)

RULES = [ig.Rule(match="Linear", activation="uint4/tensor"), ig.Rule(match="*", keep="float")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--batches", type=int, default=4, help="held-out batches of eight sequences")
    parser.add_argument("--steps", type=int, default=20, help="of learning rotations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("llama-q4_0", [], demo=True)
    data = make_data(recipe.data)
    assert isinstance(data, LanguageData)
    path = arguments.folder / "float.safetensors"
    if not path.is_file():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        save_float_weights(float_model(recipe, data, make_accelerator(recipe), Silent()), path)
    text = list(islice(data.test_batches(), arguments.batches))
    batches = [{"input_ids": ids, "labels": labels} for ids, labels in calibration_batches(recipe, data)]
    inputs = {**data.example_inputs, "use_cache": False}

    def start() -> Any:
        model = new_model(recipe)
        load_float_weights(model, path)
        head: Any = model.get_submodule("lm_head")
        head.weight = nn.Parameter(head.weight.detach().clone())  # rotations need a head of its own
        return model.eval()

    def show(name: str, change: Callable[[Any], object]) -> None:
        model = start()
        change(model)
        plan = ig.plan(model, scheme="w8a8", rules=RULES, example_inputs=inputs)
        ig.calibrate(ig.prepare(model, plan), batches)
        print(f"| {name} | {predictions(model.eval(), text).perplexity} |", flush=True)

    def learned(model: Any) -> None:
        found = ig.learn_rotations(
            model,
            ig.plan(model, scheme="w8a8", rules=RULES, example_inputs=inputs),
            [{name: values[:2] for name, values in batch.items()} for batch in batches],
            lambda outputs, batch: token_loss(outputs, batch["labels"]),
            example_inputs=inputs,
            calibrate=lambda copy: ig.calibrate(copy, batches[:1]),
            steps=arguments.steps,
        )
        ig.rotate(model, example_inputs=inputs, rotations=found)

    print("| start | perplexity [95 %] |\n| --- | ---: |")
    print(f"| float | {predictions(start(), text).perplexity} |", flush=True)
    show("as it is", lambda model: None)
    show("smoothed", lambda model: ig.smooth(model, batches, example_inputs=inputs))
    show("rotated", lambda model: ig.rotate(model, example_inputs=inputs))
    rotate_all = partial(ig.rotate, example_inputs=inputs, online="*.down_proj")
    show("rotated, also before the down projections", rotate_all)
    show("rotations learned", learned)


if __name__ == "__main__":
    main()
