"""How well a language model predicts: perplexity with its interval, and how often two models agree."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import NonFiniteError
from isogrid.training.outputs import logits_of

NORMAL_95 = 1.959964
"""Standard deviations that 95 % of a normal distribution lie within."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a token, with a 95 % interval.

    Attributes:
        value: from 1 on.
        low, high: ends of the interval. The text is a sample: sequences count as independent draws, and the mean of
            their losses as normal.
        tokens: predicted.

    >>> Perplexity.of(torch.tensor([[0.0, 2.0], [1.0, 1.0]]).log1p()).tokens
    4
    """

    value: float
    low: float
    high: float
    tokens: int

    @staticmethod
    def of(losses: Tensor) -> "Perplexity":
        """From the loss of every token, float [sequences, length], in nats.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteError("The losses on the test data are not finite: the model computes NaN or infinity.")
        means = losses.double().mean(1)
        mean, count = float(means.mean()), len(means)
        reach = NORMAL_95 * float(means.std()) / math.sqrt(count) if count > 1 else math.inf
        return Perplexity(math.exp(mean), math.exp(mean - reach), _exp(mean + reach), losses.numel())

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Predictions:
    """What a language model says about a text, teacher-forced.

    Attributes:
        losses: float32 [sequences, length], of the right tokens, in nats.
        best: int64 [sequences, length], the most probable tokens.
        targets: int64 [sequences, length], the right ones.
    """

    losses: Tensor
    best: Tensor
    targets: Tensor

    @property
    def perplexity(self) -> Perplexity:
        """Of the text."""
        return Perplexity.of(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were predicted best, in [0, 1]."""
        return float((self.best == self.targets).double().mean())

    def agreement(self, other: "Predictions") -> float:
        """Share of positions at which both models find the same token most probable, in [0, 1]."""
        return float((self.best == other.best).double().mean())


@torch.no_grad()
def predictions(model: Callable[..., Any], batches: Iterable[tuple[Tensor, Tensor]]) -> Predictions:
    """Run a model over a text, a batch at a time; only losses and best tokens are kept.

    Args:
        model: of input_ids int64 [sequences, length]; gives logits [sequences, length, vocabulary], or something that
            has or holds them.
        batches: (input_ids, targets), both int64 [sequences, length].

    >>> shift = lambda ids: 9.0 * F.one_hot(ids + 1, 8)
    >>> found = predictions(shift, [(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))])
    >>> found.accuracy, found.best.tolist()
    (1.0, [[2, 3]])
    """
    found = [(*_judged(logits_of(model(ids)), targets), targets) for ids, targets in batches]
    losses, best, targets = (torch.cat([batch[part] for batch in found]) for part in range(3))
    return Predictions(losses, best, targets)


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    """The mean loss a token, a scalar: of a language model's outputs and int64 [sequences, length]."""
    return F.cross_entropy(logits_of(outputs).flatten(0, 1).float(), targets.flatten())


def token_accuracy(outputs: Any, targets: Tensor) -> float:
    """Share of tokens that are predicted best: of a language model's outputs and int64 [sequences, length]."""
    return float((logits_of(outputs).argmax(-1) == targets).double().mean())


def _judged(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return losses, logits.argmax(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
