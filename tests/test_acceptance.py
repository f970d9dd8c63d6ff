"""What other libraries got wrong, held here for every layer: nine points, one after the other."""

import copy
import inspect
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import isogrid as ig
from isogrid.planning.state import quantizers, weight_quantizers
from isogrid.training import load_training, save_training
from tests.models import (
    MODELS,
    assert_equal,
    freeze_batch_norm,
    make,
    no_dropout,
    prepared,
    switch_off,
    train,
)

WEIGHTS = [*(f"int{bits}/channel" for bits in range(1, 9)), "int8/tensor", "int4/channel:narrow", "ternary/channel"]


def evaluated(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)  # type: ignore[no-any-return]


# 1. What trains is what is converted is what the runtime computes.


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_conversion_before_and_after_training(name: str) -> None:
    model, inputs = make(name)
    prepared(model, inputs)
    assert_equal(evaluated(model, inputs), evaluated(ig.convert(model), inputs))
    train(model, inputs, steps=2)
    expected = evaluated(model, inputs)
    assert expected.isfinite().all()
    assert_equal(evaluated(ig.convert(model), inputs), expected)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_evaluation_is_conversion_at_every_width(weight: str) -> None:
    model, inputs = make("residual")
    prepared(model, inputs, rules=[ig.Rule(match="re:.*(conv|fc|stem).*", weight=weight)])
    train(model, inputs, steps=2)
    assert_equal(evaluated(ig.convert(model), inputs), evaluated(model, inputs))


@pytest.mark.parametrize("name", ["residual", "sequential", "spellings", "shared", "volume"])
def test_training_with_frozen_batch_norm_is_evaluation(name: str) -> None:
    model, inputs = make(name)
    prepared(model, inputs, "w4a8")
    train(model, inputs, steps=1)
    no_dropout(freeze_batch_norm(model)).train()
    trained = model(*inputs).detach()
    assert_equal(trained, evaluated(model, inputs))


def test_the_runtime_computes_what_was_trained(tmp_path: Path) -> None:
    model, inputs = make("residual")
    prepared(model, inputs, "w4a8", [ig.Rule(match="conv1", weight="ternary/channel")])
    train(model, inputs, steps=2)
    artifact = ig.export(model, tmp_path / "model.onnx")
    report = ig.verify(model, artifact, [(torch.randn(9, 1, 8, 8),)])
    assert report, str(report)
    assert_equal(ig.load(artifact.path)(*inputs)[0], evaluated(model, inputs))
    # The file has the very scales that were learned.
    stored = [onnx.numpy_helper.to_array(i) for i in onnx.load(artifact.path).graph.initializer]
    learned = model.fc.weight_quantizer.scale.detach().flatten()
    assert any(array.shape == (3,) and torch.equal(torch.tensor(array), learned) for array in stored)


# 2. With quantisation off it is the float model.


@pytest.mark.parametrize("name", MODELS)
def test_off_is_float(name: str) -> None:
    float_model, inputs = make(name)
    model = switch_off(prepared(copy.deepcopy(float_model), inputs))
    # Attention is taken apart into products, which add up in another order than PyTorch's fused kernel.
    same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5) if name == "transformer" else assert_equal
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # PyTorch's fused kernels round elsewhere than the layers they replace, in float too.
        torch.backends.mha.set_fastpath_enabled(False)
        for training in (True, False):
            outputs = []
            for each in (float_model, model):
                torch.manual_seed(1)
                outputs.append(each.train(training)(*inputs))
                outputs[-1].square().sum().backward()
            same(*outputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    for key, parameter in float_model.named_parameters():
        same(model.get_parameter(key).grad, parameter.grad)
    for key, buffer in float_model.named_buffers():
        assert_equal(model.get_buffer(key), buffer)


def test_hooks_attributes_and_flags_survive() -> None:
    model, inputs = make("residual")
    called = []
    conv: Any = model.conv1
    conv.register_forward_hook(lambda module, args, output: called.append(type(module).__name__))
    conv.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    conv.note, model.favourites = "mine", [conv]
    model.eval()
    model.bn1.train()
    conv.weight.requires_grad_(False)
    prepared(model, inputs)
    assert (model.training, model.bn1.training, model.conv1.training) == (False, True, False)
    assert model.favourites[0] is model.conv1 and model.conv1.note == "mine"
    assert not model.conv1.weight.requires_grad
    called.clear()
    evaluated(model, inputs)
    converted = ig.convert(model)
    evaluated(converted, inputs)
    assert called == ["QuantizedConv2d", "IntegerConvolution"]
    assert converted.conv1.out_channels == 4 and converted.conv1.note == "mine"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_the_fast_path_does_not_pass_by_quantised_layers(scheme: str) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), nn.Linear(32, 2))
    inputs = (torch.randn(2, 5, 32),)
    prepared(model, inputs, scheme)
    seen = []
    for module in model.modules():
        if type(module).__name__ == "QuantizedLinear":
            module.register_forward_hook(lambda module, args, output: seen.append(module))
    evaluated(model, inputs)
    assert len(seen) == 4  # both layers, the head, and what attention gives out


def test_nothing_but_isogrids_own_is_new_in_the_state_dict() -> None:
    float_model, inputs = make("residual")
    before = {name: tensor.shape for name, tensor in float_model.state_dict().items()}
    model = prepared(float_model, inputs)
    after = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in after.items() if name in before} == before
    assert all("quantizer" in name or name == "isogrid_step" for name in after.keys() - before.keys())


# 3. All state is made in prepare, and comes back.


def test_state_is_complete_and_never_a_scalar() -> None:
    model, inputs = make("residual")
    before = prepared(model, inputs, calibrate=False).state_dict()
    quantised_only = {name: t for name, t in before.items() if "num_batches_tracked" not in name}
    assert all(tensor.dim() >= 1 for tensor in quantised_only.values())
    ig.calibrate(model, [inputs])
    train(model, inputs, steps=1)
    assert before.keys() == model.state_dict().keys()


def test_a_float_checkpoint_loads_and_says_what_it_lacks() -> None:
    model, inputs = make("residual")
    state = copy.deepcopy(model.state_dict())
    missing, unexpected = prepared(model, inputs).load_state_dict(state, strict=False)
    assert not unexpected
    assert all("quantizer" in name or name == "isogrid_step" for name in missing)


def test_one_step_saved_and_restored_goes_on_with_the_same_loss(tmp_path: Path) -> None:
    def flow(model: nn.Module) -> tuple[torch.optim.Optimizer, ig.Schedule]:
        return torch.optim.Adam(ig.parameter_groups(model, lr=1e-2)), ig.Schedule(model, 4, freeze_batch_norm=0.5)

    def step(model: nn.Module, inputs: Any, optimizer: Any, schedule: ig.Schedule) -> Tensor:
        optimizer.zero_grad()
        loss = model.train()(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    model, inputs = make("residual")
    prepared(model, inputs)
    training = flow(model)
    step(model, inputs, *training)
    save_training(tmp_path, model, training[0], {"step": 1})
    expected = [step(model, inputs, *training) for _ in range(3)]

    again = ig.restore(make("residual", seed=9)[0], tmp_path)
    resumed = flow(again)
    assert load_training(tmp_path, again, resumed[0]) == {"step": 1}
    assert_equal([step(again, inputs, *resumed) for _ in range(3)], expected)


# 4. Optimizers, compilers and copies.


def test_learned_scales_are_parameters_at_once_and_stay_positive() -> None:
    model, inputs = make("residual")
    prepared(model, inputs, "w4a8", calibrate=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(q.raw_scale) in known for q in quantizers(model).values())
    ig.calibrate(model, [inputs])
    model(*inputs).square().mean().backward()
    optimizer.step()
    assert all((q.scale > 0).all() for q in quantizers(model).values())
    assert evaluated(model, inputs).isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_break(frozen: bool) -> None:
    torch.compiler.reset()
    model, inputs = make("small")
    prepared(model, inputs)
    if frozen:
        freeze_batch_norm(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    outputs = [each(*inputs) for each in (model, compiled)]
    assert_equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for key, parameter in model.named_parameters():
        # Sums over the tensor, the gradients of scales, are added up in another order.
        torch.testing.assert_close(twin.get_parameter(key).grad, parameter.grad)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "scheme"), [("residual", "w8a8"), ("tied", "w4a16")])
def test_trains_sharded_and_in_parallel(one_process: None, name: str, scheme: str) -> None:
    model, inputs = make(name)
    no_dropout(prepared(model, inputs, scheme))
    sharded, parallel = copy.deepcopy(model), DistributedDataParallel(copy.deepcopy(model))
    mesh = init_device_mesh("cpu", (1,))
    if name == "residual":
        fully_shard(sharded.stem, mesh=mesh)  # whose output grid others read too
    fully_shard(sharded, mesh=mesh)
    expected = model(*inputs)
    for each in (sharded, parallel):
        output = each(*inputs)
        assert_equal(output, expected)
        output.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert_equal(parallel.module.get_parameter(key).grad, parameter.grad)
        assert_equal(sharded.get_parameter(key).grad.full_tensor(), parameter.grad)
    torch.optim.Adam(sharded.parameters()).step()


@pytest.mark.parametrize("name", ["residual", "tied"])
def test_a_converted_model_can_be_exported_by_torch(name: str) -> None:
    model, inputs = make(name)
    converted = ig.convert(prepared(model, inputs))
    program = torch.export.export(converted, inputs)
    assert_equal(program.module()(*inputs), converted(*inputs))


@pytest.mark.parametrize("name", ["residual", "tied", "shared"])
def test_copies_and_pickles_are_the_same_model(name: str) -> None:
    model, inputs = make(name)
    train(prepared(model, inputs), inputs, steps=1)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(evaluated(again, inputs), evaluated(model, inputs))
        train(again, inputs, steps=1)
        assert_equal(evaluated(ig.convert(again), inputs), evaluated(again, inputs))
    assert list(inspect.signature(model.forward).parameters) in (["x"], ["tokens"])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a8-dynamic"])
def test_trains_under_autocast(scheme: str) -> None:
    model, inputs = make("tied")
    prepared(model, inputs, scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert_equal(evaluated(ig.convert(model), inputs), evaluated(model, inputs))


def test_few_bit_weights_train_in_bfloat16() -> None:
    model, inputs = make("tied")
    prepared(model.bfloat16(), inputs, "w4a16")
    model(*inputs).float().square().mean().backward()
    assert all(q.scale.dtype == torch.float32 for q in quantizers(model).values())
    assert model.head.weight.grad.dtype == torch.bfloat16
    with pytest.raises(ig.IsogridError, match=r"Call model.float\(\) first"):
        prepared(make("tied")[0].bfloat16(), inputs, "w8a8")


# 5. Never silent: see tests/planning. Here, that nothing falls through the table.


@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_parameters_is_in_the_plan(name: str) -> None:
    model, inputs = make(name)
    plan = ig.plan(model, example_inputs=inputs)
    listed = {layer.path for layer in plan.layers} | {layer.batch_norm for layer in plan.layers}
    listed |= {name for name, _ in plan.floats}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            inside = path in plan.apart and any(str(entry).startswith(f"{path}.") for entry in listed)
            assert inside or any(path == entry or path.startswith(f"{entry}.") for entry in listed), path
    assert all(reason for _, reason in plan.floats) and all(site.reason for site in plan.sites)
    assert all(site.name in str(plan) for site in plan.sites)


# 6. Gradients reach everything.


@pytest.mark.parametrize("scheme", ["w8a8", "w2a8", "ternary-a8", "w4a16", "w4a8-dynamic"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_weights_biases_norms_and_scales(scheme: str, frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))
    inputs = (torch.randn(8, 32),)
    prepared(model, inputs, scheme)
    if frozen:
        freeze_batch_norm(model)
    (model(*inputs) - 1).square().sum().backward()
    for name, parameter in model.named_parameters():
        # Before batch norm that uses the batch's mean, a bias is subtracted again.
        if name != "0.bias" or frozen:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saturated_weights_get_no_gradient_by_the_straight_through_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    inputs = (torch.ones(2, 4),)
    prepared(model, inputs, rules=[ig.Rule(match="0", weight="int4/channel", scale="frozen", estimator="ste")])
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight_quantizer.raw_scale.fill_(0.1)
        layer.weight.copy_(torch.tensor([[-0.86, -0.8, 0.74, 0.76]]))
    model(*inputs).sum().backward()
    assert (layer.weight.grad != 0).tolist() == [[False, True, True, False]]


# 7. Schedules: see tests/training/test_schedule.py.  8. What is exported is what was learned.


def test_codes_of_few_bits_stay_within_their_bits(tmp_path: Path) -> None:
    model, inputs = make("residual")
    prepared(model, inputs, "w2a8")
    train(model, inputs, steps=2, lr=0.1)
    converted = ig.convert(model)
    for name in weight_quantizers(model):
        codes = converted.get_submodule(name.rpartition(".")[0]).codes
        assert codes.dtype == torch.int8 and codes.min() >= -2 and codes.max() <= 1


# 9. Documentation that runs: see tests/test_documentation.py, tests/test_readme.py and the doctests.
