"""What a float model does, told so that changes of its weights which cancel out can be found."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from isogrid.errors import CaptureError, PlanError
from isogrid.initialization.norms import Norm, norm_of
from isogrid.layers.intercept import own_class
from isogrid.layers.weights import computes_weight, weight_key
from isogrid.planning.capture import capture
from isogrid.planning.evaluating import evaluating
from isogrid.planning.exchange import apart
from isogrid.planning.graph import Call, Graph
from isogrid.planning.lending import lending
from isogrid.planning.state import is_prepared
from isogrid.planning.values import tensors_in

ExampleInputs = Sequence[Any] | Mapping[str, Any]
WEIGHTED_KINDS = ("linear", "experts", "embedding", "norm")


@dataclass(frozen=True)
class Network:
    """The calls of a model, in which a norm is one call of the kind `norm`.

    Attributes:
        model: float.
        graph: see `isogrid.planning.graph`; a concatenation of one computed value with tensors that nothing computes,
            as of keys with an empty cache, is a `pass`.
        norms: by path.
    """

    model: nn.Module
    graph: Graph
    norms: dict[str, Norm]

    def module(self, path: str) -> Any:
        """The module at a path."""
        return self.model.get_submodule(path)

    def keeps_channels(self, call: Call) -> bool:
        """Whether a call only moves values, and each stays in its channel as far as the shapes tell."""
        return call.kind in ("pass", "dropout") and self.width(call.inputs[0]) in (None, self.width(call.output))

    def width(self, value: int) -> int | None:
        """The size of the last dimension of a value; None where nothing in the model made it."""
        call = self.graph.producer.get(value)
        return call.shape[-1] if call is not None and call.shape and value == call.output else None

    def source(self, value: int) -> int:
        """The value before calls that move values and keep their channels."""
        while (call := self.graph.producer.get(value)) is not None and self.keeps_channels(call):
            value = call.inputs[0]
        return value

    def readers(self, value: int) -> Iterator[Call]:
        """The calls that read a value, also after it has passed through calls that keep channels."""
        for call in self.graph.consumers.get(value, []):
            if self.keeps_channels(call):
                for output in call.outputs:
                    yield from self.readers(output)
            else:
                yield call

    def leaves(self, value: int) -> bool:
        """Whether a value, or what moving calls make of it, is an output of the model."""
        moved = (c for c in self.graph.consumers.get(value, []) if self.keeps_channels(c))
        return value in self.graph.model_outputs or any(self.leaves(o) for call in moved for o in call.outputs)

    def is_linear(self, call: Call) -> bool:
        """Whether a call is of linear layers whose weight is a parameter, or part of one, that can be written."""
        return call.kind in ("linear", "experts") and can_write_weight(self.module(call.name))

    def is_used_twice(self, call: Call) -> bool:
        """Whether a layer is called more than once, or another layer has its weight."""
        return len(self.uses(call)) > 1

    def uses(self, call: Call) -> list[Call]:
        """All calls of layers that have a call's weight."""
        return self._uses[self._key(call)]

    @cached_property
    def _uses(self) -> dict[Hashable, list[Call]]:
        found: dict[Hashable, list[Call]] = {}
        for call in self.graph.calls:
            if call.kind in WEIGHTED_KINDS:
                found.setdefault(self._key(call), []).append(call)
        return found

    def _key(self, call: Call) -> Hashable:
        return call.name if call.kind == "norm" else weight_key(self.module(call.name))


@contextmanager
def network_of(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[Network]:
    """The network of a float model; while open, modules of several products are taken apart into linear layers.

    Raises:
        PlanError: the model is prepared already.
        CaptureError: it does not run on the example inputs.
    """
    if is_prepared(model):
        raise PlanError("The model is prepared already. Change the weights of the float model, before isogrid.plan.")
    with apart(model):
        graph = capture(model, example_inputs)
        with lending(model, graph.lent):
            yield _network(model, graph)


def can_write_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is what its forward multiplies by, and not computed from something else."""
    computed = is_parametrized(module, "weight") or computes_weight(module) or "weight" in vars(module)
    return own_class(module) is None and not computed


def _network(model: nn.Module, graph: Graph) -> Network:
    paths = {call.scope for call in graph.calls} | {call.name for call in graph.calls}
    modules = dict(model.named_modules())
    norms = {path: norm for path in paths if path in modules and (norm := norm_of(modules[path])) is not None}
    calls = tuple(_of_passes(graph, _with_norms(graph, norms)))
    return Network(model, replace(graph, calls=calls), norms)


def _with_norms(graph: Graph, norms: Mapping[str, Norm]) -> Iterator[Call]:
    """The calls, with one for each norm in the place of those that it is made of."""
    for call in graph.calls:
        path = call.name if call.name in norms else call.scope
        if path not in norms:
            yield call
            continue
        inside = [each for each in graph.calls if path in (each.name, each.scope)]
        if call is inside[-1]:
            made = {value for each in inside for value in each.outputs}
            enters = dict.fromkeys(value for each in inside for value in each.inputs if value not in made)
            inputs = tuple(value for value in enters if value in graph.producer or value in graph.model_inputs)
            yield replace(call, name=path, kind="norm", scope=path, inputs=inputs[:1])


def _of_passes(graph: Graph, calls: Iterator[Call]) -> Iterator[Call]:
    for call in calls:
        computed = tuple(value for value in call.inputs if value in graph.producer)
        alone = call.kind == "concat" and len(computed) == 1 < len(call.inputs)
        yield replace(call, kind="pass", inputs=computed) if alone else call


@contextmanager
def unless_it_differs(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[list[Callable[[], None]]]:
    """Let a block change a model's weights and layers, and undo it all where the outputs then differ.

    By more than 0.1 % of the largest, that is, or by 5 % in half precision, where every weight is rounded anew.

    Yields:
        A list for functions that undo what the block changes besides.

    Raises:
        CaptureError: they differ; the model is as it was.
    """
    before = _outputs(model, example_inputs)
    weights = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    places = [(parent, dict(parent._modules)) for parent in model.modules()]
    undo: list[Callable[[], None]] = []
    try:
        yield undo
        after = _outputs(model, example_inputs)
        worst = max(map(_distance, before, after), default=0.0)
        half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in weights)
        if not worst <= (5e-2 if half else 1e-3):
            raise CaptureError(
                f"With the changed weights the outputs differ by {worst:.2g} of the largest. The model computes "
                "something that its calls do not show. It is as it was; leave these layers out by match."
            )
    except BaseException:
        for function in reversed(undo):
            function()
        with torch.no_grad():
            for parent, children in places:
                parent._modules.update(children)
            for parameter, weight in weights.items():
                parameter.copy_(weight)
        raise


def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        named = isinstance(example_inputs, Mapping)
        result = model(**example_inputs) if named else model(*example_inputs)  # type: ignore[arg-type]
    return [x.double() for x in tensors_in(result) if x.is_floating_point()]


def _distance(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30)) if before.numel() else 0.0
