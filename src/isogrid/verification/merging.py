"""What merging changes where it cannot be exact: trained against served, measured."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isogrid.planning.batches import filled_batches, run_batch
from isogrid.planning.convert import convert
from isogrid.planning.state import prepared_state
from isogrid.planning.values import tensors_in
from isogrid.training.adapters import adapter_report
from isogrid.training.merging import merge_adapters
from isogrid.verification.outputs import Outputs, batch_size
from isogrid.verification.report import EndToEnd
from isogrid.verification.survey import Origin


@dataclass(frozen=True)
class MergeDifference:
    """The model as it was trained against the one that is served after its adapters were merged; prints as one line.

    Attributes:
        result: of the merged, converted model against the trained one.
        statement: what the adapters' method promises.
    """

    result: EndToEnd
    statement: str

    def __str__(self) -> str:
        result = self.result
        if result.logits_equal:
            return f"Merged and served: equal to the trained model in every bit of {result.examples} examples."
        parts = [f"outputs differ by up to {result.max_difference:.3g}"]
        if result.top1_agreement is not None and result.kl is not None:
            parts += [f"top-1 agreement {result.top1_agreement:.2%}", f"KL divergence {result.kl:.3g}"]
        found = f"Merged and served, against trained, on {result.examples} examples: {', '.join(parts)}."
        return f"{found} No grid holds the sum of a quantised weight and its update; the method l4q has no difference."


def merge_difference(model: nn.Module, batches: Iterable[Any]) -> MergeDifference:
    """Merge a copy of a model's adapters, convert it, and compare its outputs with those that were trained.

    Args:
        model: prepared, with adapters.
        batches: as for `calibrate`.

    Raises:
        PlanError: the model has no adapters.
        NotCalibratedError: there are no batches, or one is empty.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 64),))
    >>> _ = ig.add_adapters(ig.prepare(model, plan), rank=2)
    >>> print(merge_difference(model, [torch.randn(4, 64)]))
    Merged and served: equal to the trained model in every bit of 4 examples.
    """
    served = convert(merge_adapters(copy.deepcopy(model)))
    arguments = prepared_state(model).plan.arguments
    trained = copy.deepcopy(model).eval()
    outputs: Outputs | None = None
    with torch.no_grad():
        for batch in filled_batches(batches, "to compare on"):
            expected = run_batch(trained, batch, arguments)
            actual = tensors_in(run_batch(served, batch, arguments))
            outputs = outputs or Outputs([Origin(exact=False, depth=0.0) for _ in actual], None)
            outputs.add(actual, expected, batch, batch_size(tensors_in(batch)))
    assert outputs is not None  # there was a batch
    return MergeDifference(outputs.result(), adapter_report(model).statement)
