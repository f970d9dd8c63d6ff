"""What capture sees, held against what the model plainly does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.errors import CaptureError
from isogrid.planning import capture
from tests.models import make


class Lambda(nn.Module):
    """A forward given as a function of the module and its inputs."""

    def __init__(self, function, **children: nn.Module) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def kinds(model: nn.Module, *inputs: Tensor) -> list[tuple[str, str]]:
    return [(call.name, call.kind) for call in capture(model, inputs).calls]


def test_names_and_kinds_of_a_residual_network() -> None:
    model, inputs = make("residual")
    assert kinds(model, *inputs) == [
        ("stem.0", "convolution"),
        ("stem.1", "batch_norm"),
        ("stem.2.relu", "clamp"),
        ("max_pool2d", "pass"),
        ("conv1", "convolution"),
        ("bn1", "batch_norm"),
        ("relu", "clamp"),
        ("conv2", "convolution"),
        ("bn2", "batch_norm"),
        ("add", "add"),
        ("relu_1", "clamp"),
        ("concat", "concat"),
        ("average_pool", "average_pool"),
        ("flatten", "pass"),
        ("dropout", "dropout"),
        ("fc", "linear"),
    ]


def test_values_link_calls() -> None:
    model, inputs = make("residual")
    graph = capture(model, inputs)
    add = graph.by_name["add"][0]
    assert graph.producer[add.inputs[0]].name == "bn2" and graph.producer[add.inputs[1]].name == "max_pool2d"
    fc = graph.by_name["fc"][0]
    assert graph.model_outputs == fc.outputs
    origin, exact = graph.origin(fc.inputs[0])
    assert graph.producer[origin].name == "average_pool" and not exact  # for there is dropout on the way


def test_the_model_is_left_alone() -> None:
    model, inputs = make("residual")
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model, inputs)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x + float("nan"),
        lambda m, x, y: torch.add(x, y.long()),
        lambda m, x, y: torch.add(x, y, alpha=torch.tensor(2.0)),
        lambda m, x, y: torch.add(x, y, out=torch.empty(2, 3)),
        lambda m, x, y: x + torch.tensor(1.0),
        lambda m, x, y: x / y,
        lambda m, x, y: x / 0,
        lambda m, x, y: torch.div(x, 2, rounding_mode="floor"),
        lambda m, x, y: x @ y[0],
        lambda m, x, y: x.mean(1),
        lambda m, x, y: x.mean(),
    ],
)
def test_what_is_no_site_says_why(function) -> None:  # type: ignore[no-untyped-def]
    names = ("add", "mean", "div", "matmul")
    calls = [c for c in capture(Lambda(function), (torch.ones(2, 3), torch.ones(2, 3))).calls if c.name in names]
    assert [call.kind for call in calls] == ["float"]
    assert all(call.reason for call in calls)


def test_whole_numbers_are_not_counted() -> None:
    calls = capture(Lambda(lambda m, x, y: (x.long() + y.long(), x + y)), (torch.ones(2, 3), torch.ones(2, 3))).calls
    assert [(call.name, call.kind) for call in calls if call.kind == "add"] == [("add", "add")]


def test_a_write_through_a_view_makes_a_new_value() -> None:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = module.a(x)
        y[:, 0] = 7.0
        return module.b(y)

    graph = capture(Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), (torch.ones(2, 3),))
    assert graph.by_name["b"][0].inputs[0] not in graph.producer


def test_a_write_in_place_is_a_call_like_any_other() -> None:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = module.a(x)
        y.add_(x)
        return y * 2

    graph = capture(Lambda(forward, a=nn.Linear(3, 3)), (torch.ones(2, 3),))
    assert graph.producer[graph.by_name["mul"][0].inputs[0]].name == "add"


def test_functions_that_return_their_argument_are_no_calls() -> None:
    model = Lambda(lambda m, x: m.a(x.float().contiguous().to("cpu")), a=nn.Linear(3, 3))
    assert kinds(model, torch.ones(2, 3)) == [("a", "linear")]


def test_keyword_inputs_are_seen() -> None:
    graph = capture(Lambda(lambda m, x: m.a(input=x), a=nn.Linear(3, 3)), (torch.ones(2, 3),))
    assert graph.by_name["a"][0].inputs == graph.model_inputs


def test_a_hook_that_changes_an_output_is_not_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graph = capture(model, (torch.ones(2, 3),))
    assert graph.by_name["0"][0].output != graph.by_name["1"][0].inputs[0]


def test_modules_that_are_not_reached_are_listed() -> None:
    model = Lambda(lambda m, x: m.a(x), a=nn.Linear(3, 3), spare=nn.Linear(3, 3))
    assert capture(model, (torch.ones(2, 3),)).uncalled == ("spare",)


def test_the_inside_of_a_module_in_one_piece_is_not_listed() -> None:
    graph = capture(*make("transformer"))
    assert graph.uncalled == ()
    assert set(graph.fast_paths) == {"0", "0.layers.0"}


def test_every_pooling_has_its_windows() -> None:
    x = torch.ones(1, 1, 6, 6)
    pools = [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(4), nn.AvgPool2d(3, divisor_override=2)]
    found = [capture(nn.Sequential(pool), (x,)).calls[0] for pool in pools]
    assert [call.kind for call in found] == ["average_pool", "average_pool", "float", "float"]
    assert "unequal size" in found[2].reason and "divisor_override" in found[3].reason


def test_subclasses_with_a_forward_of_their_own_stay_float() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight) + 1

    model = nn.Sequential(Mine(3, 3), torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    calls = capture(model, (torch.ones(1, 3),)).calls
    assert [(call.name, call.kind) for call in calls] == [("0", "float"), ("1", "linear")]
    assert "Mine extends a layer" in calls[0].reason


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(3, 3), (torch.ones(1, 4),), "does not run on the example inputs.*cannot be multiplied"),
        (nn.Linear(3, 3), (torch.ones(0, 3),), "empty"),
        (Lambda(lambda m, x: 3), (torch.ones(1),), "returns a int with no tensor"),
    ],
)
def test_bad_input(model: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model, inputs)
