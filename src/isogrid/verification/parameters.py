"""Stored tensors: what the file holds against what the model holds."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from isogrid.layers.integer import IntegerModule
from isogrid.layers.stored import StoredInput, StoredWeight
from isogrid.verification.report import ParameterCheck
from isogrid.verification.tally import Tally


def check_parameters(
    reference: nn.Module, stored: Mapping[str, Tensor], unread: Collection[str] = ()
) -> tuple[ParameterCheck, ...]:
    """Weight codes, scales, zero points and bias codes, each by its name in the file.

    Tensors that equal others may be stored once, under another's name. One that is nowhere in the file is missing;
    those come last, for a tensor that was changed may have been the only copy of several.

    Args:
        reference: of `isogrid.convert`.
        stored: the tensors of the file.
        unread: paths of modules that no output depends on, which a file need not have.
    """
    checks, missing = [], []
    values = list(stored.values())
    for name, expected in _tensors(reference):
        if name in stored:
            tally = Tally()
            tally.add(stored[name].reshape(-1), expected.reshape(-1))
            checks.append(ParameterCheck(name, *tally.counts))
        elif name.rpartition(".")[0] not in unread and not any(_equal(value, expected) for value in values):
            missing.append(ParameterCheck(name, expected.numel(), expected.numel(), missing=True))
    return (*checks, *missing)


def _tensors(reference: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in reference.named_modules():
        if isinstance(module, IntegerModule | StoredInput | StoredWeight) or hasattr(module, "weight_scale"):
            for name, tensor in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:  # a constant of the user's class
                    yield f"{path}.{name}".lstrip("."), tensor


def _equal(value: Tensor, expected: Tensor) -> bool:
    return value.numel() == expected.numel() and torch.equal(value.reshape(-1).double(), expected.reshape(-1).double())
