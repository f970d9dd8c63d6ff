import torch
from torch import nn

from isogrid.layers.arithmetic import LARGEST_BIAS_CODE, quantize_bias
from isogrid.layers.folding import LARGEST_GROWTH, factor_and_shift, fold
from tests.models import randomize


def test_factor_and_shift_are_batch_norm() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=0.03).eval()
    randomize(norm)
    y, bias = torch.randn(3, 5, 2, 2), torch.randn(5)
    factor, shift = factor_and_shift(norm, bias)
    expected = norm(y + bias[:, None, None])
    torch.testing.assert_close(factor[:, None, None] * y + shift[:, None, None], expected)


def test_without_batch_norm_or_bias_nothing_happens() -> None:
    scale = torch.tensor([0.5, 0.25])
    folded = fold(scale, torch.tensor([0.1]), None, None)
    assert torch.equal(folded.scale, scale) and torch.equal(folded.weight_factor, torch.ones(2))
    assert torch.equal(folded.shift, torch.zeros(2))


def test_the_sign_goes_to_the_codes_and_the_size_to_the_scale() -> None:
    norm = nn.BatchNorm1d(3, eps=0.0).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -4.0, 0.5]))
    folded = fold(torch.ones(3), torch.ones(1), None, norm)
    assert folded.weight_factor.tolist() == [1.0, -1.0, 1.0]
    assert folded.scale.tolist() == [2.0, 4.0, 0.5]


def test_a_bias_always_fits_and_growth_stays_finite() -> None:
    norm = nn.BatchNorm1d(4, eps=0.0).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1e-30, -1e-12, 1.0]))
        norm.bias.fill_(3.0)
    x_scale = torch.tensor([0.01])
    folded = fold(torch.full((4,), 0.1), x_scale, None, norm)
    codes = quantize_bias(folded.shift, x_scale, folded.scale)
    assert (codes.abs() <= LARGEST_BIAS_CODE).all()
    torch.testing.assert_close(codes * x_scale * folded.scale, folded.shift)
    assert (folded.weight_factor.abs() <= LARGEST_GROWTH).all()
    # What is so small against its bias has no codes left.
    assert (torch.round(torch.ones(3) * 127 / folded.weight_factor[:3]) == 0).all()
