import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import NonFiniteError, NotCalibratedError, PlanError
from isogrid.planning.state import quantizers
from tests.models import make, prepared


def uncalibrated() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, inputs = make("small")
    return prepared(model, inputs, calibrate=False), inputs


def test_ranges_come_from_the_data() -> None:
    model, (x,) = make("small")
    prepared(model, (x,), rules=[ig.Rule(match="*", range="minmax")], calibrate=False)
    assert ig.calibrate(model, [x, (2 * x, "label"), [x]]) is model
    spread = 2 * (x.max() - x.min())
    torch.testing.assert_close(model.conv.input_quantizer.scale.detach(), spread.reshape(1) / 255)
    assert all(q.is_calibrated for q in quantizers(model).values())


def test_it_starts_anew_each_time() -> None:
    model, (x,) = uncalibrated()
    first = [q.scale.clone() for q in quantizers(ig.calibrate(model, [x])).values()]
    ig.calibrate(model, [100 * x])
    again = [q.scale.clone() for q in quantizers(ig.calibrate(model, [x])).values()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_model_is_left_alone() -> None:
    model, inputs = uncalibrated()
    model.train()
    model.norm.eval()
    flags = [module.training for module in model.modules()]
    running = model.norm.running_mean.clone()
    switches = [(q.enabled, q.observing) for q in quantizers(model).values()]
    ig.calibrate(model, [inputs])
    assert [module.training for module in model.modules()] == flags
    assert [(q.enabled, q.observing) for q in quantizers(model).values()] == switches
    assert torch.equal(model.norm.running_mean, running)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.nn.modules.module._has_any_global_hook()


def test_weights_are_fitted_to_what_they_are_now() -> None:
    model, inputs = uncalibrated()
    before = model.fc.weight_quantizer.scale.detach().clone()
    with torch.no_grad():
        model.fc.weight.mul_(4)
    ig.calibrate(model, [inputs])
    torch.testing.assert_close(model.fc.weight_quantizer.scale.detach(), 4 * before)


def test_batches_as_loaders_give_them() -> None:
    model, inputs = make("two inputs")
    prepared(model, inputs, calibrate=False)
    ig.calibrate(model, [{"x": inputs[0], "z": inputs[1]}, (*inputs, "label")])
    ig.calibrate(model, [("label", inputs)], forward=lambda model, batch: model(*batch[1]))
    with pytest.raises(PlanError, match="has 1 elements and the model takes 2"):
        ig.calibrate(model, [(inputs[0],)])
    with pytest.raises(PlanError, match="not a int"):
        ig.calibrate(model, [3])
    with pytest.raises(PlanError, match=r"no 'z'; it has x, label\. The model takes x, z"):
        ig.calibrate(model, [{"x": inputs[0], "label": 1}])


def test_nothing_to_calibrate_with() -> None:
    model, (x,) = uncalibrated()
    with pytest.raises(NotCalibratedError, match="Pass at least one"):
        ig.calibrate(model, [])
    with pytest.raises(NotCalibratedError, match="Batch 1 is empty"):
        ig.calibrate(model, [x, x[:0]])
    with pytest.raises(NotCalibratedError, match="Batch 0 is empty"):
        ig.calibrate(model, [()])


def test_numbers_that_are_none_are_found_where_they_are() -> None:
    model, (x,) = uncalibrated()
    with pytest.raises(NonFiniteError, match="At conv: NaN or infinity"):
        ig.calibrate(model, [x, x * torch.nan])
    assert not any(q.observing for q in quantizers(model).values())
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"At conv.output_quantizer"):
        ig.calibrate(model, [x])


def test_a_site_that_no_batch_reaches_is_named() -> None:
    model, (x,) = make("dynamic")
    prepared(model, (x,), calibrate=False)
    with pytest.raises(NotCalibratedError, match=r"b.output_quantizer saw nothing in the batches"):
        ig.calibrate(model, [-x])


def test_before_it_nothing_is_quantised() -> None:
    model, inputs = uncalibrated()
    with pytest.raises(NotCalibratedError, match=r"Run isogrid.calibrate\(model, batches\)"):
        model(*inputs)
