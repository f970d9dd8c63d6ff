"""Which elements share a scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isogrid.errors import FormatError
from isogrid.formats import Granularity, PerChannel, PerFlatGroup, PerGroup, PerTensor, PerTile, PerToken
from isogrid.formats.granularity import Shape, block_view, blocks
from tests.formats.helpers import assert_equal

CASES: list[tuple[Granularity, Shape, Shape]] = [
    (PerTensor(), (4, 6), (1, 1)),
    (PerTensor(), (), (1,)),
    (PerChannel(), (8, 3, 3, 3), (8, 1, 1, 1)),
    (PerChannel(1), (8, 3, 3), (1, 3, 1)),
    (PerChannel(-1), (8, 3, 5), (1, 1, 5)),
    (PerToken(), (2, 7, 16), (2, 7, 1)),
    (PerGroup(4), (3, 8), (3, 2)),
    (PerGroup(4, pads=True), (3, 9), (3, 3)),
    (PerGroup(4, axis=0), (8, 3), (2, 3)),
    (PerGroup(4, pads=True, axis=1), (2, 9, 3), (2, 3, 3)),
    (PerFlatGroup(8), (3, 5), (2,)),
    (PerTile(2, 4), (5, 6, 8), (5, 3, 2)),
]


@pytest.mark.parametrize(("granularity", "shape", "scale_shape"), CASES, ids=str)
def test_scale_shape_and_the_way_back(granularity: Granularity, shape: Shape, scale_shape: Shape) -> None:
    x = torch.randn(shape)
    assert granularity.scale_shape(shape) == scale_shape
    arranged = granularity.arrange(x)
    assert_equal(granularity.restore(arranged, shape), x)
    rows = blocks(arranged, scale_shape)
    assert rows.shape == (torch.zeros(scale_shape).numel(), arranged.numel() // torch.zeros(scale_shape).numel())


@pytest.mark.parametrize(("granularity", "shape", "scale_shape"), CASES, ids=str)
def test_view_broadcasts_each_scale_over_its_block(granularity: Granularity, shape: Shape, scale_shape: Shape) -> None:
    arranged = granularity.arrange(torch.randn(shape))
    number = torch.arange(torch.zeros(scale_shape).numel()).reshape(scale_shape)
    tensor_view, scale_view = block_view(tuple(arranged.shape), scale_shape)
    spread = number.reshape(scale_view).expand(tensor_view).reshape(arranged.shape)
    # Each row of `blocks` holds one block, in the order of the scales.
    assert_equal(blocks(spread, scale_shape), number.reshape(-1, 1).expand(-1, arranged.numel() // number.numel()))


@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_blocks_hold_every_value_once(pieces: list[int], data: st.DataObject) -> None:
    shape = tuple(n * data.draw(st.integers(1, 3)) for n in pieces)
    x = torch.arange(torch.zeros(shape).numel()).reshape(shape)
    assert_equal(blocks(x, tuple(pieces)).flatten().sort().values, x.flatten())


def test_ragged_groups_name_those_that_fit() -> None:
    with pytest.raises(
        FormatError, match=r"32 does not divide the last dimension, 100.*: 2, 4, 5, 10, 20, 25, 50, 100\."
    ):
        PerGroup(32).scale_shape((8, 100))
    with pytest.raises(FormatError, match="none but 1"):
        PerGroup(32).scale_shape((8, 1))


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(FormatError, match="multiples of the tile"):
        PerTile(2, 4).scale_shape((6, 6))
    with pytest.raises(FormatError, match="multiples of the tile"):
        PerTile(2, 4).scale_shape((8,))
    with pytest.raises(FormatError, match="axis 2"):
        PerChannel(2).scale_shape((3, 3))
    for granularity in (PerToken(), PerGroup(4)):
        with pytest.raises(FormatError, match="at least one dimension"):
            granularity.scale_shape(())
    with pytest.raises(FormatError, match=r"\[2, 3\] does not fit a tensor of shape \[4, 8\]"):
        block_view((4, 8), (2, 3))


@pytest.mark.parametrize("make", [lambda: PerGroup(0), lambda: PerFlatGroup(0), lambda: PerTile(4, 0)])
def test_blocks_are_not_empty(make: object) -> None:
    assert callable(make)
    with pytest.raises(FormatError, match="at least one value, not 0"):
        make()


def test_names() -> None:
    names = [str(granularity) for granularity, _, _ in CASES]
    assert names == [
        "tensor", "tensor", "channel", "channel1", "channel-1", "token", "group4", "group4",
        "group4:axis=0", "group4:axis=1", "flat8", "tile2x4",
    ]  # fmt: skip
