"""TensorFlow's fake quantisation, held against its formulas written out in numpy, float32 step by step."""

from typing import Any

import numpy as np
import pytest
import torch

import isogrid as ig
from isogrid.errors import FormatError, TargetError
from isogrid.formats import Affine, named_format
from isogrid.quantizers import LSQ, MinMax, Nudged, Quantizer, StraightThrough
from isogrid.quantizers.functional import Operand, fake_quantize
from isogrid.quantizers.observer import Observer

F = np.float32
Array = np.ndarray[Any, np.dtype[np.float32]]

# Named after TensorFlow's arguments: bits and narrow_range.
FORMATS = {
    (8, False): "uint8/tensor:half_up",
    (8, True): "uint8/tensor:half_up,narrow",
    (4, False): "uint4/tensor:half_up",
    (2, True): "uint2/tensor:half_up,narrow",
}


def nudge(lowest: F, highest: F, bits: int, narrow: bool) -> tuple[F, F, F, F, F]:
    """`Nudge` of tensorflow/core/kernels/fake_quant_ops_functor.h, and the zero point inside it."""
    least, most = F(1 if narrow else 0), F(2**bits - 1)
    scale = F(highest - lowest) / F(most - least)
    inverse = F(most - least) / F(highest - lowest)
    from_lowest = F(least - F(lowest / scale))
    zero_point = F(np.clip(np.floor(np.float64(from_lowest) + 0.5), least, most))
    return F(least - zero_point) * scale, F(most - zero_point) * scale, scale, inverse, zero_point


def tensorflow_codes(x: Array, lowest: F, highest: F, bits: int, narrow: bool) -> tuple[Array, Array]:
    """`FakeQuantWithMinMaxVarsFunctor` of the same file: whole steps from zero, and the values."""
    nudged_lowest, nudged_highest, scale, inverse, _ = nudge(lowest, highest, bits, narrow)
    zero = np.floor(-nudged_lowest * inverse + F(0.5))
    shifted = np.maximum(np.minimum(x, nudged_highest), nudged_lowest) - nudged_lowest
    steps = np.floor(shifted * inverse - zero + F(0.5))
    return steps, steps * scale


@pytest.mark.parametrize(("bits", "narrow"), FORMATS)
def test_scale_and_zero_point_are_tensorflows(bits: int, narrow: bool) -> None:
    """Random ends, ends on one side of zero, and ends whose zero point is a tie."""
    fmt = named_format(FORMATS[bits, narrow])
    ends = torch.randn(500, 2, generator=torch.Generator().manual_seed(bits)).sort(1).values
    steps = 2**bits - 1 - narrow
    ties = torch.stack((-(torch.arange(steps) + 0.5), steps - torch.arange(steps) - 0.5), 1)
    for lowest, highest in torch.cat((ends, ties)).tolist():
        affine = Nudged().fit(torch.tensor([[lowest, highest]]), fmt)
        # tfmot stretches the range to hold zero before it calls TensorFlow.
        _, _, scale, _, zero_point = nudge(F(min(lowest, 0.0)), F(max(highest, 0.0)), bits, narrow)
        assert affine.scale is not None and affine.zero_point is not None
        assert F(affine.scale.item()) == scale
        assert affine.zero_point.item() == zero_point


@pytest.mark.parametrize(("bits", "narrow"), FORMATS)
def test_every_tie_and_every_code_where_the_scale_is_a_power_of_two(bits: int, narrow: bool) -> None:
    """There float32 is exact, so all steps between the ends must be TensorFlow's, and the values with them."""
    fmt = named_format(FORMATS[bits, narrow])
    steps = 2**bits - 1 - narrow
    for below in {0, 1, steps // 2, steps - 1}:
        lowest, highest = F(-below * 0.25), F((steps - below) * 0.25)
        x = np.arange(-4 * below - 9, 4 * (steps - below) + 9, dtype=F) * F(0.0625)
        rows = torch.tensor([[lowest, highest]])
        affine = Nudged().fit(rows, fmt)
        expected_steps, expected = tensorflow_codes(x, lowest, highest, bits, narrow)
        quantized = fmt.quantize(torch.from_numpy(x), affine.scale, affine.zero_point)
        assert affine.zero_point is not None
        assert np.array_equal(quantized.codes.numpy() - affine.zero_point.item(), expected_steps)
        assert np.array_equal(quantized.dequantize().numpy(), expected)


def test_other_scales_differ_only_within_float32s_rounding_of_a_tie() -> None:
    """TensorFlow multiplies by the reciprocal and shifts before it rounds; Isogrid divides, as runtimes do."""
    fmt = named_format("uint8/tensor:half_up")
    x = np.random.default_rng(0).normal(size=1_000_000).astype(F)
    lowest, highest = F(-2.7), F(3.1)
    affine = Nudged().fit(torch.tensor([[lowest, highest]]), fmt)
    assert affine.scale is not None and affine.zero_point is not None
    steps, _ = tensorflow_codes(x, lowest, highest, 8, False)
    own = fmt.quantize(torch.from_numpy(x), affine.scale, affine.zero_point).codes.numpy() - affine.zero_point.item()
    differs = steps != own
    exact = x.astype(np.float64) / affine.scale.double().item()
    # 256 codes take 8 of float32's 24 bits: a handful of roundings move a value by less than 2**-14 of a step.
    assert (np.abs(exact[differs] - np.floor(exact[differs]) - 0.5) < 2.0**-14).all()
    assert np.abs(steps - own).max() <= 1
    assert differs.mean() < 2e-5


def test_ties_go_up_where_others_go_to_the_even_code() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    up, even = named_format("int8/tensor:half_up"), named_format("int8/tensor")
    assert up.quantize(x, torch.ones(1)).codes.tolist() == [-2, -1, 0, 1, 2, 3]
    assert even.quantize(x, torch.ones(1)).codes.tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("narrow", [True, False])
def test_symmetric_weights_are_those_of_tfmot(narrow: bool) -> None:
    """`LastValueQuantize(symmetric=True)`: the ends mirrored, the grid shifted by 128."""
    fmt = named_format("int8/channel:half_up" + ",narrow" * narrow)
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    affine = Nudged().fit(weight, fmt)
    assert affine.scale is not None
    for row, scale in zip(weight.numpy(), affine.scale.tolist(), strict=True):
        ratio = F(-1.0) if narrow else F(-(2**8 - 2) / 2**8)
        lowest = min(row.min(), F(row.max() / ratio))
        highest = max(row.max(), F(row.min() * ratio))
        _, _, expected, _, zero_point = nudge(lowest, highest, 8, narrow)
        assert F(scale) == expected
        assert zero_point == 128


def test_activations_follow_tfmots_moving_average() -> None:
    """A plain mean of the first batches, then its decay: what is averaged are the ends, and then they are nudged."""
    batches = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    observer = Observer.for_range(Nudged())
    assert observer.momentum == 0.999
    for batch in batches:
        observer.observe(batch)
    fmt = named_format("uint8/tensor:half_up")
    ends = torch.stack((observer.mean_lowest, observer.mean_highest), 1)
    assert torch.allclose(ends, torch.stack((batches.amin(1).mean(), batches.amax(1).mean())), rtol=1e-5)
    affine, expected = observer.affine(fmt, Nudged()), Nudged().fit(ends, fmt)
    assert affine == expected


def test_it_trains_and_the_gradient_stops_at_the_nudged_ends() -> None:
    """`FakeQuantWithMinMaxVarsGradientFunctor` passes what lies between the nudged ends; LSQ's mask is the same."""
    fmt = named_format("uint8/tensor:half_up")
    quantizer = Quantizer(fmt, (1,), Nudged(), LSQ(), "learned", observes=True)
    affine = Nudged().fit(torch.tensor([[-1.0, 1.55]]), fmt)
    quantizer.set_affine(affine)
    assert affine.scale is not None
    x = torch.linspace(-2, 3, 501).requires_grad_()
    operand = Operand(fmt, LSQ(), Affine(affine.scale, affine.zero_point), {})
    assert torch.equal(quantizer(x), fake_quantize(x, operand))
    quantizer(x).sum().backward()
    assert x.grad is not None
    lowest, highest, *_ = nudge(F(-1.0), F(1.55), 8, False)
    inside = (x.detach() >= float(lowest)) & (x.detach() <= float(highest))
    assert torch.equal(x.grad, inside.float())


def test_ste_masks_by_the_rounded_code_also_where_ties_go_up() -> None:
    x = torch.tensor([-0.6, -0.5, 15.4, 15.5], requires_grad=True)
    operand = Operand(named_format("uint4/tensor:half_up,symmetric"), StraightThrough(), Affine(torch.ones(1)), {})
    fake_quantize(x, operand).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_all_zeros_and_formats_that_tensorflow_does_not_know() -> None:
    fmt = named_format("uint8/tensor:half_up")
    assert Nudged().fit(torch.zeros(1, 3), fmt) == MinMax().fit(torch.zeros(1, 3), fmt)
    for name in ("q4_1", "nf4/tensor", "int4/tensor:midrise"):
        with pytest.raises(FormatError, match="TensorFlow's fake quantisation knows"):
            Nudged().fit(torch.ones(1, 32), named_format(name))


def test_runtimes_that_round_to_even_take_such_weights_but_no_such_activations() -> None:
    """A weight is stored as codes, however they were rounded; activations are rounded by the runtime."""
    model, x = torch.nn.Linear(4, 4), torch.zeros(1, 4)
    plan = ig.plan(model, rules=[ig.Rule(match="*", weight="int8/channel:half_up,narrow")], example_inputs=(x,))
    assert plan.site(".weight").format == "int8/channel:half_up,narrow"
    with pytest.raises(TargetError, match="half_up"):
        rules = [ig.Rule(match="*", activation="uint8/tensor:half_up", range="nudged")]
        ig.plan(model, rules=rules, example_inputs=(x,))
