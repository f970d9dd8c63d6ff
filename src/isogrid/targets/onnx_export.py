"""From a module to an ONNX model."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isogrid.targets import onnx_stored
from isogrid.targets.explaining import explained
from isogrid.targets.onnx_graph import ONNX_RUNTIME_PASSES, Pass, finish
from isogrid.targets.onnx_half import half_form
from isogrid.targets.onnx_registry import registry_made_once
from isogrid.targets.onnx_stored import stored_form
from isogrid.targets.onnx_translation import TRANSLATIONS
from isogrid.targets.standing_in import standing_in

OPSET = 21
"""Has INT4."""

OPSET_OF_INT2 = 25


def to_onnx(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    passes: Sequence[Pass] = ONNX_RUNTIME_PASSES,
) -> onnx.ModelProto:
    """The ONNX model of a module that is made of `isogrid` operators and of what ONNX knows.

    Args:
        module: in evaluation mode.
        example_inputs: positional arguments of its forward.
        dynamic_batch: leave the first dimension of every input open.
        input_names, output_names: in the file; by default the names in forward, and what the exporter calls them.
        passes: what is made of the graph afterwards.

    Raises:
        TargetError: the exporter cannot translate the module; the operator or line is named.
    """
    if dynamic_batch:
        # The exporter takes a dimension of one for a constant.
        example_inputs = pytree.tree_map_only(Tensor, _twice, example_inputs)
    batch = torch.export.Dim("batch")
    shapes = pytree.tree_map(lambda x: {0: batch} if _has_batch(x) else None, example_inputs)
    if _takes_any_arguments(module):
        shapes = (shapes,)
    with torch.no_grad(), _quiet(), registry_made_once(), explained(module), standing_in(module, _written_form):
        program = torch.onnx.export(
            module,
            example_inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET_OF_INT2 if _has_two_bit_weights(module) else OPSET,
            dynamic_shapes=shapes if dynamic_batch else None,
            custom_translation_table={**TRANSLATIONS, **onnx_stored.TRANSLATIONS},
            input_names=input_names,
            output_names=output_names,
        )
        assert program is not None
        return finish(program.model, passes, {path for path, _ in module.named_modules(remove_duplicate=False)})


def _written_form(module: nn.Module) -> nn.Module | None:
    """What stands for a layer whose arithmetic is plain PyTorch's, as files write it."""
    return stored_form(module) or half_form(module)


def _takes_any_arguments(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _has_batch(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x]) if _has_batch(x) and x.shape[0] == 1 else x


def _has_two_bit_weights(module: nn.Module) -> bool:
    codes = (b for b in module.buffers() if b.dtype == torch.int8 and b.dim() > 1)
    return any(int(b.min()) >= -2 and int(b.max()) <= 1 for b in codes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed, and on constants that it could not fold."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
