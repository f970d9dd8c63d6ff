"""What is exported computes, in ONNX Runtime, what the module computes: every bit."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from isogrid.layers import (
    nbits,
    operators,  # noqa: F401  defines torch.ops.isogrid
)
from isogrid.targets.onnx_export import to_onnx
from isogrid.targets.onnx_graph import _module_path
from isogrid.targets.onnx_runtime_session import (
    STATIC_OPTIONS,
    open_session,
    operator_counts,
    optimized_graph,
)
from tests.targets.integer_modules import FloatBetween, Linear, Residual, ReturnedAndRead, Various, recorded_codes
from tests.targets.observing import observed

WEIGHT_TYPES = {(-128, 127): "INT8", (-8, 7): "INT4", (-1, 1): "INT2"}


def exported(module: nn.Module, x: Tensor, folder: Path, **options: object) -> Path:
    path = folder / "model.onnx"
    onnx.save(to_onnx(module.eval(), (x,), **options), path)  # type: ignore[arg-type]
    return path


def assert_same_bits(module: nn.Module, path: Path, x: Tensor) -> None:
    logits, ours = recorded_codes(module, x)
    outputs, codes, *_ = observed(path, STATIC_OPTIONS, x)
    assert torch.equal(outputs[0], logits)
    for name, value in codes.items():
        assert any(torch.equal(value.reshape(-1), own.reshape(-1)) for own in ours), name
    for own in ours:
        assert any(torch.equal(value.reshape(-1), own.reshape(-1)) for value in codes.values())


# A ReLU whose grid has its zero above the lowest code needs a Clip.
@pytest.mark.parametrize(("codes", "zero_point"), [((-128, 127), 0), ((-8, 7), 9), ((-1, 1), 0)])
def test_residual_network(codes: tuple[int, int], zero_point: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Residual(codes, zero_point)
    path = exported(module, torch.randn(2, 3, 16, 16), tmp_path)
    for batch in (1, 5):
        assert_same_bits(module, path, torch.randn(batch, 3, 16, 16))
    counts = operator_counts(optimized_graph(path, STATIC_OPTIONS))
    assert counts.integer == {"QLinearConv": 2, "QGemm": 1}
    assert not counts.floating
    assert counts.other["QLinearAdd"] == counts.other["QLinearGlobalAveragePool"] == counts.other["QuantizeLinear"] == 1
    model = onnx.load(path)
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if t.name.endswith(".weight")}
    assert types == {WEIGHT_TYPES[codes]}


def test_branches_sharing_and_narrow_grids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Various()
    path = exported(module, torch.randn(3, 4, 12), tmp_path)
    for batch in (1, 2, 7):
        assert_same_bits(module, path, torch.randn(batch, 4, 12))
    counts = operator_counts(optimized_graph(path, STATIC_OPTIONS))
    assert counts.integer == {"QLinearConv": 2, "QGemm": 6}
    assert not counts.floating
    assert {"QLinearConcat", "QLinearAveragePool", "QLinearMul"} <= set(counts.other)


@pytest.mark.parametrize("codes", list(WEIGHT_TYPES))
def test_layers_with_equal_codes_and_scales_of_their_own(codes: tuple[int, int], tmp_path: Path) -> None:
    """The file stores equal codes once; ONNX Runtime cannot turn one tensor into unsigned codes twice."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Linear((8, 8), (0.1, 128), (0.1, 128), codes) for _ in range(3)))
    module.append(Linear((8, 8), (0.1, 128), None, codes))
    for layer in module[1:]:
        layer.weight = module[0].weight.clone()
    module[3].weight_scale = module[2].weight_scale.clone()
    path = exported(module, torch.randn(3, 8), tmp_path)
    assert_same_bits(module, path, torch.randn(5, 8))
    assert sum(t.name.endswith(".weight") for t in onnx.load(path).graph.initializer) == 1
    counts = operator_counts(optimized_graph(path, STATIC_OPTIONS))
    assert counts.integer == {"QGemm": 4} and not counts.floating


def test_what_is_float_between_quantised_tensors_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = FloatBetween()
    path = exported(module, torch.randn(3, 16), tmp_path)
    counts = operator_counts(optimized_graph(path, STATIC_OPTIONS))
    assert set(counts.integer) == {"QGemm"}
    assert not counts.floating
    assert {"Add", "AveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax"} <= set(counts.other)
    x = torch.randn(2000, 16)
    theirs = open_session(path, STATIC_OPTIONS, threads=1).run(None, {"x": x.numpy()})[0]
    # Only torch and ONNX Runtime's exponentials differ, which moves a code where it decides.
    exact = torch.ones(32, dtype=torch.bool)
    exact[8:12] = exact[16:20] = False
    assert np.array_equal(theirs[:, exact], module(x)[:, exact].numpy())


def test_a_value_that_leaves_the_model_is_not_rounded_for_its_reader(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ReturnedAndRead()
    path = exported(module, torch.randn(3, 16, 16), tmp_path)
    x = torch.randn(5, 16, 16)
    for ours, theirs in zip(module(x), observed(path, STATIC_OPTIONS, x).outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_names_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Residual((-8, 7))
    path = exported(module, torch.randn(1, 3, 16, 16), tmp_path, input_names=["image"], output_names=["logits"])
    model = onnx.load(path)
    onnx.checker.check_model(model)
    quantized = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantized == [
        "conv1.input",
        "conv1.output",
        "conv2.input",
        "conv2.output",
        "add.output",
        "mean.output",
        "fc.input",
    ]
    kinds = Counter(node.op_type for node in model.graph.node)
    assert {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")} == {"conv1", "conv2", "fc"}
    assert kinds["Cast"] == 3
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["image", "logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.graph.value_info
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert path.stat().st_size < stored + 150 * len(model.graph.node)


class NBits(nn.Module):
    def __init__(self, bits: int, block: int, level: int, asymmetric: bool) -> None:
        super().__init__()
        codes = torch.randint(0, 2**bits, (24, 128), dtype=torch.uint8)
        blocks = (24, 128 // block)
        self.register_buffer("weight", nbits.pack_matmul_nbits(codes, bits, block))
        self.register_buffer("weight_scale", torch.rand(blocks) * 0.02 + 0.001)
        zeros = nbits.pack_zero_points(torch.randint(0, 2**bits, blocks, dtype=torch.uint8), bits)
        self.register_buffer("weight_zero_point", zeros if asymmetric else None)
        self.register_buffer("bias", torch.randn(24))
        self.parameters_of_operator = (bits, block, level)

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, self.weight_scale, self.weight_zero_point, self.bias)
        return torch.ops.isogrid.matmul_nbits(x, *operands, *self.parameters_of_operator)


class Parallel(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], -1)


def test_matmul_nbits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = [(4, 32, 1, False), (4, 32, 4, True), (2, 64, 4, False), (8, 16, 4, False)]
    module = Parallel(*(NBits(*kind) for kind in kinds))
    x = torch.randn(2, 5, 128)
    path = exported(module, x, tmp_path)
    assert operator_counts(onnx.load(path)).integer == {"MatMulNBits": 4}
    counts = operator_counts(optimized_graph(path, {}))
    assert counts.integer == {"MatMulNBits": 4}
    assert not counts.floating
    session = open_session(path, {})
    ours, theirs = module(x), torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    # Both add in float32, in different orders.
    assert (ours - theirs).abs().max() < 1e-6 * ours.abs().max()


def test_fixed_batch(tmp_path: Path) -> None:
    path = exported(NBits(4, 32, 1, False), torch.randn(1, 128), tmp_path, dynamic_batch=False)
    assert open_session(path, {}).get_inputs()[0].shape == [1, 128]


def test_a_module_is_found_by_parts_of_its_path() -> None:
    def path(*scopes: str) -> str | None:
        node = ir.node("Conv", [])
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", *scopes, "static_convolution"])
        return _module_path(node, {"encoder.stages.0.layers.1.convolution", "encoder", "head"})

    assert path("encoder", "stages.0", "layers", "layers.1", "convolution") == "encoder.stages.0.layers.1.convolution"
    whole = ["encoder", "encoder.stages.0", "encoder.stages.0.layers.1", "encoder.stages.0.layers.1.convolution"]
    assert path(*whole) == "encoder.stages.0.layers.1.convolution"
    assert path("encoder", "head") == "head"  # one module calls another's


def test_constants_that_cannot_be_folded_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    class Gathering(nn.Module):
        """ONNX's reference evaluator gathers from no more than 32 constants."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.zeros(1, 64, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.gather(self.row, 1, self.row[:, :48])

    to_onnx(Gathering().eval(), (torch.zeros(2, 48),))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
