"""The table of docs/tutorials/language-models.md: the built-in language model in llama.cpp's formats.

    python benchmarks/language.py --folder runs/language

Trains the float model of the recipe `llama-q4_0 --demo`, then for each scheme quantises it without training (PTQ) and
trains it for as many steps as the recipe says (QAT). Beside them stand the float model after the same steps, and the
usual route: the trained weights in bfloat16, and llama.cpp's own quantiser on them. All figures are of llama.cpp, on
one thread, on the held-out text. What is done already is read from the folder, so that a run that was stopped goes on.

Needs: pip install 'isogrid[transformers,gguf]', and llama-cpp-python (see docs/targets/llamacpp.md).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import isogrid as ig
from isogrid.layers.weights import weight_of
from isogrid.planning.state import weight_quantizers
from isogrid.recipes.language import LanguageData
from isogrid.recipes.language_outcomes import float_outcome, measured, with_tokenizer
from isogrid.recipes.loading import load_recipe
from isogrid.recipes.loop import make_accelerator
from isogrid.recipes.perplexity import predictions
from isogrid.recipes.progress import Silent
from isogrid.recipes.schema import Optimization, Recipe
from isogrid.recipes.sources import make_data
from isogrid.recipes.stages import (
    float_model,
    load_float_weights,
    new_model,
    prepared_model,
    save_float_weights,
    train_float,
    train_quantized,
)
from isogrid.report import ResultRow, words
from isogrid.targets.gguf_export import write_float_gguf
from isogrid.targets.llamacpp_model import LlamaFile
from isogrid.targets.subprocesses import Worker

SCHEMES = ("q8_0", "q4_0", "q4_k", "q2_k", "tq2_0")


class Table:
    """Rows in a file, each made once.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, key: str, make: Callable[[], ResultRow]) -> None:
        if key not in self.rows:
            self.rows[key] = asdict(make())
            self.path.write_text(json.dumps(self.rows, indent=2))
        print(line(key, self.rows[key]), flush=True)

    def markdown(self) -> str:
        return "\n".join([*HEAD, *(line(key, row) for key, row in self.rows.items())])


HEAD = (
    "| | perplexity [95 %] | as trained | agreement | size | prompt | decoding |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def line(key: str, row: dict[str, Any]) -> str:
    found = row["language"]
    return (
        f"| {key} | {found['perplexity']:.2f} [{found['low']:.2f}, {found['high']:.2f}] "
        f"| {found['trained_perplexity']:.2f} | {100 * found['agreement']:.2f} % | {words.size(row['size_bytes'])} "
        f"| {found['prompt_speed']:,.0f} | {found['decoding_speed']:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    recipe = load_recipe("llama-q4_0", arguments.settings, demo=True)
    data = make_data(recipe.data)
    assert isinstance(data, LanguageData)
    print(data.description, flush=True)
    table = Table(folder / "rows.json")
    for line_ in HEAD:
        print(line_)
    trained_float(recipe, data, folder, table)
    for scheme in arguments.schemes:
        of_scheme(load_recipe("llama-q4_0", [f"scheme={scheme}", *arguments.settings], demo=True), data, folder, table)
    (folder / "table.md").write_text(table.markdown() + "\n")


def start_of(recipe: Recipe, folder: Path) -> nn.Module:
    """The float model that everything starts from."""
    model = new_model(recipe)
    load_float_weights(model, folder / "float.safetensors")
    return model


def trained_float(recipe: Recipe, data: LanguageData, folder: Path, table: Table) -> None:
    """The float model, and the control: as many more steps of it as training with quantisation takes."""
    accelerator, path = make_accelerator(recipe), folder / "float.safetensors"
    if not path.is_file():
        save_float_weights(float_model(recipe, data, accelerator, Silent()), path)

    def row(method: Any, model: nn.Module) -> ResultRow:
        return float_outcome("F16", method, model.eval(), data, folder / f"{method}.gguf").row

    def longer() -> ResultRow:
        settings = Optimization(**recipe.training.model_dump(include=set(Optimization.model_fields)))
        return row("float-extra", train_float(start_of(recipe, folder), data, settings, accelerator, Silent(), ""))

    table.add("F16", lambda: row("float", start_of(recipe, folder)))
    table.add("F16, trained as long", longer)


def of_scheme(recipe: Recipe, data: LanguageData, folder: Path, table: Table) -> None:
    """One scheme: without training, with it, and with the same training by the usual route."""
    name = recipe.scheme.upper()
    keys = [f"{name} PTQ", f"{name} QAT", f"{name} QAT, usual route"]
    if all(key in table.rows for key in keys):
        for key in keys:
            table.add(key, lambda: None)  # type: ignore[arg-type, return-value]
        return
    accelerator = make_accelerator(recipe)
    model = prepared_model(recipe, start_of(recipe, folder), data, accelerator)

    def exported(method: Any) -> ResultRow:
        artifact = ig.export(with_tokenizer(model.eval(), data), folder / f"{recipe.scheme}-{method}.gguf")
        return measured(name, method, LlamaFile(artifact.path), artifact.path, trained(), data)

    def trained() -> Any:
        return predictions(model.eval(), data.test_batches())

    def usual() -> ResultRow:
        halves, path = folder / "bfloat16.gguf", folder / f"{recipe.scheme}-usual.gguf"
        write_float_gguf(as_float(model, start_of(recipe, folder)), halves, data.tokenizer, "BF16")
        files = {"path": str(halves.resolve()), "output": str(path.resolve())}
        Worker("llamacpp").call("requantize", **files, kind=recipe.scheme)
        return measured(name, "qat", LlamaFile(path), path, trained(), data)

    table.add(keys[0], lambda: exported("ptq"))
    train_quantized(recipe, model, data, accelerator, Silent(), "")
    table.add(keys[1], lambda: exported("qat"))
    table.add(keys[2], usual)


@torch.no_grad()
def as_float(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """A float model whose weights are the values that a prepared one stands for."""
    state = model.state_dict()
    fresh.load_state_dict({name: state[name] for name in fresh.state_dict()})
    for name, quantizer in weight_quantizers(model).items():
        path = name.rpartition(".")[0]
        fresh.get_submodule(path).weight.copy_(quantizer.quantize(weight_of(model.get_submodule(path))).dequantize())
    return fresh


if __name__ == "__main__":
    main()
