"""What an exporter could not do, in words that name the place in the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch
from torch import nn

from isogrid.errors import IsogridError, TargetError

DECIDES = ("data-dependent", "DataDependent", "unbacked", "_local_scalar_dense")
"""Words in the errors of an exporter that met Python which looks at the values of tensors."""

OWN_FOLDERS = tuple(str(Path(package).parent) for package in (torch.__file__, Path(__file__).parent))


@contextmanager
def explained(module: nn.Module) -> Iterator[None]:
    """While open, whatever an exporter raises becomes a TargetError that names operator, module and line."""
    try:
        yield
    except IsogridError:
        raise
    except Exception as error:
        raise TargetError(_explanation(module, error)) from error


def _explanation(module: nn.Module, error: BaseException) -> str:
    causes = list(_causes(error))
    place = next((found for cause in reversed(causes) if (found := _place(module, cause))), "The model")
    words = " ".join(str(cause) for cause in causes)
    operator = re.search(r"No ONNX function found for .*?'([\w.:]+)'", words)
    if operator:
        return (
            f"{place} calls {operator[1]}, which has no translation to ONNX. Replace it by operations that have one, "
            "or export another part of the model."
        )
    root = next((line.strip() for line in str(causes[-1]).splitlines() if line.strip()), "")
    if any(word in words for word in DECIDES):
        return (
            f"{place} decides in Python by the values of tensors. That trains, but a file holds one path only: compute "
            f"both and choose with torch.where, or take the decision out of the forward. ({root})"
        )
    return f"{place} cannot be exported: {type(causes[-1]).__name__}: {root}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _place(module: nn.Module, error: BaseException) -> str:
    """The innermost line of a forward of the model that an error came through; empty where there is none."""
    paths = {part: path for path, part in module.named_modules()}
    found = ""
    for frame, line in walk_tb(error.__traceback__):
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(owner, nn.Module) and owner in paths and not file.startswith(OWN_FOLDERS):
            name = repr(paths[owner]) if paths[owner] else "the model"
            found = f"The forward of {name}, a {type(owner).__name__} ({Path(file).name}, line {line}),"
    return found
