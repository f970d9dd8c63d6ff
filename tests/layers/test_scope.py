import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CaptureError, PlanError
from isogrid.layers.scope import OperationScope, open_scope
from tests.models import assert_equal, prepared
from tests.planning.test_capture import Lambda


class Noting(nn.Module):
    """A site that notes what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def forward(self, function, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.calls.append(function.__name__)
        return function(*args, **kwargs)


def scoped(forward, sites: dict[str, nn.Module], skipped=(), **children: nn.Module) -> nn.Module:  # type: ignore[no-untyped-def]
    model = Lambda(forward, **children)
    open_scope(model, OperationScope(sites, skipped))
    return model


def test_the_kth_call_of_a_kind_is_a_site() -> None:
    first, second = Noting(), Noting()
    model = scoped(lambda m, x: F.relu(x + 1 + x + x), {"add": first, "add_2": second})
    assert_equal(model(torch.ones(2)), torch.full((2,), 4.0))
    assert (len(first.calls), len(second.calls)) == (1, 1)
    model(torch.ones(2))
    assert len(first.calls) == 2


def test_what_another_layer_does_is_skipped() -> None:
    model = scoped(lambda m, x: F.relu(input=x) - F.relu(x), {}, ["relu"])
    assert_equal(model(torch.tensor([-2.0])), torch.tensor([-2.0]))


def test_calls_belong_to_the_innermost_scope() -> None:
    inner, outer = Noting(), Noting()
    child = scoped(lambda m, x: x + x, {"add": inner})
    model = scoped(lambda m, x: m.child(x) + x, {"add": outer}, child=child)
    assert_equal(model(torch.ones(1)), torch.full((1,), 3.0))
    assert (len(inner.calls), len(outer.calls)) == (1, 1)


def test_the_inside_of_composite_functions_does_not_count() -> None:
    site = Noting()
    attention = nn.MultiheadAttention(4, 2, batch_first=True).train()
    model = scoped(lambda m, x: m.attention(x, x, x)[0] + x, {"add": site}, attention=attention)
    model(torch.randn(1, 3, 4))
    assert len(site.calls) == 1


def test_modes_further_out_see_what_is_made_from_nothing() -> None:
    with torch.device("meta"):
        model = scoped(lambda m, x: torch.zeros(2), {})
        assert model(torch.ones(1)).device.type == "meta"


def test_without_sites_there_is_no_child_and_no_name_is_taken() -> None:
    model = Lambda(lambda m, x: x)
    model.operations = "mine"
    open_scope(model, OperationScope({}))
    assert list(model.children()) == []
    with pytest.raises(CaptureError, match="Rename the attribute"):
        open_scope(model, OperationScope({"add": Noting()}))


def test_the_signature_is_that_of_the_class() -> None:
    class Named(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
            return input_ids + input_ids

    model = prepared(Named(), (torch.randn(2, 2),))
    assert list(inspect.signature(model.forward).parameters) == ["input_ids", "labels"]
    assert list(inspect.signature(ig.convert(model).forward).parameters) == ["input_ids", "labels"]


def test_a_module_that_adds_only_in_training_does_not_disturb_others() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros_like(x) if self.training else x

    model = Lambda(lambda m, x: m.fc(m.noisy(x)) + x, noisy=Noisy(), fc=nn.Linear(3, 3))
    inputs = (torch.randn(4, 3),)
    prepared(model, inputs)
    assert_equal(model.train()(*inputs), model.eval()(*inputs))


def test_calls_that_the_plan_does_not_know_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        y = module.b(module.a(x) + x)
        return module.c(y * y.relu()) if x.sum() > 0 else module.c(y)

    model = Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3))
    prepared(model, (-torch.ones(2, 3),))
    assert ig.unplanned(model) == ()
    for _ in range(2):
        model(torch.ones(2, 3))
    assert ig.unplanned(model) == ("mul", "relu")
    assert [record.getMessage() for record in caplog.records] == [
        "Lambda calls relu, mul, which the plan does not know: it runs in float. isogrid.unplanned(model) lists all."
    ]
    with pytest.raises(PlanError, match="not prepared"):
        ig.unplanned(nn.Linear(3, 3))


class DropPath(nn.Module):
    """Drops examples in training, as transformers does it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.div(0.5) * (torch.rand(len(x), 1) < 0.5).float() if self.training else x


def test_calls_of_many_modules_of_one_class_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = Lambda(
        lambda m, x: m.b(m.left(m.a(x)) + m.right(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3), left=DropPath(),
        right=DropPath(),
    )  # fmt: skip
    prepared(model, (torch.ones(2, 3),))
    for _ in range(2):
        model.train()(torch.ones(2, 3))
    assert ig.unplanned(model) == ("left.div", "left.mul", "right.div", "right.mul")
    copy.deepcopy(model)(torch.ones(2, 3))
    assert [record.getMessage() for record in caplog.records] == [
        "DropPath calls div, mul, which the plan does not know: it runs in float. isogrid.unplanned(model) lists all."
    ]


def test_a_site_that_is_called_otherwise_than_planned_says_so() -> None:
    model = Lambda(lambda m, x: m.b(m.a(x) + (x if x.sum() > 0 else 1.0)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    prepared(model, (torch.ones(2, 3),))
    with pytest.raises(CaptureError, match="planned with 2 tensors and is called with 1"):
        model(-torch.ones(2, 3))
