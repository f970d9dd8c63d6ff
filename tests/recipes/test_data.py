"""The order of the data is known from the step alone; the digits are what they were."""

import pytest
import torch
from torch.utils.data import TensorDataset

from isogrid.errors import RecipeError
from isogrid.recipes.data import Batches, Data, batches_of
from isogrid.recipes.digits import DigitsNet, digits


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (10, 10), (7, 1), (5, 64)])
def test_an_epoch_shows_every_example_at_most_once(count: int, batch_size: int) -> None:
    batches = Batches(count, batch_size, seed=1)
    for epoch in range(3):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = [index for step in steps for index in batches[step]]
        assert len(seen) == len(set(seen)) == count - count % batches.batch_size
        assert all(len(batches[step]) == min(batch_size, count) for step in steps)


def test_the_order_changes_with_epoch_and_seed_but_not_with_what_was_asked_before() -> None:
    batches = Batches(100, 10, seed=1)
    forwards = [batches[step] for step in range(30)]
    assert [batches[step] for step in reversed(range(30))] == forwards[::-1]
    assert forwards[:10] != forwards[10:20]
    assert Batches(100, 10, seed=2)[0] != forwards[0]


def test_the_last_batch_may_be_smaller() -> None:
    pairs = TensorDataset(torch.arange(5.0).reshape(5, 1), torch.arange(5))
    assert [len(target) for _, target in batches_of(pairs, 2)] == [2, 2, 1]


def test_empty_data_are_refused() -> None:
    full, empty = (TensorDataset(torch.zeros(n, 1), torch.zeros(n)) for n in (1, 0))
    with pytest.raises(RecipeError, match="The test data are empty"):
        Data(full, empty)


def test_digits_are_split_by_class_and_do_not_overlap() -> None:
    data = digits()
    (train, train_labels), (test, test_labels) = (part.tensors for part in (data.train, data.test))
    assert train.dtype == torch.float32
    assert (train.min(), train.max()) == (0.0, 1.0)
    shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train_labels, test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    # scikit-learn's images are distinct, so an image in both parts would be the same example.
    rows = torch.cat([train, test]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 1797


def test_the_network_has_what_quantisation_must_get_right() -> None:
    kinds = {type(module).__name__ for module in DigitsNet().modules()}
    assert {"Conv2d", "BatchNorm2d", "ResidualBlock", "AdaptiveAvgPool2d", "Linear"} <= kinds
