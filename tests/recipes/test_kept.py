"""The float model of the demos is trained once: a run that finds it ends as the one that trained it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isogrid.recipes import runner
from isogrid.recipes.document import parse
from isogrid.recipes.english import English
from isogrid.recipes.loading import validated
from isogrid.recipes.progress import Silent
from isogrid.recipes.runner import RunResult, run
from isogrid.recipes.schema import Recipe
from tests.recipes.tiny import prose

RECIPE = """
model: {name: language-model, arguments: {layers: 1, hidden: 64, feed_forward: 64, context: 16}}
data: {name: english, arguments: {length: 16}}
scheme: q4_0
float_training: {steps: 3, batch_size: 2}
calibration: {batches: 1, batch_size: 2}
adapters: {rank: 2}
training: {steps: 2, batch_size: 2}
"""


class Listening(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def recipe(output: Path, text: str = RECIPE) -> Recipe:
    return validated(parse(f"{text}output: {output}\n", "recipe.yaml"))


def trained(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "checkpoint").glob("model-*.safetensors")
    return load_file(file)


def kept(cache: Path) -> set[Path]:
    return set((cache / "isogrid" / "models").glob("*"))


def test_a_float_model_is_trained_once_and_what_follows_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(runner, "finish", lambda *arguments: RunResult((), None, Path()))
    monkeypatch.setattr("isogrid.recipes.language.english", lambda: English((prose(0, 3000),), (prose(1, 300),)))
    first, second = Listening(), Listening()
    run(recipe(tmp_path / "first"), progress=first)
    run(recipe(tmp_path / "second"), progress=second)
    (file,) = kept(tmp_path / "cache")
    assert not any("An earlier run" in text for text in first.said)
    assert any(text.startswith("An earlier run") and str(file) in text for text in second.said)
    before, after = trained(tmp_path / "first"), trained(tmp_path / "second")
    assert before.keys() == after.keys() and any("adapters" in name for name in before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # Another scheme begins with the same model, another training or another text does not.
    run(recipe(tmp_path / "scheme", RECIPE.replace("q4_0", "q4_1")))
    assert kept(tmp_path / "cache") == {file}
    run(recipe(tmp_path / "longer", RECIPE.replace("steps: 3", "steps: 4")))
    assert len(kept(tmp_path / "cache")) == 2
    monkeypatch.setattr("isogrid.recipes.language.english", lambda: English((prose(2, 3000),), (prose(1, 300),)))
    run(recipe(tmp_path / "text"))
    assert len(kept(tmp_path / "cache")) == 3
