import pytest
import torch
import torch.nn.functional as F

from isogrid.errors import PlanError
from isogrid.layers.pooling import averages_space, pooling_of
from isogrid.layers.windows import mean_of_windows

X = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6)


@pytest.mark.parametrize(("function", "args", "kwargs"), [
    (F.avg_pool2d, (2,), {}),
    (F.avg_pool2d, ((3, 2), 2, 1), {}),
    (F.avg_pool2d, (3,), {"stride": 2, "ceil_mode": True}),
    (F.avg_pool2d, (3, 2, 1), {"count_include_pad": False}),
    (F.avg_pool2d, (2,), {"divisor_override": 4}),
    (F.adaptive_avg_pool2d, (3,), {}),
    (F.adaptive_avg_pool2d, ((None, 2),), {}),
    (F.adaptive_avg_pool2d, (), {"output_size": 1}),
    (torch.mean, ((2, 3),), {"keepdim": True}),
    (torch.mean, ((-1, -2),), {}),
    (torch.Tensor.mean, (), {"dim": (2, 3)}),
])  # fmt: skip
def test_windows_are_those_of_the_function(function, args, kwargs) -> None:  # type: ignore[no-untyped-def]
    pooling = pooling_of(function, X, *args, **kwargs)
    window = (pooling.kernel, pooling.stride, pooling.padding, pooling.ceil_mode, pooling.count_include_pad)
    mean = mean_of_windows(X, *window)
    torch.testing.assert_close(mean if pooling.keeps_space else mean.flatten(1), function(X, *args, **kwargs))


def test_windows_that_no_runtime_has() -> None:
    with pytest.raises(PlanError, match="unequal size"):
        pooling_of(F.adaptive_avg_pool2d, X, 4)
    with pytest.raises(PlanError, match="divisor_override"):
        pooling_of(F.avg_pool2d, X, 2, divisor_override=3)


@pytest.mark.parametrize(("args", "kwargs", "expected"), [
    (((2, 3),), {}, True), ((), {"dim": [-1, 2]}, True), ((2,), {}, False), ((), {}, False), (((1, 2, 3),), {}, False),
    (((2, 3),), {"dtype": torch.float64}, False),
])  # fmt: skip
def test_which_means_are_over_space(args, kwargs, expected: bool) -> None:  # type: ignore[no-untyped-def]
    assert averages_space(X, *args, **kwargs) is expected
