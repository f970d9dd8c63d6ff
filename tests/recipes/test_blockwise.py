"""A recipe whose blocks train first and whose scales train then: killed in either stage, it ends the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isogrid.errors import MemoryExhaustedError, RecipeError
from isogrid.recipes.document import parse
from isogrid.recipes.loading import load_recipe, validated
from isogrid.recipes.progress import Silent
from isogrid.recipes.runner import run
from isogrid.recipes.schema import Recipe
from isogrid.recipes.tokens import byte_level_tokenizer
from tests.recipes.test_language import prose

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


class Killed(BaseException):
    """The process ends."""


class Dying(Silent):
    """Ends the process at some moment of a task."""

    def __init__(self, task: str, at: int):
        self.name, self.left = task, at

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        def advance(text: str) -> None:
            if title.startswith(self.name):
                self.left -= 1
                if self.left == 0:
                    raise Killed

        yield advance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blockwise")
    (path / "text.txt").write_text(prose(0, 3000), encoding="utf-8")
    byte_level_tokenizer((prose(1, 2000),), 320).save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
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
        run(recipe(folder, tmp_path), progress=Dying(task, at))
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
