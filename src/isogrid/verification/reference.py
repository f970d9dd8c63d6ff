"""The reference at work: `convert(model)` with every quantised tensor and every packed layer in view."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from isogrid.layers.attention_states import DynamicState
from isogrid.layers.half import HalfLayer
from isogrid.layers.integer import IntegerLayer, PackedLinear, uncounted
from isogrid.layers.matmul import IntegerMatmul
from isogrid.layers.own_forward import IntegerOwnForward
from isogrid.layers.stored import StoredLinear
from isogrid.planning.convert import watched
from isogrid.verification.names import Names

Packed = PackedLinear | StoredLinear | HalfLayer
"""Layers with packed or float16 weights, whose input and output a runtime shows."""

LAYERS = (IntegerLayer, IntegerMatmul, *get_args(Packed), nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that multiply, and after which the runtime's operators are named."""


class Quantization(NamedTuple):
    """A call that made codes of float values."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    kernels: str = "onnxruntime"  # the operator's own default, which a dispatcher leaves out

    def codes(self, x: Tensor) -> Tensor:
        """The codes of other values on the same grid."""
        return torch.ops.isogrid.quantize(x, *self[1:])  # type: ignore[no-any-return]


class View:
    """What happens at each point in view; as it stands, nothing does."""

    def started(self, path: str, layer: str | None) -> None:
        """A module's call begins; `layer` is its name in the graph where it is a layer that multiplies."""

    def finished(self, result: Any) -> None:
        """The call that began last is over, with this result."""

    def codes(self, name: str, codes: Tensor, source: Quantization | None) -> Tensor:
        """At a quantised tensor; the run goes on with the codes returned. `source` is None behind integer kernels."""
        return codes

    def entering(self, name: str, x: Tensor) -> Tensor:
        """At the input of a packed layer; the run goes on with the values returned."""
        return x

    def leaving(self, name: str, layer: Packed, x: Tensor, y: Tensor) -> Tensor:
        """At the output of a packed layer, which was made of x; the run goes on with the values returned."""
        return y

    def state(self, name: str, module: DynamicState, y: Tensor) -> Tensor:
        """At queries, keys or values that were quantised as they came; the run goes on with the values returned."""
        return y


@contextmanager
def viewed(reference: nn.Module, view: View) -> Iterator[None]:
    """While open, a run of the reference shows itself to a view. One run, for calls are numbered."""
    calls, names, sources = Counter[str](), Names(), _Sources()  # type: ignore[no-untyped-call]
    layers: list[str] = []

    def enter(path: str, module: nn.Module, args: Any) -> Any:
        calls[path] += 1
        layer = names.next(path) if isinstance(module, LAYERS) else None
        view.started(path, layer)
        if layer is None or not isinstance(module, Packed):
            return None
        layers.append(layer)
        if isinstance(module, IntegerOwnForward):  # its forward makes the input of its product
            return None
        with uncounted():  # what a view computes is none of the model's calls
            return (view.entering(layer, args[0]), *args[1:])

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        view.finished(output)
        if not isinstance(module, Packed):
            return None
        layer = layers.pop()
        with uncounted():
            return None if isinstance(module, IntegerOwnForward) else view.leaving(layer, module, args[0], output)

    def around(module: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not isinstance(module, Packed):
            return compute(x)
        with uncounted():
            x = view.entering(layers[-1], x)
        y = compute(x)
        with uncounted():
            return view.leaving(layers[-1], module, x, y)

    def state(path: str, module: DynamicState, args: Any, output: Tensor) -> Tensor:
        with uncounted():
            return view.state(path, module, output)

    def watch(name: str, codes: Tensor) -> Tensor:
        count = calls[name.rpartition(".")[0]]
        source = sources.last if sources.codes is codes else None
        return view.codes(name if count == 1 else f"{name}_{count}", codes, source)

    with ExitStack() as stack:
        for path, module in reference.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(enter, path)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            if isinstance(module, DynamicState):
                stack.callback(module.register_forward_hook(partial(state, path)).remove)
            if isinstance(module, IntegerOwnForward):
                module.__dict__["around"] = partial(around, module)
                stack.callback(module.__dict__.pop, "around")
        stack.enter_context(watched(reference, watch))
        stack.enter_context(sources)
        yield


class _Sources(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the latest quantisation: `last` made `codes`."""

    last: Quantization | None = None
    codes: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.isogrid.quantize.default:
            self.last, self.codes = Quantization(*args), result
        return result
