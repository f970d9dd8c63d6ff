"""A model larger than memory: what is read from shards a block at a time comes to the same end, in few blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CheckpointError, PlanError
from isogrid.layers.coded import CodedLinear
from isogrid.training.memory import peak_bytes, tensor_bytes
from isogrid.training.shards import INDEX
from tests.formats.helpers import assert_equal
from tests.training.test_blockwise import BATCHES, Stack

FAST = [ig.Rule(match="head", keep="float"), ig.Rule(match="Linear", range="minmax")]
SETTINGS = ig.Blockwise(epochs=2, lr=3e-3, scale_lr=1e-2, checkpoint_every=3)


def written(model: nn.Module, folder: Path) -> Path:
    """A model's weights in three shards with an index."""
    folder.mkdir(exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def float_model(blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Stack(blocks)


def skeleton(blocks: int = 3) -> nn.Module:
    with torch.device("meta"):
        return Stack(blocks)


def planned(model: nn.Module) -> ig.Plan:
    return ig.plan(model, scheme="w2a16-asym", rules=FAST, example_inputs=(BATCHES[0],))


def on_disk(folder: Path, weights: Path, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    model = skeleton()
    plan = planned(model)
    return model, ig.train_blockwise_on_disk(model, plan, weights, BATCHES, SETTINGS, folder=folder, **options)


@pytest.fixture(scope="module")
def in_memory() -> tuple[nn.Module, tuple[Any, ...]]:
    model = float_model()
    ig.prepare(model, planned(model))
    results = ig.train_blockwise(model, BATCHES, SETTINGS)
    return model.eval(), results


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(float_model(), tmp_path_factory.mktemp("weights"))


def test_blocks_from_disk_train_as_in_memory(in_memory: Any, weights: Path, tmp_path: Path) -> None:
    model, results = on_disk(tmp_path / "run", weights)
    assert results == in_memory[1]
    expected = in_memory[0](BATCHES[0]).detach()
    assert_equal(model.eval()(BATCHES[0]).detach(), expected)
    assert isinstance(model.blocks[2].down, CodedLinear)
    assert_equal(ig.convert(model)(BATCHES[0]), expected)
    # What follows is as ever: the second stage, and a checkpoint.
    assert ig.freeze_codes(model) == {}
    assert ig.parameter_groups(model, lr=1e-3)[0]["name"] == "blocks.0.up.weight_quantizer"
    ig.save(model, tmp_path / "saved")
    again = ig.restore(float_model(), tmp_path / "saved")
    assert_equal(again.eval()(BATCHES[0]).detach(), expected)


@pytest.mark.parametrize("count", [5, 9, 24])
def test_a_run_that_is_killed_goes_on(count: int, in_memory: Any, weights: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    steps: list[int] = []

    def after_step(path: str, step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == count:
            raise Killed

    with pytest.raises(Killed):
        on_disk(tmp_path, weights, after_step=after_step)
    model, results = on_disk(tmp_path, weights)
    assert results == in_memory[1]
    assert_equal(model.eval()(BATCHES[0]).detach(), in_memory[0](BATCHES[0]).detach())


def test_a_plan_without_memory_is_the_plan() -> None:
    assert planned(skeleton()) == planned(float_model())


class WideBlock(nn.Module):
    """Twelve layers, so that what one of them makes on the way is a small part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(128, 128) for _ in range(12)])

    def forward(self, x: Tensor, *, gain: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = x + layer(torch.tanh(x) * gain)
        return (x,)


class Wide(Stack):
    def __init__(self, blocks: int) -> None:
        super().__init__(0)
        self.embedding = nn.Embedding(32, 128)
        self.blocks = nn.ModuleList([WideBlock() for _ in range(blocks)])
        self.head = nn.Linear(128, 8)


def test_memory_is_that_of_one_block_in_training(tmp_path: Path) -> None:
    """Tensors' bytes by the allocator's record: two moments, and what one layer makes on the way.

    Beside the model in memory that is less than 3 blocks; from shards the block itself comes on top.
    """
    blocks = 6
    torch.manual_seed(0)
    model = Wide(blocks)
    folder = written(model, tmp_path / "weights")
    plan, settings = planned(model), ig.Blockwise(epochs=1)
    short = [batch[:1, :2] for batch in BATCHES[:2]]
    block = tensor_bytes(model.blocks[0].parameters())
    around = tensor_bytes([*model.embedding.parameters(), *model.head.parameters()])
    ig.prepare(model, plan)
    assert peak_bytes(lambda: ig.train_blockwise(model, short, settings)) <= 3 * block
    with torch.device("meta"):
        model = Wide(blocks)

    def train() -> None:
        ig.train_blockwise_on_disk(model, plan, folder, short, settings, folder=tmp_path / "run")

    # In the end there are the codes of all blocks: 2 bits, and a scale, a start and a zero point for each group of 64.
    codes = blocks * 12 * (128 * 128 // 4 + 3 * 4 * 2 * 128 + 4 * 128 + 100)
    assert peak_bytes(train) <= 4 * block + around
    assert tensor_bytes(model.state_dict().values()) <= around + codes


def test_bad_shards_are_named(weights: Path, tmp_path: Path) -> None:
    for change, message in (
        (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors is missing, corrupt or truncated"),
        (lambda f: _cut(f / "model-2.safetensors"), "model-2.safetensors is missing, corrupt or truncated"),
        (lambda f: (f / INDEX).write_text("{"), "index.json is corrupt"),
        (lambda f: (f / INDEX).unlink(), "holds neither"),
        (lambda f: _without(f, "blocks.1.up.bias"), "no tensor 'blocks.1.up.bias'"),
        (lambda f: _moved(f, "blocks.1.up.bias"), "has no blocks.1.up.bias, although the index says so"),
        (lambda f: _reshaped(f, "blocks.2.up.weight"), r"its blocks.2.up.weight has shape \[64, 32\], not \[64, 64\]"),
    ):
        folder = written(float_model(), tmp_path / "weights")
        change(folder)
        with pytest.raises(CheckpointError, match=message):
            on_disk(tmp_path / "run", folder)


def test_grids_across_blocks_are_refused(weights: Path, tmp_path: Path) -> None:
    model = skeleton()
    plan = ig.plan(model, scheme="w8a8", example_inputs=(BATCHES[0],))
    with pytest.raises(PlanError, match=r"cannot be prepared alone.*w4a16"):
        ig.train_blockwise_on_disk(model, plan, weights, BATCHES, folder=tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _names(folder: Path) -> dict[str, str]:
    names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return names


def _without(folder: Path, name: str) -> None:
    names = _names(folder)
    del names[name]
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def _moved(folder: Path, name: str) -> None:
    names = _names(folder)
    names[name] = f"model-{(int(names[name][6]) + 1) % 3}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def _reshaped(folder: Path, name: str) -> None:
    path = folder / _names(folder)[name]
    tensors: dict[str, Tensor] = load_file(path)
    save_file({**tensors, name: tensors[name][:, :32].contiguous()}, path)
