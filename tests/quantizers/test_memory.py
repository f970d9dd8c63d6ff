"""What layers keep for backward, byte by byte."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.layers import static
from isogrid.planning.state import quantizers


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves during a forward pass, each storage counted once."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Python hands out ids again, so what was seen must stay alive.
        alive.append(storage)
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().sum().backward()
    return sum(storages.values())


def quantizer_bytes(model: nn.Module) -> int:
    """What all scales, zero points and offsets take."""
    return sum(
        part.numel() * part.element_size()
        for quantizer in quantizers(model).values()
        for part in (quantizer.raw_scale, quantizer.zero_point, quantizer.offset)
        if part is not None
    )


def prepared(model: nn.Module, x: Tensor, scheme: str) -> nn.Module:
    ig.prepare(model, ig.plan(model, scheme=scheme, example_inputs=(x,)))
    return ig.calibrate(model, [x]).train()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_only_linear_keeps_what_linear_keeps_and_its_scales(scheme: str, bias: bool) -> None:
    x = torch.randn(64, 128, requires_grad=True)
    model = nn.Sequential(nn.Linear(128, 96, bias=bias))
    expected = kept_bytes(lambda: model(x))
    assert expected == x.nbytes + model[0].weight.nbytes
    prepared(model, x.detach(), scheme)
    assert kept_bytes(lambda: model(x)) <= expected + quantizer_bytes(model)


class Chain(nn.Module):
    """Linear layers with ReLU, as many as the float model keeps activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def test_a_static_layer_keeps_codes_of_an_input_on_its_grid() -> None:
    x = torch.randn(256, 128, requires_grad=True)
    model = prepared(Chain(), x.detach(), "w8a8")
    layer = model.layers[1]
    assert layer.input_on_grid
    activations = kept_bytes(lambda: layer(x)) - layer.weight.nbytes
    # A byte for each value of the input, and the accumulator, from which the output's gradient is recomputed.
    small = 16 * 128 * 4
    assert activations <= x.numel() * 1 + 256 * 128 * 4 + small


def test_a_static_chain_keeps_five_quarters_of_the_float_one() -> None:
    x = torch.randn(1024, 128, requires_grad=True)
    model = Chain()
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() > 1)
    expected = kept_bytes(lambda: model(x)) - weights
    prepared(model, x.detach(), "w8a8")
    found = kept_bytes(lambda: model(x)) - weights
    # Codes and an accumulator for each layer, where float keeps one activation.
    assert found <= 1.27 * expected


def test_where_integers_are_fast_a_static_chain_keeps_its_codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "integer_product_pays", lambda *arguments: True)
    x = torch.randn(1024, 128, requires_grad=True)
    model = Chain()
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() > 1)
    prepared(model, x.detach(), "w8a8")
    # The input as it is, a byte for each value of the three others, and vectors.
    assert kept_bytes(lambda: model(x)) - weights <= x.nbytes + 3 * 1024 * 128 + 64 * 128 * 4


def test_evaluation_keeps_nothing() -> None:
    x = torch.randn(16, 128)
    model = prepared(Chain(), x, "w8a8").eval()
    with torch.no_grad():
        assert not model(x).requires_grad
