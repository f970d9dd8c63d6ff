"""The torch.export form of converted models, read by torch itself."""

import pytest
import torch

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.planning.convert import watched
from isogrid.targets.decomposed import decompose
from tests.models import make, prepared


def converted(name, scheme="w8a8"):
    model, inputs = make(name)
    return ig.convert(prepared(model, inputs, scheme)), inputs


@pytest.mark.parametrize("stored_as", ["codes", "values"])
@pytest.mark.parametrize("name", ["residual", "spellings", "shared", "sequential"])
def test_float_arithmetic_on_it_gives_the_codes(name, stored_as):
    integer, inputs = converted(name)
    parts = decompose(integer, inputs, stored_as=stored_as)
    seen = {}

    def watch(site, codes):
        seen.setdefault(site, codes)
        return codes

    with torch.no_grad(), watched(integer, watch):
        expected = integer(*inputs)
    outputs = parts.observing.module()(*inputs)
    codes = outputs[len(outputs) - len(set(parts.codes.values())) :]
    assert seen.keys() <= parts.codes.keys()
    for site, first in seen.items():
        path, _, kind = site.rpartition(".")
        scale, point = integer.get_submodule(path).grid(kind)
        theirs = codes[parts.codes[site]].reshape(first.shape)
        theirs = theirs.int() if stored_as == "codes" else torch.round(theirs / scale + point).int()
        # Float arithmetic rounds a value near a tie the other way: by one step, and seldom.
        assert (theirs - first.int()).abs().max() <= 1
        assert (theirs != first.int()).float().mean() < 0.001
    torch.testing.assert_close(parts.program.module()(*inputs), expected, rtol=0.02, atol=0.02)


def test_it_holds_nothing_of_isogrid_and_quantises_nothing_twice():
    integer, inputs = converted("residual")
    parts = decompose(integer, inputs)
    functions = [node.target for node in parts.program.graph.nodes if node.op == "call_function"]
    assert not any(function.namespace == "isogrid" for function in functions)
    assert parts.layers == ["stem.0", "conv1", "conv2", "fc"]
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    made = [node for node in parts.program.graph.nodes if node.target is quantize]
    assert len({(n.args[0], n.args[1:3]) for n in made}) == len(made)
    assert not any("copy" in str(function) or "dropout" in str(function) for function in functions)


def test_a_layer_that_is_called_twice_is_named_twice():
    integer, inputs = converted("shared")
    parts = decompose(integer, inputs)
    assert parts.layers == ["block.linear", "block.linear_2", "head"]
    assert {"block.linear.input", "block.linear.input_2"} <= parts.codes.keys()


def test_python_that_depends_on_the_data_is_an_error_of_ours():
    integer, inputs = converted("dynamic")
    with pytest.raises(TargetError, match=r"torch.export cannot trace the model"):
        decompose(integer, inputs)
