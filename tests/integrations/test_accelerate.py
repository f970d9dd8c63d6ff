"""A loop on Accelerate needs nothing but its own calls: its checkpoints hold the schedule's position with the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import isogrid as ig
from isogrid.integrations.deployed import evaluate_deployed

accelerate = pytest.importorskip("accelerate")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 4, generator=generator), torch.randint(3, (48,), generator=generator))


def run(folder: Path, start: int = 0, stop: int = 6, mixed_precision: str = "no") -> tuple[list[float], nn.Module]:
    """Steps of two accumulated batches; a checkpoint after each."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = data().tensors[0]
    ig.calibrate(ig.prepare(model, ig.plan(model, scheme="w4a8", example_inputs=(x,))), [x])
    teacher, distillation = ig.teacher(model), ig.Distillation(task=0.2)
    optimizer = torch.optim.AdamW(ig.parameter_groups(model, lr=1e-2))
    schedule = ig.Schedule(model, total_steps=6, weight_only_steps=1, ramp_steps=2)
    # Without a generator of its own, a loader draws from the one that dropout draws from.
    loader = DataLoader(data(), batch_size=4, generator=torch.Generator())
    trained, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if start:
        accelerator.load_state(str(folder / str(start)))
    trained.train()
    losses: list[Any] = []
    batches = accelerator.skip_first_batches(loader, 2 * start)
    for number, (inputs, targets) in enumerate(batches, start=2 * start):
        with accelerator.accumulate(trained):
            said = teacher(inputs)
            loss = distillation(trained(inputs), said, targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if accelerator.sync_gradients:
            schedule.step()
            accelerator.save_state(str(folder / str(schedule.position)))
            if schedule.position == stop:
                break
        assert number < 2 * stop
    assert schedule.position == stop
    return losses, model


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_resumed_run_has_the_losses_it_would_have_had(tmp_path: Path, mixed_precision: str) -> None:
    whole, model = run(tmp_path / "whole", mixed_precision=mixed_precision)
    again, resumed = run(tmp_path / "whole", start=2, mixed_precision=mixed_precision)
    assert again == whole[4:]
    state = resumed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_evaluation_may_run_what_is_deployed(tmp_path: Path) -> None:
    _, model = run(tmp_path)
    x = data().tensors[0]
    deployed = evaluate_deployed(model)
    assert evaluate_deployed(model) is deployed
    with torch.no_grad():
        assert torch.equal(model.eval()(x), ig.convert(model)(x))
        assert model.train()(x).shape == (48, 3)
        first = deployed.twin()
        ig.Schedule(model, total_steps=10).step()
        assert deployed.twin() is not first
    deployed.forget()
    assert ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [x])
