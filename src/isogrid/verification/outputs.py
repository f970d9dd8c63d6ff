"""End to end: the outputs of the whole model, runtime against reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from isogrid.planning.values import map_tensors, tensors_in
from isogrid.verification.report import EndToEnd, OutputCheck
from isogrid.verification.survey import Origin
from isogrid.verification.tally import Tally

Metric = Callable[[Any, Any], float]

FEATURES = ("last_hidden_state", "pooler_output", "embeds", "embeddings", "features")
"""How names of outputs end, in transformers and elsewhere, that are no scores of classes."""


class Outputs:
    """Statistics of whole outputs over many batches.

    Args:
        origins: of each output, in order.
        metric: of (outputs, batch), outputs as the model returns them; or None.
    """

    def __init__(self, origins: Sequence[Origin], metric: Metric | None) -> None:
        self.origins, self.metric = origins, metric
        self.tallies = [Tally() for _ in origins]
        self.examples = self.rows = self.not_finite = 0
        self.agreeing = self.divergence = self.cosines = 0.0
        self.are_features = False
        self.metrics = [0.0, 0.0]

    def add(self, actual: Sequence[Tensor], result: Any, batch: Any, examples: int) -> None:
        """Compare one batch.

        Args:
            actual: the runtime's outputs, in order.
            result: what the reference returned.
            batch: as it came, for the metric.
            examples: in this batch.
        """
        expected = tensors_in(result)
        self.examples += examples
        for tally, a, b in zip(self.tallies, actual, expected, strict=False):
            tally.add(a, b)
        if len(actual) == len(expected):
            self.are_features = isinstance(result, Mapping) and next(iter(result), "").endswith(FEATURES)
            self._compare_rows(actual[0], expected[0])
            if self.metric is not None:
                values = iter(actual)
                theirs = map_tensors(lambda _: next(values), result)
                for index, outputs in enumerate((theirs, result)):
                    self.metrics[index] += float(self.metric(outputs, batch)) * examples

    def _compare_rows(self, actual: Tensor, expected: Tensor) -> None:
        """Of the first output, top-1 and divergence where it can be scores of classes, and the cosine of features."""
        if not expected.is_floating_point() or expected.dim() < 2 or actual.shape != expected.shape:
            return
        axis = 1 if expected.dim() > 3 else -1  # images of scores have their classes first
        a, b = (x.movedim(axis, -1).flatten(0, -2).double() for x in (actual, expected))
        if a.shape[-1] < 2:
            return
        finite = a.isfinite().all(-1) & b.isfinite().all(-1)
        self.not_finite += int((~finite).sum())
        a, b = a[finite], b[finite]
        self.rows += len(a)
        if self.are_features:
            self.cosines += float(F.cosine_similarity(a, b, dim=-1).sum())
            return
        self.agreeing += float((a.argmax(-1) == b.argmax(-1)).sum())
        log_p, log_q = b.log_softmax(-1), a.log_softmax(-1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())

    def checks(self) -> tuple[OutputCheck, ...]:
        """One check for each output."""
        names = [f"output {number}" for number in range(len(self.tallies))] if len(self.tallies) > 1 else ["output"]
        return tuple(
            OutputCheck(name, *tally.counts, tally.largest, origin.exact)
            for name, tally, origin in zip(names, self.tallies, self.origins, strict=True)
        )

    def result(self) -> EndToEnd:
        """All batches together."""
        scored = self.rows > 0 and not self.are_features
        metrics = [total / self.examples for total in self.metrics] if self.metric is not None else [None, None]
        return EndToEnd(
            examples=self.examples,
            logits_equal=all(tally.differing == 0 for tally in self.tallies),
            max_difference=max((tally.largest for tally in self.tallies), default=0.0),
            top1_agreement=self.agreeing / self.rows if scored else None,
            kl=max(0.0, self.divergence / self.rows) if scored else None,
            cosine=self.cosines / self.rows if self.rows > 0 and self.are_features else None,
            metric=metrics[0],
            reference_metric=metrics[1],
            rows=self.rows,
            not_finite=self.not_finite,
        )


def batch_size(inputs: Sequence[Any]) -> int:
    """Examples in a batch: the first dimension of the first tensor that has one.

    >>> import torch
    >>> batch_size((torch.zeros(()), torch.zeros(3, 8)))
    3
    """
    return next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0), 1)
