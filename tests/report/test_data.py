import pytest

from isogrid.errors import IsogridError
from isogrid.report import BoundRow, Fidelity, GraphRow, ReplayRow, ResultRow, SiteRow
from isogrid.report.data import speed_up


@pytest.mark.parametrize("accuracy", [-0.01, 1.01, 98.3, float("nan"), float("inf")])
def test_an_accuracy_is_a_share(accuracy):
    with pytest.raises(IsogridError, match=r"row 'CNN': accuracy .* is not in \[0, 1\]"):
        ResultRow("CNN", "float", accuracy)


def test_a_method_is_one_of_four():
    with pytest.raises(IsogridError, match="'QAT' is not one of float, float-extra, ptq, qat"):
        ResultRow("CNN", "QAT", 0.5)


@pytest.mark.parametrize("field", ["size_bytes", "latency_ms", "differing_codes", "compared_codes"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_measure_is_a_number(field, value):
    with pytest.raises(IsogridError, match=field):
        ResultRow("CNN", "qat", 0.5, **{field: value})


@pytest.mark.parametrize(
    ("differing", "compared", "exact"), [(0, 640, True), (1, 640, False), (None, None, None), (0, 0, None)]
)
def test_nothing_compared_is_not_exact(differing, compared, exact):
    assert ResultRow("CNN", "qat", 0.5, differing_codes=differing, compared_codes=compared).exact is exact


def test_a_speed_up_is_against_the_first_float_row_with_a_latency():
    rows = [
        ResultRow("CNN", "float", 0.5),
        ResultRow("CNN", "float-extra", 0.5, latency_ms=8.0),
        ResultRow("CNN", "float", 0.5, latency_ms=3.0),
        ResultRow("W8A8", "qat", 0.5, latency_ms=1.5),
    ]
    assert [speed_up(row, rows) for row in rows] == [None, 0.375, 1.0, 2.0]
    assert speed_up(rows[3], rows[3:]) is None


SITE = SiteRow("a", 10, 0, 0)
REPLAY = ReplayRow("a", "QGemm", 10, 0, 0.0, "0 codes", True)
BOUND = BoundRow("a", 1.0, "1", True)


@pytest.mark.parametrize(
    ("fidelity", "holds"),
    [
        (Fidelity(), True),
        (Fidelity((SITE,), (REPLAY,), (), (BOUND,)), True),
        (Fidelity((SITE, SiteRow("b", 10, 1, 1)), (REPLAY,), (), (BOUND,)), False),
        (Fidelity((SITE,), (ReplayRow("b", "QGemm", 10, 1, 1.0, "0 codes", False),), (), (BOUND,)), False),
        (Fidelity((SITE,), (REPLAY,), (), (BoundRow("b", 0.0, "1", False),)), False),
    ],
)
def test_fidelity_holds_where_every_part_holds(fidelity, holds):
    assert fidelity.holds is holds


def test_macs_are_counted_by_arithmetic():
    fidelity = Fidelity(graph=(GraphRow("QGemm", "integer", 1, 30), GraphRow("Gemm", "float", 2, 12)))
    assert (fidelity.integer_macs, fidelity.total_macs) == (30, 42)
