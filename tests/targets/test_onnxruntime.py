"""The target onnxruntime: what it takes, what it refuses with a way out, and what its files carry."""

import hashlib
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import ArtifactError, PlanError, TargetError
from isogrid.planning.plan import Plan
from isogrid.targets import target_from_name
from isogrid.targets.onnx_artifact import export_float
from isogrid.targets.onnx_runtime_session import open_session
from isogrid.targets.onnxruntime import SESSION_OPTIONS
from tests.verification.examples import exported


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(image)) + shift)


INPUTS = (torch.zeros(2, 32), torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("scheme", "rule", "message"),
    [
        ("w8a8", {"weight": "int8/group32"}, r"'first'.*float32 scale per channel or tensor, not int8/group32"),
        ("w8a8", {"weight": "uint4/channel"}, r"symmetric integer weights.*Use int8/channel"),
        ("w8a8", {"weight": "fp8_e4m3/tensor"}, r"symmetric integer weights.*not fp8_e4m3/tensor"),
        ("w8a8", {"activation": "int8/tensor"}, r"take activations as uint8/tensor, or .* not int8/tensor"),
        ("w8a8", {"activation": "uint8/channel"}, r"take activations as uint8/tensor"),
        ("w4a16", {"weight": "int3/group32"}, r"2, 4, 8 bits in groups of .* not int3/group32. Use int4/group32"),
        ("w4a16", {"weight": "int4/group8"}, r"groups of 16, 32, 64, 128, 256"),
        ("w4a16", {"weight": "int4/channel"}, r"groups of 16, 32, 64, 128, 256"),
        ("w4a16", {"weight": "int4/group32:scale=bfloat16"}, r"with a float32 scale"),
        ("w4a8-dynamic", {"weight": "int2/group16"}, r"no kernel that quantises activations.*Use int2/group32"),
    ],
)
def test_formats_that_cannot_run_are_refused_with_what_can(scheme: str, rule: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        ig.plan(Two(), scheme=scheme, rules=[ig.Rule(match="first", **rule)], example_inputs=INPUTS)  # type: ignore[arg-type]


def test_layers_without_a_kernel_are_not_quantised_by_a_rule() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(PlanError, match="MatMulNBits computes linear layers only, and this is Conv2d"):
        ig.plan(
            model,
            scheme="w4a16",
            rules=[ig.Rule(match="0", weight="int4/group16")],
            example_inputs=(torch.zeros(1, 1, 4, 4),),
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    x = (torch.randn(4, 32), torch.randn(4, 32))
    return exported(Two(), x, tmp_path_factory.mktemp("two") / "model.onnx")[1].path


def test_the_file_says_what_it_is(path: Path) -> None:
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    artifact = ig.load(path).artifact
    assert Plan.from_json(properties["isogrid.plan"]) == artifact.plan
    assert json.loads(properties["isogrid.versions"]) == artifact.versions
    assert json.loads(properties["isogrid.session_options"]) == artifact.session_options == SESSION_OPTIONS
    assert set(artifact.versions) == {"isogrid", "torch", "onnx", "onnxscript", "onnxruntime"}
    del model.metadata_props[:]
    assert properties["isogrid.digest"] == hashlib.sha256(model.SerializeToString()).hexdigest()
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_inputs_have_the_names_of_the_arguments_and_any_batch_size(path: Path) -> None:
    loaded = ig.load(path)
    assert list(loaded.input_names) == ["image", "shift"]
    for examples in (1, 3):
        (output,) = loaded(torch.zeros(examples, 32), torch.zeros(examples, 32))
        assert output.shape == (examples, 4)


def test_inputs_that_do_not_fit_are_said(path: Path) -> None:
    loaded = ig.load(path)
    with pytest.raises(TargetError, match=r"takes 2 inputs \(image, shift\), not 1"):
        loaded(torch.zeros(1, 32))
    with pytest.raises(TargetError, match=r"cannot run .*image: float32 \[1, 31\]"):
        loaded(torch.zeros(1, 31), torch.zeros(1, 32))
    with pytest.raises(TargetError, match="Pass float32"):
        loaded(torch.zeros(1, 32).bfloat16(), torch.zeros(1, 32))


def test_threads_do_not_change_the_bits(path: Path) -> None:
    x = torch.randn(64, 32), torch.randn(64, 32)
    one, many = (target_from_name("onnxruntime").load(path, threads)(*x)[0] for threads in (1, 2))
    assert torch.equal(one, many)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = Two()
    ig.prepare(model, ig.plan(model, example_inputs=INPUTS))
    ig.calibrate(model, [(torch.randn(4, 32), torch.randn(4, 32))])
    with pytest.raises(ArtifactError, match="Cannot write to"):
        ig.export(model, tmp_path / "file" / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_beyond_what_one_file_holds_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    with pytest.raises(TargetError, match="one ONNX file can hold 2 GB"):
        export_float(Two(), INPUTS, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_float_model_computes_what_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Two()
    x = torch.randn(3, 32), torch.randn(3, 32)
    session = open_session(export_float(model, x, tmp_path / "float.onnx"), {})
    (output,) = session.run(None, {entry.name: v.numpy() for entry, v in zip(session.get_inputs(), x, strict=True)})
    assert torch.allclose(torch.from_numpy(output), model(*x), atol=1e-6)
