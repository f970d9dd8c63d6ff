"""What a model does with tensors, seen from outside: calls, in the order they happened, and the values between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from isogrid.layers.clamp import Clamp
from isogrid.layers.lent import Lent
from isogrid.layers.pooling import Pooling

LAYER_KINDS = frozenset({"linear", "experts", "convolution", "embedding"})
"""Calls of modules that have a weight to quantise."""

COMPUTING_KINDS = frozenset(
    {"linear", "experts", "convolution", "add", "multiply", "matmul", "average_pool", "activation"}
)
"""Calls that compute with quantised inputs in integer arithmetic."""

JOINING_KINDS = frozenset({"concat", "where"})
"""Calls that take values of several inputs as they are, so that all lie on one grid."""


@dataclass(frozen=True)
class Call:
    """One call of a module or of a torch function.

    Attributes:
        name: the module's path, or the scope's path and the site's name: `layer1.0.add`.
        kind: linear, experts (a linear layer for each), convolution, embedding, batch_norm, add, multiply, matmul,
            concat, where, clamp (ReLU and its kin), activation (another function of each value), average_pool, pass
            (moves values without changing them), dropout, or float (anything else).
        type: the class or function, for people.
        scope: path of the module whose forward made the call.
        inputs, outputs: values, as numbers.
        shape: of the first output.
        reason: why the kind is float, where there is more to say than that the type is unknown.
        clamp: what a clamp limits values to.
        pooling: the windows of an average_pool.
    """

    name: str
    kind: str
    type: str
    scope: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...] = ()
    reason: str = ""
    clamp: Clamp | None = None
    pooling: Pooling | None = None

    @property
    def is_plain_sum(self) -> bool:
        """Whether the call is a sum of two tensors, and neither a difference nor a sum with a number."""
        return self.kind == "add" and len(self.inputs) == 2 and "sub" not in self.type

    @property
    def is_sum(self) -> bool:
        """Whether the call is a sum or difference of two tensors."""
        return self.kind == "add" and len(self.inputs) == 2

    @property
    def pools_windows(self) -> bool:
        """Whether the call averages over windows, and not over all of space."""
        return self.kind == "average_pool" and self.pooling is not None and not self.pooling.is_global

    @property
    def output(self) -> int:
        """The first output."""
        return self.outputs[0]


@dataclass(frozen=True)
class Graph:
    """All calls of one run of a model.

    Attributes:
        calls: in order.
        model_inputs, model_outputs: values that enter and leave the model.
        data: the inputs that are numbers or pixels, not indices or masks, and the parameters that calls read.
        uncalled: paths of modules with parameters that the run did not reach.
        scopes: paths of the modules whose forward may call functions that can be sites.
        lent: products by parameters of a forward's own module, which were seen as calls of children.
        fast_paths: paths of modules that PyTorch computes without calling their children, where it sees fit.
        states: of kind query_states, key_cache and value_cache: what attention layers that keep a cache read. They are
            no calls, and so have neither inputs nor outputs.
    """

    calls: tuple[Call, ...]
    model_inputs: tuple[int, ...]
    model_outputs: tuple[int, ...]
    data: tuple[int, ...] = ()
    uncalled: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    fast_paths: tuple[str, ...] = ()
    lent: tuple[Lent, ...] = ()
    states: tuple[Call, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, list[Call]]:
        """The calls of each module or site; several where it is used more than once."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.name, []).append(call)
        return found

    @cached_property
    def producer(self) -> dict[int, Call]:
        """Which call made a value."""
        return {value: call for call in self.calls for value in call.outputs}

    @cached_property
    def from_data(self) -> frozenset[int]:
        """The values that depend on data or parameters, and not on positions and constants alone."""
        found = set(self.data)
        for call in self.calls:
            if call.kind in LAYER_KINDS or not found.isdisjoint(call.inputs):
                found.update(call.outputs)
        return frozenset(found)

    @cached_property
    def consumers(self) -> dict[int, list[Call]]:
        """Which calls read a value."""
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            for value in dict.fromkeys(call.inputs):
                found.setdefault(value, []).append(call)
        return found

    def only_consumer(self, value: int) -> Call | None:
        """The one call that reads a value which nothing else reads and which does not leave the model."""
        consumers = self.consumers.get(value, [])
        return consumers[0] if len(consumers) == 1 and value not in self.model_outputs else None

    def calls_of(self, name: str) -> list[Call]:
        """The calls of one module or site."""
        return self.by_name.get(name, [])

    def readers(self, value: int) -> Iterator[Call]:
        """The calls that read a value, also after it has passed through calls that only move values."""
        for call in self.consumers.get(value, []):
            if call.kind in ("pass", "dropout"):
                for output in call.outputs:
                    yield from self.readers(output)
            else:
                yield call

    def origin(self, value: int) -> tuple[int, bool]:
        """The value before calls that only move values, and whether it arrives unchanged in training too."""
        exact = True
        while (call := self.producer.get(value)) is not None and call.kind in ("pass", "dropout"):
            exact = exact and call.kind == "pass"
            value = call.inputs[0]
        return value, exact
