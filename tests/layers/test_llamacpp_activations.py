"""The activation rules of llama.cpp against its C code, written out value by value."""

import numpy as np
import torch

from isogrid.layers.llamacpp_activations import Q8_0, Q8_1, q8_codes, q8_k_codes
from tests.models import assert_equal

F32 = np.float32


def spread(rows: int, columns: int) -> torch.Tensor:
    """Values of many magnitudes, with ties, zeros, equal extremes and a block of zeros."""
    x = torch.randn(rows, columns) * 10.0 ** torch.randint(-4, 4, (rows, 1))
    x[0, :4] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    x[1] = 0
    x[2] = torch.arange(columns) - columns / 2
    return x


def test_q8_0_is_the_one_of_ggml() -> None:
    x = spread(64, 32)
    codes, step = q8_codes(x)
    for row, code, one in zip(x.numpy(), codes.numpy(), step[:, 0].numpy(), strict=True):
        amax = F32(np.abs(row).max())
        factor = F32(127) / amax if amax else F32(0)
        assert (np.rint(row * factor) == code).all()
        assert amax / F32(127) == one
    assert_equal(Q8_0()(x), codes * step.half().float())


def test_the_sums_of_q8_1_are_those_of_ggml() -> None:
    x = spread(64, 32)
    codes, step = q8_codes(x)
    stored = (step[:, 0].numpy() * codes.sum(1).numpy()).astype(np.float16).astype(F32)
    own = codes.sum(1) * step[:, 0].half().float()
    assert_equal(Q8_1().sum_error(x)[:, 0], torch.from_numpy(stored) - own)


def test_q8_k_is_the_one_of_ggml() -> None:
    x = spread(64, 256)
    codes, scale = q8_k_codes(x)
    for row, code, one in zip(x.numpy(), codes.numpy(), scale[:, 0].numpy(), strict=True):
        largest, extreme = F32(0), F32(0)
        for value in row:
            if abs(value) > largest:
                largest, extreme = abs(value), value
        if not largest:
            assert not one and not code.any()
            continue
        factor = F32(-127) / extreme
        assert (np.minimum(127, np.rint(factor * row)) == code).all()
        assert F32(1) / factor == one
