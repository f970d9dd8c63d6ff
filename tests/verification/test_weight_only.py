"""Weights of few bits under float arithmetic, and under activations that ONNX Runtime quantises as they come."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.targets.onnx_runtime_session import open_session
from tests.verification.examples import Tokens, exported

FORMATS = {"a": (2, 32), "b": (4, 16), "c": (4, 32), "d": (8, 16), "e": (8, 32)}


class Stack(nn.Module):
    """Linear layers, each with another format, and float arithmetic between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(96, 96, bias=name != "c") for name in FORMATS})
        self.norm = nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = nn.functional.gelu(layer(self.norm(x)))
        return x


@pytest.mark.parametrize("level", [1, 4])
def test_what_is_trained_is_what_runs(tmp_path: Path, level: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 96)
    rules = [ig.Rule(match=f"layers.{name}", weight=f"int{b}/group{g}") for name, (b, g) in FORMATS.items()]
    scheme = "w4a16" if level == 1 else "w4a8-dynamic"
    model, artifact = exported(Stack(), (x,), tmp_path / "model.onnx", scheme=scheme, rules=rules)
    report = ig.verify(model, artifact, [x, x[:1]])
    assert report, report.failures
    assert not report.exact
    assert {check.operator for check in report.graph} == {f"MatMulNBits (level {level})"}
    assert {check.arithmetic for check in report.graph} == {"float" if level == 1 else "integer"}
    assert [check.macs for check in report.graph] == [5 * 96 * 96] * len(FORMATS)
    replays = {check.name: check for check in report.replays}
    assert set(replays) == {f"layers.{name}.{end}" for name in FORMATS for end in ("input", "output")} | {"output"}
    bound = 96**0.5 * 2**-23 if level == 1 else 1e-6
    assert all(replays[f"layers.{name}.output"].bound == bound for name in FORMATS)
    with torch.no_grad():
        integer = ig.convert(model)
        prepared, converted = model.eval()(x), integer(x)
        for name in FORMATS:
            mine, theirs = model.layers[name](x), integer.layers[name](x)
            assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    # One layer after the other rounds in its own order, and at level 4 a code may flip.
    assert (prepared - converted).abs().max() <= (1e-5 if level == 1 else 1e-2) * converted.abs().max()
    if level == 4:
        float_activations = ig.convert(model)
        for module in float_activations.modules():
            if hasattr(module, "accuracy_level"):
                module.accuracy_level = 1
        with torch.no_grad():  # what training without the runtime's rule would be off by
            assert (float_activations(x) - converted).abs().max() > 1e-3 * converted.abs().max()


def test_two_bits_whose_activations_nobody_quantises_are_refused() -> None:
    rules = [ig.Rule(match="*", weight="int2/group16")]
    with pytest.raises(TargetError, match=r"no kernel that quantises activations for int2/group16.*int2/group32"):
        ig.plan(Stack(), scheme="w4a8-dynamic", rules=rules, example_inputs=(torch.zeros(1, 96),))


def test_long_sums_stay_within_the_bound(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4096)
    model, artifact = exported(nn.Sequential(nn.Linear(4096, 64)), (x,), tmp_path / "model.onnx", scheme="w4a16")
    report = ig.verify(model, artifact, [x])
    assert report, report.failures


@pytest.mark.parametrize(
    ("format", "stored"), [("int8/group32", "INT8"), ("int4/group32", "INT4"), ("int4/channel", "INT4")]
)
def test_embeddings_are_stored_and_read_exactly(tmp_path: Path, format: str, stored: str) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 50, (3, 7))
    rules = [ig.Rule(match="words", weight=format)]
    model, artifact = exported(Tokens(), (words,), tmp_path / "model.onnx", scheme="w4a16", rules=rules)
    report = ig.verify(model, artifact, [words, words[:1, :3].repeat(1, 3)[:, :7]])
    assert report, report.failures
    assert next(check for check in report.parameters if check.name == "words.weight").compared == 50 * 64
    replays = {check.name: check for check in report.replays}
    assert replays["up.input"].bound == 0 and replays["up.input"].differing == 0
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in onnx.load(artifact.path).graph.initializer}
    assert types["words.weight"] == stored


def test_the_options_that_keep_the_runtime_to_what_was_trained_are_stored_and_applied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 96)
    model, artifact = exported(Stack(), (x,), tmp_path / "model.onnx", scheme="w4a16")
    expected = {"session.x64quantprecision": "1", "session.qdq_matmulnbits_accuracy_level": "1"}
    assert artifact.session_options == expected
    loaded = ig.load(artifact.path)
    options = loaded.session.get_session_options()  # type: ignore[attr-defined]
    assert {name: options.get_session_config_entry(name) for name in expected} == expected
    plain = open_session(artifact.path, {})
    with pytest.raises(RuntimeError):
        plain.get_session_options().get_session_config_entry("session.x64quantprecision")
    assert ig.verify(model, artifact, [x])


def test_one_large_term_in_front_of_many_small_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 4096)
    x[:, 0] = 4000.0  # each addition behind it rounds a sum as large as all there is
    model = nn.Sequential(nn.Linear(4096, 32, bias=False))
    plan = ig.plan(model, "onnxruntime", "w4a16", [ig.Rule(match="*", range="absmax")], example_inputs=(x,))
    model = ig.prepare(model, plan).eval()
    report = ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [(x,)])
    (check,) = [check for check in report.replays if check.name == "0.output"]
    assert 1e-6 < check.max_difference < check.bound == 4096**0.5 * 2**-23
    assert report, report.failures
