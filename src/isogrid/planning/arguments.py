"""The arguments of a model's forward, as a plan remembers them: tensors by shape and dtype, all else by value."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isogrid.errors import PlanError

CONSTANTS = (bool, int, float, str, type(None))
"""What an argument may be besides a tensor, and lists, tuples and dictionaries of all these."""


@dataclass(frozen=True)
class InputSpec:
    """One tensor among the arguments: enough to make another like it.

    Attributes:
        shape, dtype: of the example, batch included.
        name: of the argument; `batch.image` within one that is a dictionary, `levels.0` within a list.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str = ""

    def zeros(self) -> Tensor:
        """A tensor like it."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype))


Argument = Any
"""An InputSpec, a constant, or a list, tuple or dictionary of arguments."""


@dataclass(frozen=True)
class Arguments:
    """All arguments of a forward.

    Attributes:
        positional: in order.
        named: by keyword.
        names: of the positional ones in the forward's signature, so that a batch can have them by name.
    """

    positional: tuple[Argument, ...] = ()
    named: dict[str, Argument] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[InputSpec, ...]:
        """The tensors, in the order in which an artefact takes them."""
        return tuple(_specs((*self.positional, *self.named.values())))

    def filled(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in their places: positional and named.

        >>> Arguments((InputSpec((1,), "float32", "x"), None), {"flag": True}).filled(["tensor"])
        (('tensor', None), {'flag': True})
        """
        values = iter(tensors)
        return _filled(self.positional, values), _filled(self.named, values)

    def of_batch(self, batch: Any) -> list[Any]:
        """The tensors of a batch as a loader gives it.

        Args:
            batch: a tensor; a dictionary that has the arguments by name; or a sequence that begins with them, where
                those that are no tensors may be left out. Labels and whatever else may follow or stand between.

        Raises:
            PlanError: it lacks an argument, or has another constant than the plan was made with.

        >>> x = Arguments((InputSpec((2,), "float32", "x"),), names=("x",))
        >>> x.of_batch({"label": 1, "x": "tensor"}), x.of_batch(["tensor", "label"])
        (['tensor'], ['tensor'])
        """
        every = {**dict(zip(self.names, self.positional, strict=True)), **self.named}
        if isinstance(batch, Mapping):
            values = self._by_name(batch, every)
        elif isinstance(batch, Tensor):
            values = [batch]
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            values = list(batch)
        else:
            raise PlanError(f"A batch is a tensor, a sequence or a dictionary, not a {type(batch).__name__}.")
        wanted = every
        if not _same_constants(list(every.values()), values):
            wanted = {name: argument for name, argument in every.items() if any(_specs(argument))}
        if len(values) < len(wanted):
            raise PlanError(f"A batch has {len(values)} elements and the model takes {len(wanted)}.")
        return [
            x for (name, spec), value in zip(wanted.items(), values, strict=False) for x in _taken(name, spec, value)
        ]

    def _by_name(self, batch: Mapping[str, Any], every: Mapping[str, Argument]) -> list[Any]:
        (alone,) = every.values() if len(every) == 1 else (None,)
        if isinstance(alone, dict) and next(iter(every)) not in batch:
            return [batch]  # the model takes one dictionary, and this is it
        missing = [name for name, argument in every.items() if name not in batch and any(_specs(argument))]
        if missing:
            raise PlanError(
                f"A batch has no {missing[0]!r}; it has {', '.join(map(str, batch))}. The model takes "
                f"{', '.join(every)}."
            )
        for name, argument in every.items():
            if name in batch and not any(_specs(argument)):
                list(_taken(name, argument, batch[name]))
        return [batch.get(name, argument) for name, argument in every.items()]

    def to_json(self) -> dict[str, Any]:
        """JSON data, which `from_json` reads back."""
        return {
            "positional": [_written(a) for a in self.positional],
            "named": {name: _written(a) for name, a in self.named.items()},
            "names": list(self.names),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Arguments":
        """The arguments that were written."""
        positional, named, names = (data[name] for name in ("positional", "named", "names"))
        return cls(tuple(map(_read, positional)), {name: _read(a) for name, a in named.items()}, tuple(names))


def arguments_of(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Arguments:
    """The arguments that example inputs are: a tuple of positional ones, or a dictionary of named ones.

    Raises:
        PlanError: they are neither, or one is something that cannot be written down.

    >>> arguments_of(nn.Linear(2, 1), (torch.zeros(1, 2),)).tensors
    (InputSpec(shape=(1, 2), dtype='float32', name='input'),)
    """
    if isinstance(example_inputs, Mapping):
        return Arguments((), {str(name): _described(str(name), value) for name, value in example_inputs.items()})
    if not isinstance(example_inputs, tuple | list):
        raise PlanError(
            "example_inputs is a tuple of the arguments of forward, example_inputs=(x,), or a dictionary of its "
            "keyword arguments, example_inputs={'x': x}."
        )
    names = _names(model, len(example_inputs))
    described = tuple(_described(name, value) for name, value in zip(names, example_inputs, strict=True))
    return Arguments(described, {}, names)


def without_values(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Any]:
    """A model and its inputs, wholly on the meta device where any of its parameters is: only shapes are needed there.

    >>> model, inputs = without_values(nn.Sequential(nn.Linear(2, 2, device="meta")), (torch.zeros(1, 2),))
    >>> model(*inputs).shape
    torch.Size([1, 2])
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model, example_inputs
    model = copy.deepcopy(model).to("meta")
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is False:
        # Without a cache transformers looks whether positions start anew inside a sequence, which needs their values.
        config.use_cache = True
    return model, tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example_inputs)


def _names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names for positional arguments: those of the class's own forward, also where a scope wraps it."""
    parameters = [p for p in inspect.signature(type(model).forward).parameters.values() if p.name != "self"]
    found = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    return (*found, *(f"{rest}_{number}" for number in range(count - len(found))))


def _described(name: str, value: Any) -> Argument:
    if isinstance(value, Tensor):
        return InputSpec(tuple(value.shape), str(value.dtype).removeprefix("torch."), name)
    if isinstance(value, Mapping):
        return {str(key): _described(f"{name}.{key}", item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_described(f"{name}.{number}", item) for number, item in enumerate(value))
    if isinstance(value, CONSTANTS):
        return value
    raise PlanError(
        f"Argument {name!r} is a {type(value).__name__}, which a plan cannot write down. Arguments are tensors, None, "
        "numbers, strings, and lists, tuples and dictionaries of these. Wrap the model in one that takes such."
    )


def _specs(argument: Argument) -> Iterator[InputSpec]:
    if isinstance(argument, InputSpec):
        yield argument
    elif isinstance(argument, list | tuple | dict):
        for item in argument.values() if isinstance(argument, dict) else argument:
            yield from _specs(item)


def _filled(argument: Argument, values: Iterator[Any]) -> Any:
    if isinstance(argument, InputSpec):
        return next(values)
    if isinstance(argument, dict):
        return {key: _filled(item, values) for key, item in argument.items()}
    if isinstance(argument, list | tuple):
        return type(argument)(_filled(item, values) for item in argument)
    return argument


def _same_constants(arguments: Sequence[Argument], values: Sequence[Any]) -> bool:
    """Whether a sequence has a plan's constants where the plan has them."""
    constants = [(number, a) for number, a in enumerate(arguments) if not any(_specs(a))]
    return all(number < len(values) and _equal(a, values[number]) for number, a in constants)


def _equal(constant: Argument, value: Any) -> bool:
    return type(constant) is type(value) and bool(constant == value)


def _taken(name: str, argument: Argument, value: Any) -> Iterator[Any]:
    """The tensors of one argument's value, where it is built as the example was."""
    if isinstance(argument, InputSpec):
        yield value
    elif isinstance(argument, dict):
        if not isinstance(value, Mapping) or any(key not in value for key in argument):
            raise PlanError(f"Argument {name!r} is a dictionary with {', '.join(argument)}; a batch has another there.")
        for key, item in argument.items():
            yield from _taken(f"{name}.{key}", item, value[key])
    elif isinstance(argument, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(argument):
            raise PlanError(f"Argument {name!r} is a sequence of {len(argument)}; a batch has something else there.")
        for number, (item, given) in enumerate(zip(argument, value, strict=True)):
            yield from _taken(f"{name}.{number}", item, given)
    elif not _equal(argument, value):
        raise PlanError(f"The plan was made with {name}={argument!r}, but a batch has {value!r}. Plan anew with that.")


def _written(argument: Argument) -> Any:
    if isinstance(argument, InputSpec):
        return {"tensor": list(argument.shape), "dtype": argument.dtype, "name": argument.name}
    if isinstance(argument, dict):
        return {"dict": {key: _written(item) for key, item in argument.items()}}
    if isinstance(argument, list | tuple):
        return {type(argument).__name__: [_written(item) for item in argument]}
    return argument


def _read(data: Any) -> Argument:
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return InputSpec(tuple(data["tensor"]), data["dtype"], data["name"])
    ((kind, items),) = data.items()
    if kind == "dict":
        return {key: _read(item) for key, item in items.items()}
    return {"list": list, "tuple": tuple}[kind](map(_read, items))
