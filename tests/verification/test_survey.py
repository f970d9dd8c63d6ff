"""What the reference's own run says: which values are exact, what lies before them, and all that multiplies."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.verification.survey import Origin, Survey, Work, survey


def surveyed(model: nn.Module, x: Tensor) -> Survey:
    return survey(model, lambda inputs: model(*inputs), (x,))


class Branches(nn.Module):
    """Moves, exact operations and float ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        moved = F.max_pool1d(F.relu(x / 3).transpose(0, 1), 2).transpose(0, 1) - 1
        product = self.layer(x)
        return moved, torch.sigmoid(moved), product, torch.softmax(self.layer(product), -1), product @ product.T


def test_values_are_exact_until_something_rounds_in_an_order_of_its_own() -> None:
    found = surveyed(Branches(), torch.randn(4, 256) / 10)  # scores below one
    assert found.outputs == [
        Origin(True, 0.0),
        Origin(False, 1.0),
        Origin(False, 1.0),
        Origin(False, 3.0),
        Origin(False, 2.0),
    ]
    assert found.work == [
        Work("layer", "layer", 4 * 256 * 256), Work("layer_2", "layer", 4 * 256 * 256), Work(None, "", 4 * 4 * 256),
    ]  # fmt: skip


def test_long_sums_count_for_more_operations() -> None:
    assert surveyed(nn.Linear(4096, 2), torch.zeros(1, 4096)).outputs == [Origin(False, 4.0)]


def test_angles_are_as_exact_as_their_rounding() -> None:
    class Rotation(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cos(x), torch.sin(512 * x)

    near, far = surveyed(Rotation(), torch.linspace(0, 1, 8)).outputs
    assert near.depth == 1.0
    # 512 is known to half of 2**-14, and one operation stands for 1e-6.
    assert far.depth == pytest.approx(512 * 2**-24 / 1e-6)


@pytest.mark.parametrize("masked", [0.0, -torch.inf])
def test_errors_of_scores_grow_with_them(masked: float) -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = torch.sigmoid(x) * 40  # half at zero
            scores = torch.cat([scores, torch.full_like(scores, masked)], -1)
            query = torch.sigmoid(x).reshape(1, 1, 2, 4) * 8
            return torch.softmax(scores, -1), F.scaled_dot_product_attention(query, query, query)

    alone, attention = surveyed(Scores(), torch.zeros(2, 4)).outputs
    assert alone.depth == 20.0 + 1.0
    assert attention.depth == 4 * 4 * 4 / 2 + 1.0  # four products of 4 and 4, over the root of four


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * 6 * 25 * 2 * 9),
        (nn.Linear(8, 3), (2, 7, 8), 2 * 7 * 24),
        (nn.LSTM(8, 8, batch_first=True), (3, 5, 8), 3 * 5 * 32 * 16),
    ],
    ids=["convolution", "linear", "lstm"],
)
def test_every_multiplication_is_counted(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert sum(work.macs for work in surveyed(module, torch.zeros(shape)).work) == macs


class WithConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Buffer(torch.arange(12.0).reshape(3, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(self.places)


def test_what_no_input_changes_is_a_constant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    model = WithConstant()
    ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))
    ig.calibrate(model, [(x,)])
    integer = ig.convert(model)
    found = survey(integer, lambda inputs: integer(*inputs), (x,))
    assert {name.partition(".")[0] for name in found.constants} == {"second"}
    assert ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [(x,)])
