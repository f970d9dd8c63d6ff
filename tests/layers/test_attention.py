"""MultiheadAttention, taken apart, against PyTorch's own and inside PyTorch's transformer layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.planning.exchange import take_apart
from tests.models import assert_equal, no_dropout, prepared, train
from tests.targets.proving import proven

SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bias": False},
    {"kdim": 3, "vdim": 5, "add_bias_kv": True},
    {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_taken_apart_it_computes_the_same_with_the_same_parameters(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.MultiheadAttention(8, 2, **settings)])
    nn.init.normal_(next(iter(plain.parameters())))
    model = copy.deepcopy(plain)
    take_apart(model)
    assert set(model.state_dict()) == set(plain.state_dict())
    q, k, v = (torch.randn(n, 3, settings.get(name, 8)) for n, name in ((5, ""), (4, "kdim"), (4, "vdim")))
    if settings.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.tensor([[False, False, True, False]] * 3)
    masks = (None, torch.rand(5, 4) > 0.8, torch.randn(5, 4), torch.randn(3 * 2, 5, 4))
    cases: list[dict[str, Any]] = [{"attn_mask": mask} for mask in masks]
    cases += [{"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": masks[1]}]
    for case in cases:
        for more in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            torch.testing.assert_close(model[0](q, k, v, **case, **more), plain[0](q, k, v, **case, **more))
    first = 0 if settings.get("batch_first") else 1
    unbatched = [x.select(first, 0) for x in (q, k, v)]
    torch.testing.assert_close(model[0](*unbatched), plain[0](*unbatched))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_an_encoder_multiplies_in_integers_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Encoder(), (torch.randn(2, 3, 8),)
    names = set(model.state_dict())
    model, operators = proven(model, inputs, tmp_path)
    assert names <= set(model.state_dict())
    # Three projections, the output's, two of the feed-forward part, the head; scores and values.
    assert operators["QGemm"] == 7 and operators["QLinearMatMul"] + operators["MatMulIntegerToFloat"] == 2, operators
    with torch.no_grad():  # where PyTorch would compute the float weights, past all quantisers
        assert_equal(model.eval()(*inputs), ig.convert(model)(*inputs))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("is_decoder", [True, False])
def test_decoders_and_whole_transformers(is_decoder: bool) -> None:
    torch.manual_seed(0)
    if is_decoder:
        model: Any = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)
    else:
        model = nn.Transformer(8, 2, 1, 1, 16, norm_first=True)
    inputs = (torch.randn(3, 2, 8), torch.randn(4, 2, 8))
    prepared(model, inputs)
    train(no_dropout(model), inputs, steps=1)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())
    kinds = {type(m).__name__ for m in model.modules()}
    assert "QuantizedBorrowedLinear" in kinds and "MultiheadAttention" not in kinds
