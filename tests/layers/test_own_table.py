"""Classes that extend nn.Embedding: their forward runs, and what it looks up is quantised."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig


class Scaled(nn.Embedding):
    """As the embeddings of Gemma, BART and twenty others in transformers."""

    def __init__(self, entries: int, dimension: int, factor: float):
        super().__init__(entries, dimension)
        self.factor = nn.Buffer(torch.tensor(factor), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor.to(self.weight.dtype)


class Direct(nn.Embedding):
    """Looks up by a function, with a table that it computes."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.tanh())


class Tied(nn.Module):
    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table, self.norm = table, nn.LayerNorm(64)
        self.head = nn.Linear(64, 16, bias=False)
        self.head.weight = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids)))  # type: ignore[no-any-return]


IDS = torch.arange(15).reshape(3, 5)


def model(table: nn.Embedding) -> nn.Module:
    torch.manual_seed(0)
    nn.init.normal_(table.weight)
    return Tied(table).eval()


def prepared(scheme: str, **options: str) -> nn.Module:
    made = model(Scaled(16, 64, 8.0))
    ig.prepare(made, ig.plan(made, scheme=scheme, example_inputs=(IDS,), **options))
    return made


@pytest.mark.parametrize("scheme", ["w4a16", "q4_0"])
def test_what_it_looks_up_is_quantised_and_its_own_forward_runs(scheme: str) -> None:
    made = prepared(scheme)
    table = made.get_submodule("table")
    values = table.weight_quantizer(table.weight)
    assert not torch.equal(values, table.weight)
    assert torch.equal(table(IDS), F.embedding(IDS, values) * 8.0)
    assert isinstance(table, Scaled)
    converted = ig.convert(made)
    assert torch.equal(converted(IDS), made(IDS))
    assert "weight" not in dict(converted.get_submodule("table").named_parameters())


def test_the_table_is_tied_to_the_head_that_shares_its_weight() -> None:
    made = prepared("w4a16")
    table, head = made.get_submodule("table"), made.get_submodule("head")
    assert table.weight is head.weight and table.weight_quantizer is head.weight_quantizer


def test_copies_and_pickles_compute_the_same() -> None:
    made = prepared("w4a16")
    for each in (made, ig.convert(made)):
        expected = each(IDS)
        assert torch.equal(copy.deepcopy(each)(IDS), expected)
        assert torch.equal(pickle.loads(pickle.dumps(each))(IDS), expected)


def test_training_reaches_the_table_and_its_scales() -> None:
    made = prepared("w4a16").train()
    made(IDS).square().sum().backward()
    table = made.get_submodule("table")
    assert table.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in table.weight_quantizer.parameters())


def test_a_table_that_is_looked_up_otherwise_stays_float_with_its_reason() -> None:
    plan = ig.plan(model(Direct(16, 64)), scheme="w4a16", example_inputs=(IDS,))
    reasons = dict(plan.floats)
    assert "Direct extends a layer, and its forward is not one call" in reasons["table"]


def test_onnx_runtime_runs_it(tmp_path) -> None:
    made = prepared("w8a8")
    ig.calibrate(made, [(IDS,)])
    report = ig.verify(made, ig.export(made, tmp_path / "model.onnx"), [(IDS,)])
    assert report
