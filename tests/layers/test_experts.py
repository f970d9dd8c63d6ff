"""Experts stacked in parameters, against transformers' own computation of them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from isogrid.formats import named_format
from isogrid.layers.dynamic import activation_rule
from isogrid.layers.experts import BorrowedExperts, SeparateExperts, StoredExperts, are_stacked_experts
from isogrid.layers.operations import GroupedOperation
from isogrid.layers.stored import StoredLinear

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
        found, expected = separate.get_parameter(name).grad, parameter.grad
        # Sums over tokens in another order: a few roundings of the largest.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_sums_that_the_runtime_stores_multiply_each_experts_minima() -> None:
    weight, x = torch.randn(3 * 8, 64), torch.randn(10, 64)
    rule = activation_rule("q8_1")
    quantized = named_format("q4_1").quantize(weight)
    found = StoredExperts(quantized, None, rule)(x, (4, 4, 10))
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 10))):
        own = slice(8 * expert, 8 * expert + 8)
        alone = StoredLinear(named_format("q4_1").quantize(weight[own]), None, rule)
        assert torch.equal(found[rows], alone(x[rows]))


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
