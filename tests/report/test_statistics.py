import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isogrid.errors import FormatError
from isogrid.report import layer_statistics

INT2 = range(-2, 2)


def quantize(weight, scale, low=-2, high=1, zero_point=0.0):
    return ((weight / scale).round() + zero_point).clamp(low, high).sub(zero_point) * scale


def test_every_channel_stands_on_the_same_axis():
    """Two channels whose weights differ by a factor of 1000, and their scales too, give one histogram twice over."""
    channel = torch.tensor([-1.5, -0.4, 0.0, 0.3, 0.9, 1.0])
    weight = torch.stack([channel, channel * 1024])
    scale = torch.tensor([[0.5], [512.0]])
    both = layer_statistics("fc", weight, quantize(weight, scale), INT2, "int2/channel", scale=scale)
    one = layer_statistics("fc", weight[:1], quantize(weight, scale)[:1], INT2, "int2/channel", scale=scale[:1])
    assert both.unit == "weight ÷ scale"
    assert both.histogram_edges == one.histogram_edges
    assert both.histogram_counts == tuple(2 * count for count in one.histogram_counts)
    assert both.grid_counts == tuple(2 * count for count in one.grid_counts)
    assert (both.scale.count, both.scale.minimum, both.scale.median, both.scale.maximum) == (2, 0.5, 256.25, 512.0)


def test_a_block_shares_its_scale_and_zero_point():
    weight = torch.tensor([[0.0, 1.0, 10.0, 40.0]])
    scale, zero_point = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 0.0]])
    spread = torch.tensor([[1.0, 1.0, 10.0, 10.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    quantized = quantize(weight, spread[0], 0, 3, spread[1])
    found = layer_statistics("fc", weight, quantized, range(4), "uint2/group2", scale=scale, zero_point=zero_point)
    assert found.grid_counts == (0, 2, 1, 1)
    assert found.saturation == 0.25


def test_an_offset_is_taken_off_before_the_scale():
    weight = torch.tensor([5.0, 5.5, 6.0])
    found = layer_statistics("fc", weight, weight, range(4), "q", scale=torch.tensor([0.5]), offset=torch.tensor([5.0]))
    assert (found.grid_counts, found.sqnr_db) == ((1, 1, 1, 0), math.inf)


def test_sqnr_is_signal_over_noise():
    weight, quantized = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert layer_statistics("fc", weight, quantized, (), "vq").sqnr_db == 10 * math.log10(25 / 0.25)


def test_saturation_is_what_rounding_cannot_explain():
    weight = torch.tensor([-2.6, -2.5, -2.4, 0.0, 1.4, 1.5, 1.6, 9.0])
    found = layer_statistics("fc", weight, quantize(weight, 1.0), INT2, "int2/tensor", scale=torch.tensor(1.0))
    assert found.saturation == 3 / 8


def test_a_weight_far_outside_is_counted_beside_the_picture():
    weight = torch.tensor([-1e6, 0.0, 1.0, 1e6, 1e30])
    found = layer_statistics("fc", weight, quantize(weight, 1.0), INT2, "int2/tensor", scale=torch.tensor(1.0))
    assert (found.below, found.above, sum(found.histogram_counts)) == (1, 2, 2)


def test_nan_and_infinity_are_said_and_left_out():
    weight = torch.tensor([math.nan, math.inf, 1.0, -1.0])
    found = layer_statistics("fc", weight, weight.round(), INT2, "int2/tensor", scale=torch.tensor(1.0))
    assert found.notes == ("NaN or infinite: 2 of 4 weights; the figures cover the rest.",)
    assert (found.grid_counts, found.sqnr_db, found.saturation) == ((0, 1, 0, 1), math.inf, 0.0)


def test_all_nan():
    weight = torch.full((2, 2), math.nan)
    found = layer_statistics("fc", weight, weight, INT2, "int2/tensor", scale=torch.tensor(math.nan))
    assert (found.histogram_counts, found.histogram_edges, found.sqnr_db, found.saturation) == ((), (), None, None)
    assert found.scale is None
    assert found.notes == ("NaN or infinite: 4 of 4 weights; the figures cover the rest.",)


def test_constant_zero_weights():
    weight = torch.zeros(2, 3)
    found = layer_statistics("fc", weight, weight, INT2, "int2/channel", scale=torch.tensor([[1.0], [0.0]]))
    assert (found.sqnr_db, found.grid_counts, found.saturation) == (None, (0, 0, 3, 0), 0.0)
    assert found.notes == (
        "Without a usable scale, and so without a place on the grid: 3 of 6 weights.",
        "Every weight is zero.",
    )


def test_no_weights():
    weight = torch.empty(0, 8)
    found = layer_statistics("fc", weight, weight, INT2, "int2/channel", scale=torch.empty(0, 1))
    assert (found.shape, found.histogram_counts, found.sqnr_db, found.saturation) == ((0, 8), (), None, None)
    assert found.notes == ("The layer has no weights.",)


def test_a_constant_weight_without_a_grid_has_a_histogram():
    weight = torch.full((5,), 3.0)
    found = layer_statistics("fc", weight, weight, (), "vq")
    assert (sum(found.histogram_counts), found.unit, found.saturation) == (5, "weight", None)


@pytest.mark.parametrize("scale", [torch.ones(3, 1), torch.ones(2), torch.ones(2, 0)])
def test_a_scale_of_another_shape_is_an_error(scale):
    with pytest.raises(FormatError, match=r"fc: its scale of shape \(.*\) does not fit the weight of shape \(2, 4\)"):
        layer_statistics("fc", torch.ones(2, 4), torch.ones(2, 4), INT2, "int2/channel", scale=scale)


def test_a_quantised_weight_of_another_shape_is_an_error():
    with pytest.raises(FormatError, match=r"\(4, 2\), the weight \(2, 4\)"):
        layer_statistics("fc", torch.ones(2, 4), torch.ones(4, 2), INT2, "int2/tensor")


GRIDS = {
    "binary": (-1, 1),
    "ternary": (-1, 0, 1),
    "int4": range(-8, 8),
    "int8": range(-128, 128),
    "fp4": (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "log2": tuple(sign * 2.0**-power for sign in (-1, 1) for power in range(8)),
    "single": (0.5,),
    "none": (),
}


@settings(max_examples=60)
@given(
    grid=st.sampled_from(sorted(GRIDS)),
    values=st.lists(st.floats(width=32), max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.none() | st.floats(width=32),
)
def test_every_weight_is_counted_once(grid, values, dtype, scale):
    """Whatever the weights: in a bin, below, above, or in a note."""
    weight = torch.tensor(values, dtype=dtype)
    scale = None if scale is None else torch.tensor(scale)
    found = layer_statistics("fc", weight, weight.nan_to_num(0.0), GRIDS[grid], grid, scale=scale)
    with_place = weight.double() / (1.0 if scale is None else scale.double())
    placed = int((weight.isfinite() & with_place.isfinite()).sum())
    assert sum(found.histogram_counts) + found.below + found.above == placed
    assert sum(found.grid_counts) == (placed if len(GRIDS[grid]) else 0)
    assert len(found.histogram_edges) == (len(found.histogram_counts) + 1 if placed else 0)
    assert len(found.histogram_counts) <= 400
    assert all(math.isfinite(edge) for edge in found.histogram_edges)
