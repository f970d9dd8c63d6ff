"""Adapters that merge exactly: what is trained, Q(W + BA), is what is stored and served."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import isogrid as ig
from isogrid.errors import CheckpointError, PlanError
from isogrid.layers.weights import base_of, weight_of
from isogrid.training import load_training, save_training
from tests.models import assert_equal, make, prepared


class Wide(nn.Module):
    """An embedding, a layer with a forward of its own, two that share a weight, one of GPT-2's kind, a plain one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = nn.Embedding(32, 256)
        self.a, self.b, self.c, self.d = nn.Linear(256, 64), nn.Linear(64, 256), Conv1D(64, 256), Scaled(64, 256)
        self.e = nn.Linear(256, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(self.table(tokens))))
        return self.e(self.d(F.relu(self.c(x))))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 0.5, self.bias)


def wide() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Wide(), (torch.randint(0, 32, (3, 5)),)


def adapted(scheme: str, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    model, inputs = wide()
    prepared(model, inputs, scheme)
    ig.add_adapters(model, **{"rank": 4, "alpha": 8, **options})
    return model, inputs


def fine_tune(model: nn.Module, inputs: tuple[Any, ...], steps: int = 2) -> list[float]:
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=0.02))
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(*inputs) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_merges_exactly(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Trained, converted, and merged and converted: all the same, down to the stored codes."""
    model.eval()
    trained = model(*inputs).detach()
    integer = ig.convert(model)
    assert_equal(integer(*inputs), trained)
    merged = ig.merge_adapters(copy.deepcopy(model))
    assert not [name for name in merged.state_dict() if "adapters" in name]
    assert_equal(merged(*inputs).detach(), trained)
    again = ig.convert(merged).state_dict()
    assert integer.state_dict().keys() == again.keys()
    for name, tensor in integer.state_dict().items():
        assert_equal(again[name], tensor)


@pytest.mark.parametrize(
    ("scheme", "dora"), [("w4a16", True), ("q4_0", False), ("nvfp4a16", False), ("w4a8-dynamic", False)]
)
def test_what_is_trained_is_what_is_merged(scheme: str, dora: bool) -> None:
    layers = ["a", "b"] if scheme == "nvfp4a16" else ["table", "a", "b", "e"]
    model, inputs = adapted(scheme, match=layers, dora=dora)
    before = ig.convert(model).state_dict()
    fine_tune(model, inputs)
    after = ig.convert(model).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith("weight"))
    assert_merges_exactly(model, inputs)


def test_a_weight_that_is_computed_is_merged_where_it_is_converted() -> None:
    model, inputs = adapted("w4a16", match="d")
    fine_tune(model, inputs)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())
    with pytest.raises(PlanError, match=r"The weight of 'd' is computed"):
        ig.merge_adapters(model)


@pytest.mark.parametrize("name", ["residual", "geometries", "tied", "transformer", "volume"])
def test_static_integers_merge_exactly(name: str) -> None:
    model, inputs = make(name)
    prepared(model, inputs)
    ig.add_adapters(model, rank=1)
    fine_tune(model, inputs)
    assert_merges_exactly(model, inputs)


def test_k_quants_merge_exactly() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 256)), (torch.randn(3, 256),)
    rules = [ig.Rule(match="0", weight="q4_k"), ig.Rule(match="2", weight="q4_1")]
    ig.prepare(model, ig.plan(model, scheme="q8_0", rules=rules, example_inputs=inputs))
    ig.add_adapters(model, rank=4)
    fine_tune(model, inputs)
    assert_merges_exactly(model, inputs)


def test_transposed_and_normed_weights_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), weight_norm(nn.Conv2d(6, 4, 3)))
    inputs = (torch.randn(2, 4, 5, 5),)
    prepared(model, inputs)
    ig.add_adapters(model, rank=2)
    fine_tune(model, inputs)
    model.eval()
    assert_equal(ig.convert(model)(*inputs), model(*inputs).detach())


def test_gradients_are_those_of_the_sum_written_out() -> None:
    """A step of L4Q against autograd through the merged weight, its sum kept in memory."""
    model, inputs = adapted("w4a16", match="a")
    model.a.adapters["default"].B.data.normal_(std=0.05)
    model.zero_grad()
    model(*inputs).square().sum().backward()
    adapter = model.a.adapters["default"]

    plain = ig.merge_adapters(copy.deepcopy(model))
    plain.a.weight.requires_grad_(True)
    plain.a.weight.grad = None
    plain.a.weight_quantizer.zero_grad()
    plain(*inputs).square().sum().backward()
    dense = plain.a.weight.grad
    assert_equal(adapter.B.grad, (dense @ adapter.A.T).mul_(2.0).detach())
    assert_equal(adapter.A.grad, (adapter.B.T @ dense).mul_(2.0).detach())
    assert_equal(model.a.weight_quantizer.raw_scale.grad, plain.a.weight_quantizer.raw_scale.grad)
    assert model.a.weight.grad is None and model.b.weight.grad is None


def test_the_gradient_of_dora_leaves_the_norm_out() -> None:
    model, inputs = adapted("w4a16", match="a", dora=True)
    for quantizer in (model.a.weight_quantizer, model.b.weight_quantizer):
        quantizer.enabled = False
    adapter = model.a.adapters["default"]
    adapter.B.data.normal_(std=0.05)
    loss = F.relu(model.a(model.table(*inputs))).square().sum()
    loss.backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B, adapter.magnitude))
    total = model.a.weight.detach() + 2.0 * (b @ a)
    weight = total * (m / total.norm(dim=1).detach()).unsqueeze(1)
    F.relu(F.linear(model.table(*inputs).detach(), weight, model.a.bias)).square().sum().backward()
    for found, expected in ((adapter.A, a), (adapter.B, b), (adapter.magnitude, m)):
        # Autograd adds up in another order.
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_no_sum_is_kept_for_the_backward_pass() -> None:
    model, inputs = adapted("w4a16")
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(*inputs)
    smallest = min(p.numel() for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() > 1) * 4
    assert y.requires_grad
    # The forward of d computes a weight of its own, before there is any sum.
    assert [size for size in kept.values() if size >= smallest] == [64 * 256 * 4]


def test_everything_but_adapters_and_scales_is_frozen() -> None:
    model, _ = wide()
    prepared(model, wide()[1], "w4a16")
    report = ig.add_adapters(model, rank=4, alpha=8)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".adapters." in name or "weight_quantizer" in name for name in names)
    assert {name.partition(".")[0] for name in names if "adapters" in name} == {"a", "b", "c", "d", "e"}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trainable and report.merges_exactly
    assert "What is served is what was trained" in str(report)
    assert {group["name"] for group in ig.parameter_groups(model, lr=1e-3)} >= {"adapters"}


def test_layers_that_share_a_weight_share_the_adapter() -> None:
    model, inputs = make("tied")
    prepared(model, inputs, "w8a8")
    ig.add_adapters(model, rank=2, match="head")
    assert model.embedding.adapters is model.head.adapters
    fine_tune(model, inputs)
    assert_equal(weight_of(model.embedding), weight_of(model.head))
    assert_merges_exactly(model, inputs)


def test_experts_merge_exactly() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "head_dim": 16}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, use_cache=False))
    inputs = {"input_ids": torch.randint(0, 32, (2, 6))}
    rules = [ig.Rule(match="*", weight="int4/group32")]
    ig.prepare(model, ig.plan(model, target="vllm", scheme="w4a16", rules=rules, example_inputs=inputs))
    ig.add_adapters(model, rank=2, match="*_projection")
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=0.05))
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    trained = model.eval()(**inputs).logits
    assert_equal(ig.convert(model)(**inputs).logits, trained)
    assert_equal(ig.convert(ig.merge_adapters(model))(**inputs).logits, trained)


def test_several_adapters_add_up_and_rest() -> None:
    model, inputs = adapted("w4a16", match=["a", "b"], name="first")
    plain = ig.convert(model)(*inputs)
    fine_tune(model, inputs)
    first = model.eval()(*inputs).detach()
    ig.add_adapters(model, rank=2, match="b", name="second")
    assert_equal(base_of(model.b), weight_of(model.b))  # the new one alone, and it starts at nothing
    fine_tune(model, inputs)
    ig.use_adapters(model, "first", "second")
    update = sum(a.scaling * (a.B @ a.A) for a in model.b.adapters.values())
    torch.testing.assert_close(weight_of(model.b), model.b.weight + update)  # added one by one
    assert_merges_exactly(model, inputs)
    ig.use_adapters(model)
    with pytest.raises(PlanError, match=r"no adapter 'third'\. Known: first, second"):
        ig.use_adapters(model, "third")
    ig.use_adapters(model, "first")
    assert plain.shape == first.shape
    assert [name for name, p in model.named_parameters() if p.requires_grad and "second" in name] == []


def test_two_adapters_cannot_both_set_the_norms() -> None:
    model, _ = adapted("w4a16", match="a", dora=True)
    ig.add_adapters(model, rank=2, match="a", name="other")
    with pytest.raises(PlanError, match="sets norms of rows"):
        ig.use_adapters(model, "default", "other")


def test_half_precision_rounds_the_sum_once() -> None:
    model, inputs = wide()
    model.to(torch.bfloat16)
    prepared(model, inputs, "q4_0")
    ig.add_adapters(model, rank=4)
    assert model.a.adapters["default"].A.dtype == torch.float32
    fine_tune(model, inputs)
    assert weight_of(model.a).dtype == torch.bfloat16
    trained = model.eval()(*inputs).detach()
    assert_equal(ig.convert(model)(*inputs), trained)


def test_autocast_leaves_the_sum_alone() -> None:
    model, inputs = adapted("w4a16", match=["a", "b"])
    fine_tune(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*inputs).square().mean()
        merged = weight_of(model.a)
    loss.backward()
    assert_equal(merged, weight_of(model.a))
    assert model.a.adapters["default"].A.grad.dtype == torch.float32


def test_checkpoints_keep_adapters(tmp_path: Path) -> None:
    model, inputs = adapted("q4_0", match=["a", "b"], name="first", dora=True, rank_stabilized=True)
    ig.add_adapters(model, rank=2, match="e", name="second")
    fine_tune(model, inputs)
    ig.save(model, tmp_path)
    again = ig.restore(wide()[0], tmp_path)
    assert ig.adapter_report(again) == ig.adapter_report(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trains
    assert_equal(again.eval()(*inputs), model.eval()(*inputs))
    with pytest.raises(CheckpointError, match="another model"):
        ig.restore(make("small")[0], tmp_path)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, inputs = adapted("q4_0")
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=0.02))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            optimizer.zero_grad()
            loss = (model.train()(*inputs) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    steps(model, optimizer, 2)
    save_training(tmp_path, model, optimizer, {})
    expected = steps(model, optimizer, 3)
    again = ig.restore(wide()[0], tmp_path)
    optimizer = torch.optim.Adam(ig.parameter_groups(again, lr=0.02))
    load_training(tmp_path, again, optimizer)
    assert steps(again, optimizer, 3) == expected


def test_what_cannot_be_adapted_is_refused() -> None:
    model, inputs = wide()
    with pytest.raises(PlanError, match="not prepared"):
        ig.add_adapters(model)
    prepared(model, inputs, "w4a16")
    with pytest.raises(PlanError, match="no adapters to merge"):
        ig.merge_adapters(model)
    with pytest.raises(PlanError, match=r"rank 64 does not fit layer 'e'.*32 by 256.*at most 32.*exclude='e'"):
        ig.add_adapters(model, rank=64)
    with pytest.raises(PlanError, match="at least 1"):
        ig.add_adapters(model, rank=0)
    with pytest.raises(PlanError, match=r"'tabel' matches no quantised layer. Did you mean 'table'"):
        ig.add_adapters(model, rank=4, match="tabel")
    with pytest.raises(PlanError, match="No quantised layer is left"):
        ig.add_adapters(model, rank=4, match="a", exclude="*")
    assert all(parameter.requires_grad for parameter in model.parameters())
    ig.add_adapters(model, rank=4)
    with pytest.raises(PlanError, match="no name for a new adapter"):
        ig.add_adapters(model, rank=4)
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="Nothing in this model trains"):
        ig.parameter_groups(model, lr=0.1)


def test_numbers_that_are_none_reach_the_output() -> None:
    model, inputs = make("shared")
    prepared(model, inputs)
    ig.add_adapters(model, rank=2)
    model.head.adapters["default"].B.data[0, 0] = torch.nan
    assert model(*inputs)[:, 0].isnan().all()
