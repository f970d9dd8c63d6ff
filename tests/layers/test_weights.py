"""Weights that are computed: parametrised, normed or pruned by torch.nn.utils; and layers that extend another."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import isogrid as ig
from isogrid.layers.weights import weight_of
from tests.models import assert_equal, prepared, switch_off, train

WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": torch.nn.utils.weight_norm,
    "spectral norm by a hook": torch.nn.utils.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "pruned twice": lambda module: prune.random_unstructured(
        prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0), "weight", amount=0.2
    ),
}


class Wide(nn.Linear):
    """Extends a layer and leaves its forward alone."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.note = "wide"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.fc = nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 4, 3, groups=2), Wide(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.up(self.conv(x))).mean(-1))


def net(way: Callable[[nn.Module], Any] | None = None) -> tuple[Any, tuple[Tensor]]:
    torch.manual_seed(0)
    model = Net()
    for module in list(model.children()):
        if way is not None:
            way(module)
    return model, (torch.randn(6, 2, 8),)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_the_computed_weight_is_quantised(way: str) -> None:
    model, inputs = net(WAYS[way])
    plain, _ = net(WAYS[way])
    plain.load_state_dict(model.state_dict())
    names = set(model.state_dict())
    prepared(model, inputs)
    assert names <= set(model.state_dict())
    # The order of a computed weight in memory decides the order in which PyTorch's float kernels add.
    torch.testing.assert_close(switch_off(copy.deepcopy(model).eval())(*inputs), plain.eval()(*inputs))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "quantizer" not in name}
    train(model, inputs, steps=2)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.eval()
    expected = model(*inputs).detach()
    converted = ig.convert(model)
    assert_equal(converted(*inputs), expected)
    assert not any("original" in n or "weight_" in n.replace("weight_scale", "") for n in converted.state_dict())
    assert_equal(model(*inputs).detach(), expected)


def test_pruned_weights_have_code_zero(tmp_path: Path) -> None:
    model, inputs = net(WAYS["pruned"])
    prepared(model, inputs, "w4a8")
    train(model, inputs, steps=2)
    assert ((weight_of(model.fc) == 0) == (model.fc.weight_mask == 0)).all()
    converted: Any = ig.convert(model)
    assert (converted.fc.weight[model.fc.weight_mask == 0] == 0).all()
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.verify(model, artifact, [inputs])


def test_onnx_runtime_gets_the_weight_that_the_parametrisation_computes(tmp_path: Path) -> None:
    model, inputs = net(WAYS["weight norm"])
    prepared(model, inputs)
    train(model, inputs, steps=2)
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.verify(model, artifact, [inputs])
    assert_equal(ig.load(artifact.path)(*inputs)[0], model.eval()(*inputs).detach())


def test_a_layer_that_extends_another_is_that_other() -> None:
    model, inputs = net()
    prepared(model, inputs)
    assert type(model.fc).__name__ == "QuantizedLinear" and model.fc.note == "wide"
    assert ig.convert(model).fc.note == "wide"
