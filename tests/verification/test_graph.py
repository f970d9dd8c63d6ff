"""The graph check: what a runtime runs against what was planned."""

from typing import Literal

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.planning.plan import Plan
from isogrid.targets import RuntimeOperator
from isogrid.verification.graph import check_graph
from isogrid.verification.report import GraphCheck
from isogrid.verification.survey import Work


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.kept = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + x
        return self.kept(y) @ y.T


WORK = [Work("a", "a", 512), Work("kept", "kept", 512), Work(None, "", 64)]


def plan(scheme: str = "w8a8") -> Plan:
    weight = None if scheme == "w8a8" else "int4/group16"
    rules = [ig.Rule(match="kept", keep="float"), *([] if weight is None else [ig.Rule(match="a", weight=weight)])]
    return ig.plan(Net(), scheme=scheme, rules=rules, example_inputs=(torch.zeros(2, 16),))


def operator(name: str, kind: str, arithmetic: Literal["integer", "float"]) -> RuntimeOperator:
    return RuntimeOperator(name, kind, arithmetic)


GOOD = (operator("a", "QGemm", "integer"), operator("kept", "Gemm", "float"), operator("", "MatMul", "float"))


def test_what_is_planned_holds() -> None:
    checks = check_graph(WORK, 2, GOOD, {"operations.sites.add.output": operator("", "QLinearAdd", "integer")}, plan())
    assert checks == (
        GraphCheck("a", "QGemm", "integer", "integer", 256),
        GraphCheck("kept", "Gemm", "float", "float", 256),
        GraphCheck("", "MatMul", "float", "float", 32),
        GraphCheck("add", "QLinearAdd", "integer", "integer", 0),
    )
    assert all(check.holds for check in checks)


def test_an_operation_that_was_not_fused_fails() -> None:
    (*_, check) = check_graph(
        WORK, 2, GOOD, {"operations.sites.add.output": operator("", "QuantizeLinear", "float")}, plan()
    )
    assert not check.holds and check.name == "add"


@pytest.mark.parametrize(
    ("operators", "name"),
    [
        ((operator("a", "FusedGemm", "float"), *GOOD[1:]), "a"),
        (GOOD[1:], "a"),
        ((GOOD[0], operator("kept", "MatMulNBits (level 4)", "integer"), GOOD[2]), "kept"),
        ((GOOD[0], operator("renamed", "MatMulNBits (level 4)", "integer"), GOOD[2]), "kept"),
        ((*GOOD[:2], operator("", "MatMulIntegerToFloat", "integer")), ""),
        ((*GOOD, operator("", "DynamicQuantizeMatMul", "integer")), "(unnamed)"),
    ],
)
def test_another_arithmetic_than_planned_fails(operators: tuple[RuntimeOperator, ...], name: str) -> None:
    assert [check.name for check in check_graph(WORK, 2, operators, {}, plan()) if not check.holds] == [name]


def test_float_work_that_was_merged_or_renamed_is_still_counted() -> None:
    checks = check_graph(WORK, 2, (GOOD[0], operator("x", "Attention", "float")), {}, plan())
    assert all(check.holds for check in checks)
    assert sum(check.macs for check in checks) == 256 + 256 + 32


@pytest.mark.parametrize(("scheme", "arithmetic"), [("w4a16", "float"), ("w4a8-dynamic", "integer")])
def test_packed_layers_multiply_as_their_scheme_says(scheme: str, arithmetic: str) -> None:
    for level, actual in (("1", "float"), ("4", "integer")):
        packed = RuntimeOperator("a", f"MatMulNBits (level {level})", actual)  # type: ignore[arg-type]
        check, *_ = check_graph(WORK, 2, (packed, *GOOD[1:]), {}, plan(scheme))
        assert check.holds == (actual == arithmetic)
