import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import FormatError, PlanError, TargetError
from isogrid.planning import SCHEMES, scheme_from_name
from isogrid.planning.rules import nearest


@pytest.mark.parametrize(
    ("match", "name", "type_", "kind", "expected"),
    [
        ("layer1.*", "layer1.0.conv", "Conv2d", "convolution", True),
        ("layer1.*", "layer2.0.conv", "Conv2d", "convolution", False),
        ("Conv2d", "stem", "Conv2d", "convolution", True),
        ("add", "block.add", "add", "add", True),
        ("re:block\\.add(_1)?", "block.add_1", "add", "add", True),
        ("re:block", "block.add", "add", "add", False),
        ("[ab]", "a", "Linear", "linear", True),
    ],
)
def test_patterns(match: str, name: str, type_: str, kind: str, expected: bool) -> None:
    assert ig.Rule(match=match, weight="int8/channel").matches(name, type_, kind) is expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": "float", "weight": "int8/channel"}, PlanError, "keeps the layer in float, so 'weight' has no effect"),
        ({"keep": "int8"}, PlanError, "only keep='float' exists"),
        ({}, PlanError, "asks for nothing"),
        ({"weight": "int9/channel"}, FormatError, "int9"),
        ({"scale": "learnt"}, PlanError, "Known: learned, frozen, moving, dynamic"),
        ({"estimator": "lsqq"}, PlanError, "Unknown estimator"),
        ({"range": "best"}, PlanError, "best"),
        ({"scale": "learned", "estimator": "ste"}, PlanError, "gives them no gradient"),
    ],
)
def test_rules_that_make_no_sense(arguments: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ig.Rule(match="fc", **arguments)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(TypeError, match="wieght"):
        ig.Rule(match="fc", wieght="int8/channel")  # type: ignore[call-arg]


def test_schemes_by_name() -> None:
    assert all(scheme_from_name(name).name == name for name in SCHEMES)
    with pytest.raises(PlanError, match="Did you mean 'w8a8'"):
        scheme_from_name("w8a9")
    assert nearest("conv_1", ["conv1", "fc"]) == " Did you mean 'conv1'?"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(1000, 8), nn.LayerNorm(8), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([ig.Rule(match="fc1", keep="float")], PlanError, "matches nothing. Layers and operations: 0, 2"),
        ([ig.Rule(match="1", keep="float")], PlanError, "no rule can change: '1' .LayerNorm"),
        (
            [ig.Rule(match="Linear", weight="int4/channel"), ig.Rule(match="0", keep="float")],
            PlanError,
            "only what earlier rules already match",
        ),
        ([ig.Rule(match="0", weight="int4/group32")], TargetError, "Use int8/channel, int4/channel or ternary/channel"),
        ([ig.Rule(match="0", weight="binary/channel")], TargetError, "not binary/channel"),
        ([ig.Rule(match="0", activation="int4/tensor")], TargetError, "take activations as uint8/tensor"),
        ([ig.Rule(match="0", scale="dynamic")], PlanError, "Use scale='moving', or a dynamic scheme"),
    ],
)
def test_rules_that_do_not_fit_the_model(rules: list[ig.Rule], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ig.plan(model(), rules=rules, example_inputs=(torch.ones(1, 1000),))


def test_a_group_that_does_not_divide_says_which_do() -> None:
    with pytest.raises(FormatError) as caught:
        rules = [ig.Rule(match="0", weight="int4/group128")]
        ig.plan(model(), scheme="w4a16", rules=rules, example_inputs=(torch.ones(1, 1000),))
    message = str(caught.value)
    assert message.startswith("int4/group128 does not fit layer '0': a group of 128 does not divide")
    assert "100, 125, 200, 250" in message
    assert message.endswith("exclude the layer with a rule:\n    - match: 0\n      keep: float")


def test_uncalled_modules_and_nearest_names() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.aux = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv1(x)

    inputs = (torch.ones(1, 2),)
    with pytest.raises(PlanError, match="did not reach"):
        ig.plan(Spare(), rules=[ig.Rule(match="aux", weight="int4/channel")], example_inputs=inputs)
    with pytest.raises(PlanError, match="Did you mean 'conv1'"):
        ig.plan(Spare(), rules=[ig.Rule(match="conv_1", weight="int4/channel")], example_inputs=inputs)
    assert ("aux", "not called on the example inputs") in ig.plan(Spare(), example_inputs=inputs).floats
