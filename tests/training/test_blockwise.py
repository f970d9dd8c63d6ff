"""Block-wise training: what it compares, that it comes to the same end however often it is stopped, and bad input."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CheckpointError, MemoryExhaustedError, NonFiniteError, NotCalibratedError, PlanError
from isogrid.quantizers import Quantizer
from isogrid.training.block_sources import moved
from isogrid.training.blocks import Call, find_blocks
from tests.formats.helpers import assert_equal

NO_MOVE = ig.Blockwise(epochs=1, lr=1e-30, scale_lr=1e-30)
QUICK = ig.Blockwise(epochs=3, lr=3e-3, scale_lr=1e-2, checkpoint_every=2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, *, gain: Tensor) -> tuple[Tensor]:
        return (x + self.down(torch.tanh(self.up(x)) * gain),)


class Stack(nn.Module):
    """Blocks that return tuples, and take a tensor beside the hidden state that depends on the batch."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x, gain = self.embedding(ids), (ids % 3 + 1).unsqueeze(-1) / 2
        for block in self.blocks:
            (x,) = block(x, gain=gain)
        return self.head(x)


BATCHES = [torch.randint(0, 32, (2 + n % 2, 6), generator=torch.Generator().manual_seed(n)) for n in range(4)]


@cache
def prepared(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    model = Stack()
    return ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=(BATCHES[0],)))


def made(scheme: str = "w2a16-asym") -> tuple[nn.Module, list[Tensor]]:
    """A prepared model, the same each time, and batches of two sizes."""
    return copy.deepcopy(prepared(scheme)), BATCHES


def outputs(model: nn.Module, batch: Tensor, quantized: bool) -> list[Tensor]:
    """What each block returns in the whole model."""
    model = copy.deepcopy(model).eval()
    for quantizer in [m for m in model.modules() if isinstance(m, Quantizer)]:
        quantizer.enabled = quantized
    found: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: found.append(output[0].detach()))
    model(batch)
    return found


def test_the_quantised_block_on_quantised_inputs_is_held_against_the_float_model() -> None:
    model, batches = made()
    expected = [
        [float(F.mse_loss(q, f)) for q, f in zip(outputs(model, b, True), outputs(model, b, False), strict=True)]
        for b in batches
    ]
    results = ig.train_blockwise(model, batches, NO_MOVE)
    assert [result.path for result in results] == ["blocks.0", "blocks.1", "blocks.2"]
    for index, result in enumerate(results):
        assert sorted(result.losses) == sorted(losses[index] for losses in expected)


@pytest.mark.parametrize("scheme", ["w2a16-asym", "w2a16", "q4_0"])
def test_losses_fall_and_only_the_block_in_training_moves(scheme: str) -> None:
    model, batches = made(scheme)
    before = copy.deepcopy(model.state_dict())
    seen: list[str] = []

    def after_step(path: str, step: int, loss: float) -> None:
        for name, tensor in model.state_dict().items():
            if not name.startswith(path) and name.rpartition("blocks.")[2][0] not in {p[-1] for p in seen}:
                assert_equal(tensor, before[name])
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(path))
        seen.append(path)

    results = ig.train_blockwise(model, batches, QUICK, after_step=after_step)
    assert all(result.after < 0.9 * result.before for result in results)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("embedding", "head")) for name in moved)
    assert {f"blocks.{n}.up.weight" for n in range(3)} <= moved
    if scheme == "w2a16-asym":
        assert "blocks.0.up.weight_quantizer.zero_point" in moved


def test_what_was_trained_is_what_is_stored() -> None:
    model, batches = made()
    ig.train_blockwise(model, batches, QUICK)
    model.eval()
    trained = model(batches[0]).detach()
    assert_equal(ig.convert(model)(batches[0]), trained)
    assert ig.freeze_codes(model) == {}
    assert_equal(model(batches[0]).detach(), trained)


class Killed(BaseException):
    """The process ends."""


def killed_after(count: int) -> Callable[[str, int, float], None]:
    steps: list[int] = []

    def after_step(path: str, step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == count:
            raise Killed

    return after_step


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    model, batches = made()
    results = ig.train_blockwise(model, batches, QUICK)
    return model.state_dict(), results


@pytest.mark.parametrize("count", [1, 11, 12, 25])
def test_a_run_that_is_killed_at_a_step_ends_as_if_it_was_not(
    count: int, uninterrupted: tuple[dict[str, Tensor], tuple[Any, ...]], tmp_path: Path
) -> None:
    model, batches = made()
    with pytest.raises(Killed):
        ig.train_blockwise(model, batches, QUICK, folder=tmp_path, after_step=killed_after(count))
    again, batches = made()
    results = ig.train_blockwise(again, batches, QUICK, folder=tmp_path)
    assert results == uninterrupted[1]
    for name, tensor in again.state_dict().items():
        assert_equal(tensor, uninterrupted[0][name])


@pytest.mark.parametrize("count", [1, 5, 9, 12, 20])
def test_a_run_that_is_killed_while_it_writes_ends_as_if_it_was_not(
    count: int, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file may be the last that was begun; it is never the one that is read."""
    from isogrid import files

    names: list[str] = []
    rename = files.rename

    def dying(source: Path, target: Path) -> None:
        names.append(target.name)
        if len(names) == count * 2:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(files, "rename", dying)
    model, batches = made()
    with pytest.raises(Killed):
        ig.train_blockwise(model, batches, QUICK, folder=tmp_path)
    monkeypatch.undo()
    again, batches = made()
    assert ig.train_blockwise(again, batches, QUICK, folder=tmp_path) == uninterrupted[1]
    for name, tensor in again.state_dict().items():
        assert_equal(tensor, uninterrupted[0][name])


def test_a_finished_run_is_taken_over(uninterrupted: Any, tmp_path: Path) -> None:
    model, batches = made()
    ig.train_blockwise(model, batches, QUICK, folder=tmp_path)
    assert not list(tmp_path.glob("hidden/0000*"))
    again, batches = made()
    results = ig.train_blockwise(again, batches, QUICK, folder=tmp_path, after_step=killed_after(1))
    assert results == uninterrupted[1]
    assert_equal(again(batches[0]).detach(), model(batches[0]).detach())


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    model, batches = made()
    ig.train_blockwise(model, batches, NO_MOVE, folder=tmp_path)
    model, batches = made()
    with pytest.raises(CheckpointError, match="other settings"):
        ig.train_blockwise(model, batches, QUICK, folder=tmp_path)
    with pytest.raises(CheckpointError, match="other batches"):
        ig.train_blockwise(model, batches[1:], NO_MOVE, folder=tmp_path)
    with pytest.raises(CheckpointError, match="embedded data"):
        ig.train_blockwise(model, [31 - b for b in batches], NO_MOVE, folder=tmp_path)
    with pytest.raises(CheckpointError, match="other blocks"):
        ig.train_blockwise(model, batches, NO_MOVE, blocks="blocks.[01]", folder=tmp_path)
    file = tmp_path / "block-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"block-0001.safetensors is missing, corrupt or truncated"):
        ig.train_blockwise(model, batches, NO_MOVE, folder=tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_keeps_what_was_trained(error: Exception, uninterrupted: Any, tmp_path: Path) -> None:
    model, batches = made()
    calls: list[nn.Module] = []

    def exhausted(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 8:
            raise error

    hook = model.blocks[1].down.register_forward_pre_hook(exhausted)
    with pytest.raises(MemoryExhaustedError, match=r"Block 'blocks.1' ran out of memory.*Use smaller"):
        ig.train_blockwise(model, batches, QUICK, folder=tmp_path)
    assert all(parameter.grad is None for parameter in model.parameters())
    hook.remove()
    assert ig.train_blockwise(model, batches, QUICK, folder=tmp_path) == uninterrupted[1]


def test_bad_input_is_named() -> None:
    model, batches = made()
    with pytest.raises(PlanError, match="not prepared"):
        ig.train_blockwise(Stack(), batches)
    with pytest.raises(NotCalibratedError, match="no batch"):
        ig.train_blockwise(model, [])
    with pytest.raises(PlanError, match=r"matches no module. Lists of modules: blocks"):
        ig.train_blockwise(model, batches, blocks="layers.*")
    with pytest.raises(PlanError, match=r"out of order|does not reach|not what"):
        ig.train_blockwise(model, batches, blocks="blocks.1.*")
    with pytest.raises(PlanError, match="rates above 0"):
        ig.Blockwise(lr=-1.0)
    with pytest.raises(PlanError, match="Unknown optimizer 'adamx'"):
        ig.train_blockwise(model, batches, ig.Blockwise(optimizer="adamx"))
    model.requires_grad_(False)
    with pytest.raises(PlanError, match=r"'blocks.0' has nothing to train"):
        ig.train_blockwise(model, batches)
    model, batches = made()
    model.blocks[1].up.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"loss of block 'blocks.1' is nan at step 1"):
        ig.train_blockwise(model, batches)
    with pytest.raises(PlanError, match="No list of blocks"):
        find_blocks(nn.Linear(2, 2))


HOME, AWAY = torch.device("cpu"), torch.device("cpu", 0)
"""Two names of the same memory: modules are seen to move where there is no other device to move them to."""


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[nn.Module, torch.device]:
    """Where modules were last moved to."""
    found: dict[nn.Module, torch.device] = {}
    monkeypatch.setattr(nn.Module, "to", lambda module, device: found.update({module: device}) or module)
    return found


@pytest.mark.parametrize(("scheme", "borrowed"), [("w2a16-asym", 0), ("w8a8", 2)])
def test_a_block_is_on_the_device_while_it_trains_and_then_back(
    scheme: str, borrowed: int, places: dict[nn.Module, torch.device]
) -> None:
    def calibrated() -> nn.Module:
        model, batches = made(scheme)
        return ig.calibrate(model, batches) if scheme == "w8a8" else model

    expected = calibrated()
    results = ig.train_blockwise(expected, BATCHES, QUICK)
    assert set(places.values()) == {HOME}
    places.clear()
    model = calibrated()
    seen: dict[str, int] = {}

    def after_step(path: str, step: int, loss: float) -> None:
        away = {module for module, place in places.items() if place == AWAY} - {model.get_submodule(path)}
        # Beside the block there are only the quantizers of what other parts of the model hand to it.
        assert all(isinstance(module, Quantizer) for module in away)
        assert places[model.get_submodule(path)] == AWAY
        seen[path] = len(away)

    assert ig.train_blockwise(model, BATCHES, QUICK, device=AWAY, after_step=after_step) == results
    assert seen == {"blocks.0": 0, "blocks.1": borrowed, "blocks.2": borrowed}
    assert set(places.values()) == {HOME}
    for name, tensor in expected.state_dict().items():
        assert_equal(model.state_dict()[name], tensor)


def test_a_block_comes_back_from_the_device_when_it_fails(
    uninterrupted: Any, tmp_path: Path, places: dict[nn.Module, torch.device]
) -> None:
    model, _ = made()

    def after_step(path: str, step: int, loss: float) -> None:
        if path == "blocks.1" and step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(MemoryExhaustedError, match=r"blocks\.1"):
        ig.train_blockwise(model, BATCHES, QUICK, folder=tmp_path, device=AWAY, after_step=after_step)
    assert places == {model.blocks[0]: HOME, model.blocks[1]: HOME}
    assert ig.train_blockwise(model, BATCHES, QUICK, folder=tmp_path, device=AWAY) == uninterrupted[1]
    assert set(places.values()) == {HOME}


def test_a_call_that_moves_knows_its_hidden_state_again() -> None:
    hidden, mask = torch.ones(2, 3), torch.zeros(2, 3)
    call = moved(Call((hidden, 7), {"mask": mask, "again": hidden}, hidden), torch.device("meta"))
    assert call.args[0] is call.hidden and call.kwargs["again"] is call.hidden
    assert {tensor.device.type for tensor in (call.hidden, call.kwargs["mask"])} == {"meta"}
    assert call.args[1] == 7
    other = torch.empty(2, 3, device="meta")
    received: list[Any] = []
    call.run(lambda *args, **kwargs: received.extend([args, kwargs]) or args[0], other)
    assert received[0][0] is other and received[1]["again"] is other and received[1]["mask"] is call.kwargs["mask"]
