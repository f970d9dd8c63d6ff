"""Recurrent layers, taken apart, against PyTorch's own and against ONNX Runtime."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.planning.exchange import exchange, take_apart
from tests.models import assert_equal, prepared, train
from tests.targets.proving import proven

# PyTorch warns that it computes a projection by a slower kernel.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

LAYERS: list[Any] = [
    lambda: nn.LSTM(3, 4),
    lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, proj_size=2),
    lambda: nn.GRU(3, 4, num_layers=2, bias=False, batch_first=True),
    lambda: nn.GRU(3, 4, bidirectional=True),
    lambda: nn.RNN(3, 4, nonlinearity="relu", num_layers=3),
]
CELLS: list[Any] = [lambda: nn.LSTMCell(3, 4), lambda: nn.GRUCell(3, 4, bias=False), lambda: nn.RNNCell(3, 4)]


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


@pytest.mark.parametrize("make", LAYERS + CELLS)
def test_taken_apart_it_computes_the_same_with_the_same_parameters(make: Any) -> None:
    torch.manual_seed(0)
    plain = Holder(make())
    model = copy.deepcopy(plain)
    back = take_apart(model)
    assert {n: id(p) for n, p in model.named_parameters()}.keys() == dict(plain.named_parameters()).keys()
    shape = (2, 3) if isinstance(plain.inner, nn.RNNCellBase) else (5, 2, 3)
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), plain(x))
    if len(shape) == 3:
        states = plain(x)[1]
        torch.testing.assert_close(model(x, states), plain(x, states))
    states = plain(x[0])[1] if len(shape) == 3 else plain(x[0])
    torch.testing.assert_close(model(x[0]), plain(x[0]))
    torch.testing.assert_close(model(x[0], states), plain(x[0], states))
    first = next(iter(plain(x)[0])) if isinstance(plain(x), tuple) else plain(x)
    first.sum().backward()
    (next(iter(model(x)[0])) if isinstance(plain(x), tuple) else model(x)).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad)
    exchange(model, back)
    assert type(model.inner) is type(plain.inner)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(12, 5)
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def test_a_tagger_multiplies_in_integers_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Tagger(), (torch.randint(0, 10, (3, 3)),)
    names = set(model.state_dict())
    model, operators = proven(model, inputs, tmp_path)
    assert names <= set(model.state_dict())
    assert not {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"} & set(operators), operators
    # In both directions one product for the input and one for each of three steps; and the head.
    assert operators["QGemm"] == 2 * (1 + 3) + 1
    converted = ig.convert(model)
    assert not any("weight_ih" in name for name in converted.state_dict())


def test_only_what_a_rule_leaves_is_taken_apart() -> None:
    model, inputs = Tagger(), (torch.randint(0, 10, (3, 4)),)
    prepared(model, inputs, rules=[ig.Rule(match="lstm.*", keep="float")])
    assert type(model.lstm) is nn.LSTM
    model = Tagger()
    prepared(model, inputs, rules=[ig.Rule(match="lstm.hidden_*", keep="float")])
    train(model, inputs, steps=1)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())


def test_weight_only_and_parametrised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Holder(nn.LSTM(32, 32))
    nn.utils.parametrizations.weight_norm(model.inner, "weight_hh_l0")
    inputs = (torch.randn(3, 2, 32),)
    prepared(model, inputs, "w4a16")
    before = model.inner.parametrizations.weight_hh_l0.original1.detach().clone()
    outputs = [model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs[0](*inputs)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.inner.parametrizations.weight_hh_l0.original1, before)
    assert_equal(ig.convert(model)(*inputs)[0], model.eval()(*inputs)[0].detach())


def test_packed_sequences_are_refused() -> None:
    model, x = Holder(nn.GRU(3, 4)), torch.randn(5, 2, 3)
    prepared(model, (x,))
    with pytest.raises(PlanError, match="padded"):
        model(pack_sequence([x[:, 0], x[:3, 1]]))
