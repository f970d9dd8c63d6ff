"""Experts stacked in parameters, against transformers' own computation of them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from isogrid.layers.experts import BorrowedExperts, SeparateExperts, are_stacked_experts
from isogrid.layers.operations import GroupedOperation

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def experts_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_key_value_heads=1, num_local_experts=5, head_dim=8)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    found = next(module for module in model.modules() if are_stacked_experts(module))
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    return found


def routing() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights, experts = torch.randn(19, 5, generator=generator)[:, :4].softmax(-1).topk(2)
    return torch.randn(19, 16, generator=generator), experts, weights  # the fifth expert is never chosen


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_separate_experts_compute_what_transformers_does(kind: str) -> None:
    experts = experts_of(kind)
    separate = SeparateExperts.of(experts)
    assert torch.equal(separate(*routing()), experts(*routing()))
    assert separate.state_dict().keys() == experts.state_dict().keys()
    assert not are_stacked_experts(separate)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_gradients_are_those_of_transformers(kind: str) -> None:
    experts = experts_of(kind)
    separate = SeparateExperts.of(copy.deepcopy(experts))
    for module in (experts, separate):
        module(*routing()).square().sum().backward()
    for name, parameter in experts.named_parameters():
        found = separate.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad)  # sums over tokens in another order


def test_each_stack_is_one_matrix_of_rows() -> None:
    experts = experts_of("GptOss")  # it stores its weights [experts, in, out]
    layer = SeparateExperts.of(experts).gate_up_projection
    assert isinstance(layer, BorrowedExperts)
    assert torch.equal(layer.weight[48:96], experts.gate_up_proj[1].T)
    assert torch.equal(layer.bias[48:96], experts.gate_up_proj_bias[1])


def test_separate_experts_copy_and_pickle() -> None:
    separate = SeparateExperts.of(experts_of("Mixtral"))
    expected = separate(*routing())
    for again in (copy.deepcopy(separate), pickle.loads(pickle.dumps(separate))):
        assert torch.equal(again(*routing()), expected)
        assert again.down_projection.owner is again


def test_derivatives_of_grouped_products() -> None:
    torch.manual_seed(2)
    operation = GroupedOperation((3, 3, 7))
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((7, 4), (6, 4), (6,)))
    y = operation.forward(x, weight, bias)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    found = operation.backward(gradient, x.detach(), weight.detach(), (True, True, True))
    for derivative, tensor in zip(found, (x, weight, bias), strict=True):
        torch.testing.assert_close(derivative, tensor.grad)


def test_experts_spread_over_devices_are_left_alone() -> None:
    experts = experts_of("Mixtral")
    experts._is_expert_parallel = True
    assert not are_stacked_experts(experts)
