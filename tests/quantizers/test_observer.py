"""The observer: exact in any order, through any number of ranks, and never corrupted."""

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from datetime import timedelta
from math import log10
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from isogrid.errors import FormatError, NonFiniteError, NotCalibratedError, PlanError
from isogrid.formats import named_format
from isogrid.quantizers.observer import Observer, synchronize
from isogrid.quantizers.ranges import (
    MSE,
    RMS,
    AbsMax,
    HistogramKL,
    MeanMagnitude,
    MinMax,
    MovingAverage,
    Percentile,
    Range,
    range_name,
)

UINT8, INT8 = named_format("uint8/tensor"), named_format("int8/tensor")
EXACT = ("lowest", "highest", "exponent", "counts", "batches")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(*batches: Tensor, **options: float) -> Observer:
    observer = Observer(**options)
    for batch in batches:
        observer.observe(batch)
    return observer


floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
mixed = st.one_of(floats, st.floats(-4, 4, width=32), st.just(0.0))


@given(st.lists(mixed, min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(1, 7))
@settings(max_examples=100)
def test_neither_order_nor_batching_changes_a_bit(values: list[float], random, size: int):
    whole = observed(torch.tensor(values), bins=64)
    random.shuffle(values)
    parts = observed(*torch.tensor(values).split(size), bins=64)
    for name in ("lowest", "highest", "exponent", "counts"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert int(whole.counts.sum()) == len(values)


@given(st.lists(mixed, min_size=1, max_size=60))
@settings(max_examples=100)
def test_bins_are_those_of_exact_arithmetic(values: list[float]):
    observer = observed(torch.tensor(values), bins=16)
    reach = 2.0 ** int(observer.exponent)
    largest = max(abs(value) for value in values)
    assert reach > largest and (reach == 2.0**-100 or reach / 2 <= largest)
    expected = np.zeros(17, dtype=np.int64)
    for value in values:
        step = int(np.floor(abs(value) / reach * 8))
        expected[16 if value == 0 else 8 + step if value > 0 else 7 - step] += 1
    assert observer.counts.sum(0).tolist() == expected.tolist()


def test_the_histogram_is_values_and_how_often_each_occurs():
    values, counts = observed(torch.tensor([0.0, 0.0, 3.9, -1.2, 0.3, 0.35, 1.0]), bins=16).histogram()
    # Bins of 0.5 from -4 to 4; ends and zeros as they are.
    torch.testing.assert_close(values, torch.tensor([[-1.2, -1.2, 0.0, 0.25, 1.25, 3.75, 3.9]]))
    assert counts.tolist() == [[0, 1, 2, 2, 1, 1, 0]]


def test_counts_do_not_saturate():
    observer = observed(torch.ones(4), bins=16)
    observer.counts.mul_(2**40)
    observer.observe(torch.ones(3))
    assert int(observer.counts.sum()) == 2**42 + 3


@pytest.mark.parametrize("name", ["uint8/tensor", "int8/tensor", "int8/tensor:asymmetric"])
@pytest.mark.parametrize("choice", [AbsMax(), MinMax()], ids=range_name)
def test_extremes_are_exact(name: str, choice: Range):
    fmt, x = named_format(name), normal(1000) * 3.3
    for observer in (observed(*x.split(100)), observed(*x.split(100), bins=0)):
        for part, other in zip(observer.affine(fmt, choice), choice.fit(x[None], fmt), strict=True):
            assert part is other is None or torch.equal(part, other)
            assert part is None or part.shape == (1,)


def test_percentile_is_within_a_bin_of_torch():
    x = normal(20_000)
    for bins in (256, 4096):
        observer = observed(*x.split(1000), bins=bins)
        width = 2 * 2.0 ** int(observer.exponent) / bins
        found = float(observer.affine(INT8, Percentile(99.0)).scale) * 127
        assert abs(found - float(torch.quantile(x.abs(), 0.99))) <= width


@pytest.mark.parametrize("shape", ["bell", "relu", "silu", "heavy"])
@pytest.mark.parametrize("name", ["uint8/tensor", "int8/tensor", "uint4/tensor"])
def test_mse_from_the_histogram_is_that_from_the_data(name: str, shape: str):
    fmt, x = named_format(name), normal(2**15) * 1.1
    x = {"bell": x, "relu": x.relu(), "silu": torch.nn.functional.silu(2 * x), "heavy": x * x.abs()}[shape]

    def decibel(affine) -> float:
        return 10 * log10(float(x.square().sum() / (fmt.fake_quantize(x, *affine) - x).square().sum()))

    assert decibel(observed(x).affine(fmt, MSE())) > decibel(MSE().fit(x[None], fmt)) - 0.05


@pytest.mark.parametrize("choice", [RMS(), MeanMagnitude(), HistogramKL()], ids=range_name)
def test_other_ranges_read_the_histogram(choice: Range):
    x = normal(2**17)
    from_bins, from_data = observed(x).affine(INT8, choice).scale, choice.fit(x[None], INT8).scale
    # Bins are 1/256 wide; the threshold of the entropy search jumps between neighbours of nearly equal divergence.
    torch.testing.assert_close(from_bins, from_data, rtol=0.15 if isinstance(choice, HistogramKL) else 1e-3, atol=0)


def test_moving_average_is_a_mean_first_and_exponential_then():
    batches = [normal(50, seed=seed) * (1 + seed) for seed in range(9)]
    observer = Observer(bins=0, momentum=0.75)
    lows, highs = [], []
    for i, batch in enumerate(batches):
        observer.observe(batch)
        lows.append(float(batch.min()))
        highs.append(float(batch.max()))
        if i < 4:
            low, high = np.mean(lows), np.mean(highs)
        else:
            low, high = 0.75 * low + 0.25 * lows[-1], 0.75 * high + 0.25 * highs[-1]
        torch.testing.assert_close(observer.mean_lowest, torch.tensor([low], dtype=torch.float32))
        torch.testing.assert_close(observer.mean_highest, torch.tensor([high], dtype=torch.float32))
    affine = observer.affine(UINT8, MovingAverage(0.75))
    torch.testing.assert_close(affine.scale * 255, torch.tensor([high - low], dtype=torch.float32))


def test_on_one_tensor_the_moving_average_is_min_max():
    x = normal(100)
    assert observed(x).affine(UINT8, MovingAverage()) == MinMax().fit(x[None], UINT8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bins", [0, 64])
def test_nan_and_infinity_raise_and_leave_the_statistics_alone(bad: float, bins: int):
    observer = observed(normal(10), bins=bins)
    before = deepcopy(observer.state_dict())
    with pytest.raises(NonFiniteError, match="1 of 3"):
        observer.observe(torch.tensor([1.0, bad, 2e9]))
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


def test_an_empty_batch_changes_nothing():
    observer = observed(normal(10))
    before = deepcopy(observer.state_dict())
    observer.observe(torch.zeros(0, 7))
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


def test_nothing_seen_is_an_error_also_after_a_reset():
    observer = Observer()
    for choice in (MSE(), MinMax(), MovingAverage()):
        with pytest.raises(NotCalibratedError, match="calibrate"):
            observer.affine(UINT8, choice)
    observer.observe(torch.zeros(0))
    observer.observe(normal(5))
    observer.affine(UINT8, MSE())
    observer.reset()
    with pytest.raises(NotCalibratedError):
        observer.affine(UINT8, MSE())
    assert all(torch.equal(value, Observer().state_dict()[name]) for name, value in observer.state_dict().items())


def test_wrong_uses_say_what_to_do():
    with pytest.raises(NotCalibratedError, match="for_range"):
        observed(normal(5), bins=0).affine(UINT8, MSE())
    with pytest.raises(PlanError, match="momentum"):
        observed(normal(5)).affine(UINT8, MovingAverage(0.5))
    with pytest.raises(PlanError, match="power of two"):
        Observer(bins=1000)
    for name in ("int8/channel", "int8/token", "int4/group4"):
        with pytest.raises(FormatError, match=r"tensor granularity|divide"):
            observed(normal(4, 8)).affine(named_format(name), MinMax())


def test_an_observer_for_a_range_keeps_what_the_range_needs():
    assert Observer.for_range(MSE()).bins == 4096
    assert Observer.for_range(MinMax()).counts.numel() == 2
    assert Observer.for_range(MovingAverage(0.9)).momentum == 0.9


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-30, 3.4e38, -3.4e38])
def test_any_magnitude_is_held(value: float):
    observer = observed(torch.tensor([value]))
    for choice in (MSE(), MinMax(), Percentile()):
        for fmt in (UINT8, INT8):
            affine = observer.affine(fmt, choice)
            assert affine.scale > 0 and affine.scale.isfinite()
            error = float((fmt.fake_quantize(torch.tensor([value]), *affine) - value).abs())
            assert error <= abs(value) * 0.01 + 1e-36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_any_dtype_is_read_in_float32(dtype: torch.dtype):
    x = (normal(300) * 20).to(dtype)
    first, second = observed(x, torch.zeros(3, dtype=dtype)), observed(x.float(), torch.zeros(3))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in EXACT)


def test_layout_and_gradients_do_not_matter():
    x = normal(8, 6).requires_grad_()
    first, second = observed(x.t()[::2]), observed(x.t()[::2].contiguous().detach())
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in EXACT)
    assert not first.mean_lowest.requires_grad


def test_state_is_complete_and_survives_saving_and_copying():
    observer = observed(normal(100), normal(50) * 9)
    assert all(buffer.dim() >= 1 for buffer in observer.buffers()) and not list(observer.parameters())
    fresh = Observer()
    assert fresh.state_dict().keys() == observer.state_dict().keys()
    fresh.load_state_dict(observer.state_dict(), strict=True)
    for other in (fresh, deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        batch = normal(20) * 40
        for some in (deepcopy(observer), other):
            some.observe(batch)
        expected = observed(normal(100), normal(50) * 9, batch)
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in other.state_dict().items())


def test_casting_the_model_leaves_the_statistics():
    observer = observed(normal(1000))
    before = deepcopy(observer.state_dict())
    for cast in (observer.bfloat16, observer.half, lambda: observer.to(torch.float64), observer.float):
        cast()
        for name, value in observer.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert observer.to("meta").counts.is_meta


def test_the_moving_average_compiles_as_one_graph_and_poisons_what_it_cannot_refuse():
    class Moving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = Observer.for_range(MovingAverage())

        def forward(self, x: Tensor) -> Tensor:
            self.observer.observe(x)
            return UINT8.fake_quantize(x, *self.observer.affine(UINT8, MovingAverage()))

    eager, module = Moving(), Moving()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = normal(3, 5, seed=seed)
        assert torch.equal(compiled(x), eager(x))
    states = module.observer.state_dict(), eager.observer.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    compiled(torch.full((3, 5), torch.nan))
    with pytest.raises(NonFiniteError, match="was seen"):
        module.observer.affine(UINT8, MovingAverage())


def see_as_rank(rank: int, folder: Path) -> dict[str, Tensor]:
    """What three observers know in the end on one of two ranks, each of which saw every other batch."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    try:
        batches = [batch for _, batch in sorted(load_file(folder / "batches").items())]
        observers = [Observer(bins=256), Observer(bins=0), Observer(bins=256)]
        for stage in (batches[:6], batches[6:], []):
            for batch in stage[rank::2]:
                for observer in observers[:2]:
                    observer.observe(batch)
            if rank == 1 and stage:
                observers[2].observe(stage[1])
            synchronize(observers)
        observers[0].synchronize()
    finally:
        dist.destroy_process_group()
    return {
        f"{i}.{name}": value for i, observer in enumerate(observers) for name, value in observer.state_dict().items()
    }


def test_two_ranks_see_what_one_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    # Later batches are larger, so that the ranks' histograms differ in reach when they meet.
    batches = [normal(40, seed=seed) * 1.7**seed for seed in range(10)]
    save_file({str(i): batch for i, batch in enumerate(batches)}, tmp_path / "batches")
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    try:
        first = see_as_rank(0, tmp_path)
        assert other.wait(timeout=100) == 0
    finally:
        other.kill()
    second = load_file(tmp_path / "seen")
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    alone = [observed(*batches, bins=256), observed(*batches, bins=0), observed(batches[1], batches[7], bins=256)]
    for i, observer in enumerate(alone):
        for name in ("lowest", "highest", "exponent"):
            assert torch.equal(first[f"{i}.{name}"], getattr(observer, name))
        assert torch.equal(first[f"{i}.counts"].sum(0), observer.counts.sum(0))
        for name in ("mean_lowest", "mean_highest"):
            # The same mean, summed in another order.
            torch.testing.assert_close(first[f"{i}.{name}"], getattr(observer, name), rtol=1e-5, atol=0)
    assert first["0.batches"].tolist() == [5, 0] and first["2.batches"].tolist() == [2, 0]


def test_without_a_process_group_synchronizing_changes_nothing():
    observer = observed(normal(10))
    before = deepcopy(observer.state_dict())
    observer.synchronize()
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


if __name__ == "__main__":
    save_file(see_as_rank(1, Path(sys.argv[1])), Path(sys.argv[1]) / "seen")
