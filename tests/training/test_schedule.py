from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import NotCalibratedError, PlanError
from isogrid.planning.state import absorbed_batch_norms, activation_quantizers, steps_done, weight_quantizers
from tests.models import assert_equal, make, prepared

PHASES: dict[str, int] = {"float_steps": 1, "observe_steps": 2, "weight_only_steps": 1, "ramp_steps": 3}


def switches(model: nn.Module) -> tuple[bool, bool, bool, bool, bool, bool]:
    """Weights on, activations on, observing, ramping, ranges frozen, batch norm frozen; the same everywhere."""
    weights, activations = weight_quantizers(model).values(), activation_quantizers(model).values()
    found = {
        (
            *(q.enabled for q in weights if q is weight),
            *(q.enabled for q in activations if q is activation),
            activation.observing,
            weight.ramping,
            weight.range_is_frozen,
            norm.statistics_are_frozen,
        )
        for weight in weights
        for activation in activations
        for norm in absorbed_batch_norms(model)
    }
    assert len(found) == 1
    return found.pop()  # type: ignore[return-value]


def test_every_switch_at_every_step() -> None:
    model, inputs = make("small")
    schedule = ig.Schedule(prepared(model, inputs), 12, **PHASES, freeze_batch_norm=0.75, freeze_ranges=0.9)
    names, seen = [], []
    for _ in range(12):
        names.append(schedule.phase)
        seen.append(switches(model))
        model.train()(*inputs)
        schedule.step()
    assert names == ["float", *["observe"] * 2, "weights", *["ramp"] * 3, *["quantized"] * 5]
    assert [s[0] for s in seen] == [False] * 3 + [True] * 9
    assert [s[1] for s in seen] == [False] * 4 + [True] * 8
    assert [s[2] for s in seen] == [False] + [True] * 2 + [False] * 9
    assert [s[3] for s in seen] == [False] * 4 + [True] * 3 + [False] * 5
    assert [s[4] for s in seen] == [False] * 11 + [True]
    assert [s[5] for s in seen] == [False] * 9 + [True] * 3


def test_float_steps_are_the_float_model() -> None:
    float_model, inputs = make("residual")
    model = prepared(make("residual")[0], inputs)
    ig.Schedule(model, 4, float_steps=2)
    for each in (float_model, model):
        torch.manual_seed(0)
        each.train()
    torch.manual_seed(0)
    expected = float_model(*inputs)
    torch.manual_seed(0)
    assert_equal(model(*inputs), expected)


def test_the_ramp_blends() -> None:
    model, inputs = make("small")
    schedule = ig.Schedule(prepared(model, inputs, "w2a8"), 10, ramp_steps=3)
    strengths = []
    for _ in range(4):
        strengths.append({float(q.strength) for q in weight_quantizers(model).values() if q.ramping})
        schedule.step()
    assert strengths == [{0.25}, {0.5}, {0.75}, set()]


def test_observing_needs_no_calibration_and_sets_ranges_from_what_training_saw() -> None:
    model, inputs = make("small")
    prepared(model, inputs, rules=[ig.Rule(match="*", range="minmax")], calibrate=False)
    schedule = ig.Schedule(model, 4, observe_steps=2)
    for factor in (1.0, 3.0):
        model.train()(inputs[0] * factor)
        with torch.no_grad():
            model.eval()(inputs[0] * 100)  # evaluation does not count
        schedule.step()
    quantizer = model.conv.input_quantizer
    spread = 3 * (inputs[0].max() - inputs[0].min())
    torch.testing.assert_close(quantizer.scale, spread.reshape(1) / 255)


def test_observing_what_is_never_reached_says_where() -> None:
    model, (x,) = make("dynamic")
    prepared(model, (x,), calibrate=False)
    schedule = ig.Schedule(model, 4, observe_steps=1)
    model.train()(-x)
    with pytest.raises(NotCalibratedError, match=r"b.output_quantizer saw nothing"):
        schedule.step()
    assert schedule.position == 0


def test_the_position_is_in_the_state_dict_and_evaluation_does_not_count() -> None:
    model, inputs = make("small")
    schedule = ig.Schedule(prepared(model, inputs), 4)
    schedule.step()
    model.eval()(*inputs)
    assert schedule.position == int(model.state_dict()["isogrid_step"]) == int(steps_done(model)) == 1


@pytest.mark.parametrize("made_before_loading", [True, False])
def test_it_goes_on_where_the_checkpoint_was(made_before_loading: bool) -> None:
    model, inputs = make("small")
    schedule = ig.Schedule(prepared(model, inputs), 8, ramp_steps=4, freeze_batch_norm=0.25)
    for _ in range(3):
        schedule.step()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = prepared(make("small")[0], inputs)
    if made_before_loading:
        again = ig.Schedule(other, 8, ramp_steps=4, freeze_batch_norm=0.25)
        other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        again = ig.Schedule(other, 8, ramp_steps=4, freeze_batch_norm=0.25)
    assert (again.position, again.phase) == (3, "ramp")
    assert switches(other) == switches(model)
    assert other.conv.weight_quantizer.strength == model.conv.weight_quantizer.strength


def test_frozen_ranges_do_not_move() -> None:
    model, inputs = make("small")
    schedule = ig.Schedule(prepared(model, inputs), 2, freeze_ranges=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        before = model.fc.weight_quantizer.scale.detach().clone()
        optimizer.zero_grad()
        model.train()(*inputs).square().sum().backward()
        optimizer.step()
        schedule.step()
        moved.append(not torch.equal(model.fc.weight_quantizer.scale.detach(), before))
    assert moved == [True, False]


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model, inputs = make("small")
    ig.Schedule(prepared(model, inputs), 2, freeze_batch_norm=0.0)
    before = model.norm.running_mean.clone()
    model.train()(*inputs)
    assert_equal(model.norm.running_mean, before)


@pytest.mark.parametrize(
    "arguments",
    [{"total_steps": 0}, {"total_steps": 3, "ramp_steps": 4}, {"total_steps": 3, "float_steps": -1},
     {"total_steps": 3, "freeze_ranges": 1.5}],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments: dict[str, Any]) -> None:
    model, inputs = make("small")
    prepared(model, inputs)
    with pytest.raises(PlanError, match="total_steps"):
        ig.Schedule(model, **arguments)


def test_a_model_that_is_not_prepared() -> None:
    with pytest.raises(PlanError, match="not prepared"):
        ig.Schedule(nn.Linear(1, 1), 3)
