"""Where grids go: each expectation follows from what the model does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import FormatError, PlanError
from isogrid.layers.clamp import RELU
from tests.models import assert_equal, make
from tests.planning.test_capture import Lambda


def sites(plan: ig.Plan) -> dict[str, str]:
    return {site.name: site.format for site in plan.sites}


def layer(plan: ig.Plan, path: str):  # type: ignore[no-untyped-def]
    return next(layer for layer in plan.layers if layer.path == path)


def test_a_residual_network() -> None:
    model, inputs = make("residual")
    plan = ig.plan(model, example_inputs=inputs)
    assert set(sites(plan)) == {
        *("stem.0.weight", "conv1.weight", "conv2.weight", "fc.weight"),
        *("stem.0.input", "stem.0.output", "conv1.output", "conv2.output", "average_pool.output"),
    }
    stem = layer(plan, "stem.0")
    assert (stem.batch_norm, stem.clamp) == ("stem.1", RELU)
    # The sum is a part of the concatenation, so that it shares the grid of the other part.
    add, concat, pool = plan.operations
    assert (add.kind, add.clamp, add.output) == ("add", RELU, "stem.0.output")
    assert {feed.grid for feed in concat.inputs} == {"stem.0.output"}
    assert pool.inputs[0].on_grid
    assert "shared with add" in plan.site("stem.0.output").reason
    fc = layer(plan, "fc")
    assert fc.output is None and not fc.input.on_grid  # logits stay float; dropout moves values off their grid
    assert plan.floats == ()
    assert plan.scopes[""] == ("relu", "relu_1") and plan.scopes["stem.2"] == ("relu",)


def test_a_relu_used_in_two_places_is_absorbed_in_both_or_in_neither() -> None:
    relu = nn.ReLU()
    both = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    one = nn.Sequential(nn.Linear(3, 3), relu, nn.LayerNorm(3), relu)
    absorbed = [[x.clamp for x in ig.plan(m, example_inputs=(torch.ones(1, 3),)).layers] for m in (both, one)]
    assert absorbed == [[RELU, RELU], [None]]


def test_a_layer_used_twice_absorbs_what_follows_it_each_time() -> None:
    def run(m: Any, x: Any, second: Any) -> Any:
        return m.head(second(m.norm(m.conv(F.relu(m.norm(m.conv(x)))))).flatten(1))

    def planned(second: Any) -> tuple[Any, Any]:
        parts = {"conv": nn.Conv1d(2, 2, 1), "norm": nn.BatchNorm1d(2), "head": nn.Linear(6, 2)}
        model = Lambda(lambda m, x: run(m, x, second), **parts)
        x = torch.randn(4, 2, 3)
        plan = ig.plan(model, example_inputs=(x,))
        ig.calibrate(ig.prepare(model, plan), [x])
        assert_equal(ig.convert(model)(x), model.eval()(x))
        return layer(plan, "conv"), plan.scopes

    both, scopes = planned(F.relu)
    assert (both.batch_norm, both.clamp) == ("norm", RELU) and scopes[""] == ("relu", "relu_1")
    other, scopes = planned(F.relu6)
    assert (other.batch_norm, other.clamp) == ("norm", None) and scopes == {}


def test_a_clamp_behind_max_pooling_is_absorbed() -> None:
    def plan(function: Any) -> ig.Plan:
        model = Lambda(function, a=nn.Conv2d(2, 2, 3), b=nn.Conv2d(2, 2, 1))
        return ig.plan(model, example_inputs=(torch.randn(2, 2, 8, 8),))

    found = plan(lambda m, x: m.b(F.relu(F.max_pool2d(F.max_pool2d(m.a(x), 2), 1))))
    assert str(layer(found, "a").clamp) == "relu"
    assert layer(found, "b").input.on_grid and found.floats == ()
    twice = plan(lambda m, x: (lambda y: m.b(F.relu(y)) + m.b(y))(F.max_pool2d(m.a(x), 2)))
    assert layer(twice, "a").clamp is None
    # The view's tensor is read again, and must be clamped then.
    view = plan(lambda m, x: (lambda y: (F.relu_(y.transpose(2, 3)), m.b(y))[1])(m.a(x)))
    assert layer(view, "a").clamp is None


def test_what_is_read_twice_is_not_absorbed() -> None:
    model = Lambda(lambda m, x: m.b((lambda y: F.relu(y) + m.b(y))(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    plan = ig.plan(model, example_inputs=(torch.ones(1, 3),))
    assert layer(plan, "a").clamp is None
    assert [name for name, _ in plan.floats] == ["relu"]


def test_a_batch_norm_without_statistics_or_after_a_sequence_stays() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, track_running_stats=False))
    assert layer(ig.plan(model, example_inputs=(torch.ones(1, 2, 4),)), "0").batch_norm is None
    # After a Linear on [batch, time, channels] batch norm takes time for channels.
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3))
    assert layer(ig.plan(model, example_inputs=(torch.ones(2, 3, 4),)), "0").batch_norm is None


def test_a_layer_fed_from_two_kinds_of_places_quantises_its_input_itself() -> None:
    model = Lambda(lambda m, x: m.a(x) + m.b(m.a(m.b(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    plan = ig.plan(model, example_inputs=(torch.ones(1, 3),))
    assert not layer(plan, "a").input.on_grid and not layer(plan, "b").input.on_grid


def test_tied_weights_share_a_site_and_must_agree() -> None:
    model, inputs = make("tied")
    plan = ig.plan(model, example_inputs=inputs)
    assert layer(plan, "embedding").weight == layer(plan, "head").weight == "embedding.weight"
    with pytest.raises(PlanError, match="'head' and 'embedding' share one weight"):
        ig.plan(model, rules=[ig.Rule(match="head", weight="int4/channel")], example_inputs=inputs)


def test_parts_of_a_concatenation_must_agree() -> None:
    model, inputs = make("residual")
    with pytest.raises(PlanError, match=r"add, stem.0 share one grid"):
        ig.plan(model, rules=[ig.Rule(match="add", scale="frozen")], example_inputs=inputs)


def test_a_rule_that_keeps_a_layer_in_float() -> None:
    model, inputs = make("residual")
    plan = ig.plan(model, rules=[ig.Rule(match="conv1", keep="float")], example_inputs=inputs)
    assert ("conv1", "rule 'conv1'") in plan.floats
    assert "conv2.input" in sites(plan) and "conv1.weight" not in sites(plan)
    reasons = dict(plan.floats)
    assert reasons["bn1"] == "BatchNorm2d with no quantised neighbour to join"


def test_what_a_rule_leaves_open() -> None:
    model, inputs = make("small")
    rules = [ig.Rule(match="conv", estimator="ste"), ig.Rule(match="fc", scale="moving", range="absmax")]
    plan = ig.plan(model, scheme="w4a8", rules=rules, example_inputs=inputs)
    conv, fc, feed = plan.site("conv.weight"), plan.site("fc.weight"), plan.site("conv.input")
    assert (conv.format, conv.scale, conv.estimator, conv.reason) == ("int4/channel", "frozen", "ste", "rule 'conv'")
    assert (fc.scale, fc.range) == ("dynamic", "absmax")  # a weight is at hand in every step
    assert (feed.format, feed.scale) == ("uint8/tensor", "frozen")


def test_weight_only_schemes_leave_activations_alone() -> None:
    model, inputs = make("tied")
    plan = ig.plan(model, scheme="w4a16", example_inputs=inputs)
    assert set(sites(plan)) == {"embedding.weight", "hidden.weight"}
    assert plan.operations == () and plan.scopes == {}
    model, inputs = make("residual")
    with pytest.raises(PlanError, match="MatMulNBits computes linear layers only"):
        ig.plan(model, scheme="w4a16", rules=[ig.Rule(match="conv1", weight="int4/group32")], example_inputs=inputs)


def test_embeddings_that_write_to_their_table_stay_float() -> None:
    for arguments in ({"max_norm": 1.0}, {"sparse": True}):
        model = nn.Sequential(nn.Embedding(5, 4, **arguments), nn.Linear(4, 2))
        plan = ig.plan(model, example_inputs=(torch.tensor([[1, 2]]),))
        assert "max_norm or sparse" in dict(plan.floats)["0"]


def test_a_site_whose_calls_differ_stays_float() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor, y: Tensor | float) -> Tensor:
            return x + y

    model = Lambda(lambda m, x: m.fc(m.plus(m.plus(x, x), float("inf"))), fc=nn.Linear(3, 3), plus=Sometimes())
    plan = ig.plan(model, example_inputs=(torch.ones(1, 3),))
    assert dict(plan.floats)["plus.add"] == "add with inf"


def test_operations_without_integer_neighbours_on_both_sides_stay_float() -> None:
    """The last sum has nothing integer behind it, that of the inputs nothing before it, that in the middle both."""

    def forward(module: Any, x: Tensor) -> Tensor:
        y = module.a(x + x) + x
        return (module.b(y) * 0.5 + x).softmax(-1)

    model = Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    plan = ig.plan(model, example_inputs=(torch.ones(1, 3),))
    assert [operation.site for operation in plan.operations] == ["add_1"]
    assert [name for name, _ in plan.floats] == ["add", "mul", "add_2", "softmax"]
    assert layer(plan, "b").output is None


def test_a_mask_is_not_quantised() -> None:
    mask = torch.tensor([0.0, torch.finfo(torch.float32).min, 0.0])
    model = Lambda(lambda m, x: m.b(m.a(x) + mask), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    plan = ig.plan(model, example_inputs=(torch.ones(1, 3),))
    assert "mask" in dict(plan.floats)["add"] and not plan.operations


def test_a_pattern_may_also_match_what_cannot_be_quantised() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    rules = [ig.Rule(match="*", weight="int8/group16")]
    inputs = (torch.zeros(1, 4),)
    with pytest.raises(FormatError, match="group16"):  # the layers are asked for what does not fit them
        ig.plan(model, scheme="w4a16", rules=rules, example_inputs=inputs)
    with pytest.raises(PlanError, match=r"asks to quantise '1.gelu', but MatMulNBits computes linear layers only"):
        ig.plan(model, scheme="w4a16", rules=[ig.Rule(match="*gelu", weight="int8/group16")], example_inputs=inputs)


def test_angles_of_positions_stay_float() -> None:
    class Rotary(nn.Module):
        """Turns pairs of features by their position."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
            self.register_buffer("frequencies", torch.tensor([1.0, 0.1, 0.01]))

        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(x.shape[1]).float()[:, None] * self.frequencies
            angles = torch.cat([angles, angles], -1)
            return self.second(self.first(x) * (angles.cos() * 1.0))

    plan = ig.plan(Rotary(), example_inputs=(torch.randn(2, 300, 6),))
    floats = dict(plan.floats)
    assert all("not from data" in floats[name] for name in ("mul", "concat", "cos", "mul_1"))
    assert "mul_2" not in floats and {"mul_2.input1", "mul_2.output"} <= {site.name for site in plan.sites}
