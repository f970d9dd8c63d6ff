"""GELU of ggml against its C code, written out value by value; the runtime's own table is in tests/runtimes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy import float32 as f32

from isogrid.layers.ggml_functions import gelu
from tests.models import assert_equal


def entry(h: np.float16) -> np.float16:
    """Of the table: products rounded to float32 one by one, the one inside the sum fused with it."""
    x = f32(h)
    inner = f32(float(f32(0.044715) * x) * float(x) + 1.0)
    bent = f32(math.tanh(float(f32(0.79788456) * x * inner)))
    return np.float16(f32(0.5) * x * (f32(1) + bent))


def test_it_is_a_table_of_float16() -> None:
    x = torch.cat([torch.randn(200, generator=torch.Generator().manual_seed(0)) * 4, torch.tensor([0.0, -0.0, -1.999])])
    expected = [x_ if x_ >= 10 else 0.0 if x_ <= -10 else float(entry(np.float16(x_))) for x_ in x.tolist()]
    assert_equal(gelu(x), torch.tensor(expected))


def test_ends_nan_and_types() -> None:
    x = torch.tensor([-math.inf, -10.0, 10.0, 10.0001, math.inf, math.nan])
    y = gelu(x)
    assert_equal(y[:5], torch.tensor([0.0, 0.0, 10.0, 10.0001, math.inf]))
    assert y[5].isnan()
    assert gelu(x.bfloat16().reshape(2, 3)).dtype == torch.bfloat16


def test_the_gradient_is_that_of_the_function() -> None:
    x = torch.linspace(-11, 11, 50).requires_grad_()
    gelu(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.gelu(other, approximate="tanh").backward(2 * gelu(other.detach()))
    assert x.grad is not None and other.grad is not None
    assert_equal(x.grad, other.grad)
