"""A recipe whose blocks train first and whose scales train then: killed in either stage, it ends the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isogrid.errors import MemoryExhaustedError, RecipeError
from isogrid.recipes.document import parse
from isogrid.recipes.loading import load_recipe, validated
from isogrid.recipes.runner import run
from isogrid.recipes.schema import Recipe
from tests.recipes.killing import Dying, Killed

RECIPE = """
model: {{name: language-model, arguments: {{layers: 2, hidden: 64, feed_forward: 64, context: 64}}}}
data: {{name: text, arguments: {{train: {folder}/text.txt, tokenizer: {folder}/tokenizer, length: 16}}}}
scheme: w2a16-asym
rules: [{{match: Linear, range: minmax}}]
calibration: {{batches: 1, batch_size: 2}}
blockwise: {{examples: 8, batch_size: 2, epochs: 2, lr: 1e-3}}
schedule: {{freeze_ranges: 1}}
training: {{steps: 4, batch_size: 2, checkpoint_every: 2, log_every: 1, activation_checkpointing: true}}
output: {output}
"""

LOOKS = 8
"""How often a run computes the loss before it trains, to say what it will take."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # What comes after training is not looked at here.
    monkeypatch.setattr("isogrid.recipes.runner.finish", lambda *arguments: None)


def recipe(folder: Path, output: Path) -> Recipe:
    return validated(parse(RECIPE.format(folder=folder, output=output), "recipe.yaml"))


def trained(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "checkpoint").glob("model-*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isogrid.recipes.runner.finish", lambda *arguments: None)
        run(recipe(folder, output))
    return trained(output)


@pytest.mark.parametrize(("task", "at"), [("training block by block", 3), ("training block", 13), ("training w2", 3)])
def test_a_killed_run_ends_as_if_it_was_not(
    task: str, at: int, folder: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(recipe(folder, tmp_path), progress=Dying(at, task))
    run(recipe(folder, tmp_path), resume=True)
    found = trained(tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert whole["model.layers.1.mlp.up_proj.weight"].dtype == torch.uint8


@pytest.mark.parametrize(("call", "where"), [(1, "A look at the first examples"), (LOOKS + 3, "Step 3")])
def test_running_out_of_memory_in_the_loop_says_what_to_change(
    call: int, where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def exhausted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*arguments)

    from isogrid.recipes import language

    original = language.token_loss
    monkeypatch.setattr(language, "token_loss", exhausted)
    with pytest.raises(MemoryExhaustedError, match=f"{where} ran out of memory.*activation_checkpointing"):
        run(recipe(folder, tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr("isogrid.recipes.runner.finish", lambda *arguments: None)
    run(recipe(folder, tmp_path), resume=True)  # what was written before is whole


def test_what_makes_no_sense_together_is_refused(folder: Path, tmp_path: Path) -> None:
    text = RECIPE.format(folder=folder, output=tmp_path)
    for change, message in (
        (("freeze_ranges: 1", "freeze_ranges: 0.9"), "set schedule.freeze_ranges to 1"),
        (("output:", "adapters: {rank: 2}\noutput:"), "adapters or blockwise"),
        (("output:", "freeze: {}\noutput:"), "blockwise or freeze"),
        (("output:", "distillation: {}\noutput:"), "name a teacher"),
    ):
        with pytest.raises(RecipeError, match=message):
            validated(parse(text.replace(*change), "recipe.yaml"))


def test_the_packaged_recipe_and_its_demo_are_valid() -> None:
    assert load_recipe("blockwise-w2").blockwise is not None
    assert load_recipe("blockwise-w2", demo=True).blockwise.epochs == 4
