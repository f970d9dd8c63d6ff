"""The names of calls and of quantised tensors, in files, in the reference and in plans."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

Value = TypeVar("Value")


def site_of(name: str) -> str:
    """A quantised tensor's name in the file as the plan has it.

    >>> site_of("layer1.operations.sites.add.output")
    'layer1.add.output'
    """
    return name.replace("operations.sites.", "")


def first_call(site: str) -> str:
    """A site's name, of a quantised tensor of any of its calls.

    >>> first_call("fc.input_2"), first_call("matmul_1.input0")
    ('fc.input', 'matmul_1.input0')
    """
    return re.sub(r"_\d+$", "", site)


class Names:
    """The names that an exported graph gives to the calls of one run: a second call of `fc` is `fc_2`.

    >>> names = Names()
    >>> [names.next(path) for path in ("fc", "head", "fc")]
    ['fc', 'head', 'fc_2']
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def next(self, path: str) -> str:
        """The name of the next call of a module."""
        name, count = path, 1
        while name in self._taken:
            count += 1
            name = f"{path}_{count}"
        self._taken.add(name)
        return name


class Paths:
    """The paths of a model's modules. A module with several is called by the first here, and by any in a file.

    >>> model = nn.Module()
    >>> model.fc = model.again = nn.Linear(2, 2)
    >>> Paths(model).tensors({"again.weight": 1}), Paths(model).calls(["fc", "again"])
    ({'fc.weight': 1}, ['fc', 'fc_2'])
    """

    def __init__(self, reference: nn.Module):
        first: dict[nn.Module, str] = {}
        modules = reference.named_modules(remove_duplicate=False)
        self._first = {path: first.setdefault(module, path) for path, module in modules}

    def tensors(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Values by the names of tensors, each named after its module's first path."""
        return {self._tensor(name): value for name, value in values.items()}

    def calls(self, names: Iterable[str]) -> list[str]:
        """The names of calls, in their order, each named after its module's first path."""
        taken, found = Names(), []
        for name in names:
            path = name if name in self._first else re.sub(r"_\d+$", "", name)
            first = self._first.get(path, path)
            found.append(taken.next(name if first == path else first) if name else "")
        return found

    def _tensor(self, name: str) -> str:
        path, dot, rest = name.rpartition(".")
        return f"{self._first.get(path, path)}{dot}{rest}"
