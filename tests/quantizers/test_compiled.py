"""Kernels, pieces and whole-model compilation compute what the plain functions do."""

import copy
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import isogrid as ig
from isogrid.formats import Affine, named_format
from isogrid.quantizers import LSQ, Operand, StraightThrough, compiled, fake_quantize
from isogrid.quantizers.compiled import Results, run
from tests.formats.helpers import assert_equal

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "cl")), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are worth a kernel, and nothing is remembered from other tests."""
    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 1)
    caches = (compiled.compiler_is_available, compiled._kernel, compiled._say_plain)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


LEARNED = LSQ()


def outcome(name: str, x: Tensor, estimator: Any = LEARNED, strength: Tensor | None = None) -> list[Tensor]:
    """Value, input gradient and scale gradient of a fake quantisation."""
    fmt = named_format(name)
    affine = fmt.default_affine(x.float().nan_to_num(0.0))
    x = x.clone().requires_grad_()
    scale = (affine.scale * 0.8).requires_grad_()
    y = fake_quantize(x, Operand(fmt, estimator, Affine(scale, *affine[1:]), {}, strength))
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y.dtype))
    found = (y.detach(), x.grad, scale.grad)
    return [tensor for tensor in found if tensor is not None]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, torch.float32) for name in ("int4/group32", "uint8/tensor", "int2/channel:midrise", "nf4", "q4_1")],
        *[(name, torch.bfloat16) for name in ("int8/channel", "fp4_e2m1/group32")],
    ],
    ids=str,
)
def test_a_kernel_computes_what_the_plain_function_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(64, 256, dtype=dtype)
    x[0, :2] = torch.tensor([torch.nan, -0.0])
    by_kernel = outcome(name, x)
    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 2**60)
    plain = outcome(name, x)
    assert compiled._kernel.cache_info().currsize == 2
    assert_equal(by_kernel[0], plain[0])
    # The gradient of NaN is not defined, and makes that of its scale NaN.
    assert_equal(by_kernel[1][~x.isnan()], plain[1][~x.isnan()])
    # A sum in another order.
    torch.testing.assert_close(by_kernel[2], plain[2], rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_compiler
def test_one_kernel_serves_all_shapes() -> None:
    counters.clear()
    for shape in ((64, 128), (32, 32), (128, 64), (48, 256), (2, 3, 64), (1, 64)):
        outcome("int4/group32", torch.randn(shape))
    # One forward, one backward.
    assert counters["stats"]["unique_graphs"] == 2


@needs_compiler
def test_many_formats_do_not_run_into_the_recompilation_limit(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(8, 64)
    with caplog.at_level(logging.WARNING):
        for bits in range(1, 5):
            for end in ("tensor", "channel", "group32"):
                outcome(f"int{bits}/{end}", x, StraightThrough())
    assert not caplog.records


def test_where_a_dispatch_mode_looks_on_nothing_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.randn(8, 64)
    with Watching(), caplog.at_level(logging.WARNING):
        watched = outcome("int4/group32", x)
    assert not caplog.records
    for ours, expected in zip(watched, outcome("int4/group32", x), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("piece", [1, 100, 256, 1000, 2**30])
@pytest.mark.parametrize("name", ["int4/group32", "int8/channel", "int8/tensor", "int4/channel1", "nf4"])
def test_pieces_make_the_whole(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 64)
    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 2**60)
    whole = outcome(name, x, strength=torch.tensor([0.5]))
    monkeypatch.setattr(compiled, "PIECE", piece)
    pieces = outcome(name, x, strength=torch.tensor([0.5]))
    assert_equal(pieces[0], whole[0])
    assert_equal(pieces[1], whole[1])
    torch.testing.assert_close(pieces[2], whole[2])  # a sum in another order


def test_results_for_pieces_are_joined_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(factor: int, rows: tuple[Tensor, ...], whole: tuple[Tensor | None, ...]) -> Results:
        return Results((rows[0] * factor, None), (rows[0].sum(), None))

    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 2**60)
    monkeypatch.setattr(compiled, "PIECE", 4)
    x = torch.arange(10.0).reshape(5, 2)
    rows, whole = run(function, 3, (x,))
    assert_equal(rows[0], x * 3)
    assert_equal(whole[0], torch.tensor(45.0))
    assert rows[1] is None and whole[1] is None


def test_without_a_compiler_the_same_runs_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        first = outcome("int4/group32", torch.ones(4, 64))
        second = outcome("int4/group32", torch.ones(4, 64))
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
    assert [record.message for record in caplog.records] == [
        "No compiler for kernels on cpu was found: quantisers run as plain PyTorch, slower but with the same values."
    ]


def test_with_a_broken_compiler_the_same_runs_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_(function: Any, **options: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise RuntimeError("cannot find -lgomp\nand more")

        return fail

    monkeypatch.setattr(compiled, "compiler_is_available", lambda device: True)
    monkeypatch.setattr(torch, "compile", compile_)
    x = torch.randn(4, 64)
    with caplog.at_level(logging.WARNING):
        found = outcome("int4/group32", x)
        outcome("int8/channel", x)
    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 2**60)
    for one, other in zip(found, outcome("int4/group32", x), strict=True):
        assert_equal(one, other)
    assert len(caplog.records) == 1
    assert "RuntimeError: cannot find -lgomp)" in caplog.records[0].message


class Residual(nn.Module):
    """Convolution, ReLU, residual addition, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 2, 1), nn.Linear(2 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.first(x))
        return self.head(x.flatten(1))


def model_for(scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if scheme == "w8a8":
        model, x = Residual(), torch.randn(3, 2, 2, 2)
    else:
        model, x = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(5, 64)
    ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=(x,)))
    return ig.calibrate(model, [x]).train(), x


@pytest.mark.parametrize(
    ("scheme", "backend"),
    [
        *[(scheme, "aot_eager") for scheme in ("w8a8", "w4a16", "w4a8-dynamic")],
        pytest.param("w8a8", "inductor", marks=needs_compiler),
    ],
)
def test_the_whole_model_compiles_into_one_graph(scheme: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SMALLEST_COMPILED", 2**60)
    torch._dynamo.reset()
    model, x = model_for(scheme)
    twin = copy.deepcopy(model)
    x, twin_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = model(x)
    y = torch.compile(twin, backend=backend, fullgraph=True)(twin_x)
    assert_equal(y.detach(), expected.detach())
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": x.grad}
    twins = {name: parameter.grad for name, parameter in twin.named_parameters()} | {"x": twin_x.grad}
    for name, gradient in gradients.items():
        if backend == "aot_eager":
            assert_equal(twins[name], gradient)
        else:
            # Sums in another order.
            torch.testing.assert_close(twins[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
