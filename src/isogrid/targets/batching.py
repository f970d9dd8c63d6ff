"""Running data of any length through an artefact that takes so many examples at a time."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.targets.artifact import Artifact


def in_batches(
    run: Callable[..., list[Tensor]], artifact: Artifact, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs for inputs whose first dimension is not the artefact's: in pieces, the last filled up with zeros.

    Args:
        run: of inputs as the artefact takes them.
        artifact: with a plan that knows the shapes.
        inputs: [batch, ...] each.

    Raises:
        TargetError: other dimensions differ, or there are more or fewer inputs.
    """
    wanted = [tuple(spec.shape) for spec in artifact.plan.inputs]
    shapes = [tuple(x.shape) for x in inputs]
    if shapes == wanted:
        return run(*inputs)
    lengths, sizes = ({shape[:1] for shape in each} for each in (shapes, wanted))
    others = [shape[1:] for shape in shapes] == [shape[1:] for shape in wanted]
    if not others or len(lengths) != 1 or len(sizes) != 1 or not inputs[0].dim():
        raise TargetError(
            f"{artifact.path} takes inputs of shape {', '.join(str(list(shape)) for shape in wanted)} (any first "
            f"dimension), not {', '.join(str(list(shape)) for shape in shapes)}."
        )
    length, size = len(inputs[0]), wanted[0][0]
    pieces = []
    for start in range(0, length, size):
        batch = [x[start : start + size] for x in inputs]
        count = len(batch[0])
        filled = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, size - count)) for x in batch]
        pieces.append([_first(output, count, size, artifact) for output in run(*filled)])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _first(output: Tensor, count: int, size: int, artifact: Artifact) -> Tensor:
    """The part of an output that belongs to the first examples of a batch."""
    if not output.dim() or len(output) % size:
        raise TargetError(
            f"{artifact.path} puts out {list(output.shape)} for {size} examples, which cannot be told apart. Give it "
            f"exactly {size}."
        )
    return output[: len(output) // size * count]
