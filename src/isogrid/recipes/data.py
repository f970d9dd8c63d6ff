"""The data of a recipe: two datasets, and what counts as good on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from isogrid.errors import RecipeError


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of right answers, in [0, 1].

    Args:
        outputs: float [samples, classes].
        targets: int64 [samples].

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return float((outputs.argmax(1) == targets).double().mean())


@dataclass(frozen=True)
class Data:
    """What a recipe trains and tests on. A `data:` callable returns one.

    Attributes:
        train: a map-style dataset of tuples (inputs..., target).
        test: the same, never trained on.
        loss: of the model's output and the targets, a scalar.
        metric: of all outputs and all targets of the test data, in [0, 1], higher is better.

    Raises:
        RecipeError: a dataset is empty.

    >>> from torch.utils.data import TensorDataset
    >>> pairs = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    >>> [tuple(example.shape) for example in Data(pairs, pairs).example_inputs]
    [(2, 3)]
    """

    train: Dataset[Any]
    test: Dataset[Any]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metric: Callable[[Any, Any], float] = accuracy

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if size(getattr(self, name)) == 0:
                raise RecipeError(f"The {name} data are empty. Give at least one example.")

    @property
    def example_inputs(self) -> tuple[Any, ...] | dict[str, Any]:
        """The inputs of the first training examples as a batch: two, for with one a batch looks like a constant."""
        batch = collate(self.train, range(min(2, size(self.train))))
        return tuple(batch[:-1])

    @property
    def pace(self) -> tuple[int, str]:
        """What the progress of training is counted in: how many of it an example has, and what it is called."""
        return 1, "examples"

    def check(self, model: nn.Module) -> None:
        """Raise RecipeError where a model cannot work on these data; ordinary data do not know."""

    def test_batches(self, batch_size: int = 256) -> Iterator[tuple[Any, ...]]:
        """The test data in order: tuples (inputs..., target)."""
        return batches_of(self.test, batch_size)


def size(dataset: Dataset[Any]) -> int:
    """How many examples a map-style dataset has; raises RecipeError where it does not say."""
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise RecipeError(f"A {type(dataset).__name__} has no length. Give a map-style dataset.") from error


def collate(dataset: Dataset[Any], indices: Any) -> tuple[Any, ...]:
    """The examples with these indices as one batch."""
    return tuple(default_collate([dataset[index] for index in indices]))


def batches_of(dataset: Dataset[Any], batch_size: int) -> Iterator[tuple[Any, ...]]:
    """A dataset in order, in batches; the last one may be smaller."""
    count = size(dataset)
    for start in range(0, count, batch_size):
        yield collate(dataset, range(start, min(start + batch_size, count)))


class Batches:
    """Which examples each step of training sees: shuffled anew every epoch, and known from the step's number alone.

    So a resumed run needs no state of a loader to see the data it would have seen. Examples that do not fill a
    batch at the end of an epoch are left out of that epoch.

    Args:
        count: examples there are.
        batch_size: of a step; at most count are taken.
        seed: of the order.

    >>> batches = Batches(5, 2, seed=0)
    >>> batches.per_epoch, batches[7] == Batches(5, 2, seed=0)[7]
    (2, True)
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.per_epoch = count // self.batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        start = position * self.batch_size
        return self._order[start : start + self.batch_size].tolist()


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers; near numbers give unrelated seeds.

    >>> mixed_seed(1, 2) != mixed_seed(2, 1)
    True
    """
    # SplitMix64 (Steele et al., 2014), one round a number.
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
