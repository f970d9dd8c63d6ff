"""Capture: run a model on example inputs and write down what it does.

Nothing is traced or compiled: the model runs as it is, once, while a function mode and module hooks look on. What
the run did is a plan's raw material; training never depends on it, except that a site is found again by its name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from isogrid.errors import CaptureError
from isogrid.layers.pooling import averages_space
from isogrid.layers.scope import OPERATION_KINDS, site_name
from isogrid.planning.graph import Call, Graph

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
    nn.Embedding: "embedding",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
}
"""Modules that are one call; a subclass is not its parent, for its forward may do something else."""

MOVING_FUNCTIONS = frozenset(
    {
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "clone",
        "expand",
        "unflatten",
        "narrow",
        "select",
        "chunk",
        "split",
        "unbind",
        "__getitem__",
    }
)
"""Functions that only move values, so that their output lies on their input's grid."""


def capture(model: nn.Module, example_inputs: Sequence[Any]) -> Graph:
    """The calls that a model makes on example inputs, in evaluation mode and without gradients.

    Raises:
        CaptureError: the model does not run on them, or no tensor comes out.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> [(call.name, call.kind) for call in capture(model, (torch.zeros(1, 4),)).calls]
    [('0', 'linear'), ('relu', 'relu')]
    """
    recorder = _Recorder(model)
    tensors = [leaf for leaf in tree_leaves(tuple(example_inputs)) if isinstance(leaf, Tensor)]
    inputs = tuple(recorder.new_value(tensor) for tensor in tensors)
    if any(tensor.numel() == 0 for tensor in tensors):
        raise CaptureError("The example inputs are empty. Give the model at least one example.")
    with _evaluating(model), _no_fast_path(), torch.no_grad(), recorder.looking_on():
        try:
            result = model(*example_inputs)
        except Exception as error:
            raise CaptureError(
                f"The model does not run on the example inputs: {type(error).__name__}: {error}. "
                "Pass the arguments of its forward as a tuple, example_inputs=(x,)."
            ) from error
    outputs = tuple(recorder.value(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    if not outputs:
        raise CaptureError("The model returns no tensor for the example inputs.")
    return Graph(tuple(recorder.calls), inputs, outputs, recorder.uncalled())


class _Recorder(TorchFunctionMode):
    """Writes down calls while a model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.paths = {module: path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.calls: list[Call] = []
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._stack: list[tuple[nn.Module, dict[str, int], tuple[int, ...]]] = []
        self._unit: nn.Module | None = None
        self._reached: set[nn.Module] = set()

    def new_value(self, tensor: Tensor) -> int:
        """Number a tensor anew: it was just made or written."""
        self._alive.append(tensor)  # keeps Python from giving its id to another tensor
        self._values[id(tensor)] = len(self._alive) - 1
        return len(self._alive) - 1

    def value(self, tensor: Tensor) -> int:
        """The number of a tensor; parameters and constants get one when they are first seen."""
        known = self._values.get(id(tensor))
        return self.new_value(tensor) if known is None else known

    def uncalled(self) -> tuple[str, ...]:
        """Modules with parameters of their own that the run did not reach."""
        return tuple(
            path
            for path, module in self.model.named_modules()
            if module not in self._reached and next(module.parameters(recurse=False), None) is not None
        )

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        )
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._unit is not None:
            return func(*args, **kwargs)
        inputs = self._numbers((args, kwargs))
        kind, name = self._classify(func, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and inputs:
            self._record(name, kind, getattr(func, "__name__", str(func)), inputs, outputs)
        return result

    def _classify(self, func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[str, str]:
        """The kind of a function call and its name within its scope."""
        function = getattr(func, "__name__", str(func))
        kind = OPERATION_KINDS.get(func)
        if kind is None:
            if "dropout" in function:
                return "dropout", function
            return ("pass" if function in MOVING_FUNCTIONS else "float"), function
        _, counts, _ = self._scope()
        name = site_name(kind, counts)
        if kind == "add" and not (_both_tensors(args) and kwargs.get("alpha", 1) == 1):
            return "float", name
        if kind == "mean":
            return ("average_pool" if averages_space(*args, **kwargs) else "float"), name
        return kind, name

    def _scope(self) -> tuple[nn.Module, dict[str, int], tuple[int, ...]]:
        """The innermost module that is more than a wrapper around one function, such as nn.ReLU."""
        for entry in reversed(self._stack):
            if not is_wrapper(entry[0]):
                return entry
        return self._stack[0]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self.paths or self._unit is not None:
            return
        self._reached.add(module)
        self._stack.append((module, {}, self._numbers(args)))
        if type(module) in MODULE_KINDS or is_opaque(module):
            self._unit = module

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if not self._stack or self._stack[-1][0] is not module:
            return
        _, _, inputs = self._stack.pop()
        if self._unit is module:
            self._unit = None
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            kind = MODULE_KINDS.get(type(module), "float")
            self._record(self.paths[module], kind, type(module).__name__, inputs, outputs, of_module=True)

    def _record(
        self, name: str, kind: str, type_: str, inputs: tuple[int, ...], outputs: list[Tensor], of_module: bool = False
    ) -> None:
        scope = self.paths[self._scope()[0]] if self._stack else ""
        full_name = name if of_module or not scope else f"{scope}.{name}"
        numbers = tuple(self.new_value(tensor) for tensor in outputs)
        shape = tuple(outputs[0].shape) if outputs else ()
        self.calls.append(Call(full_name, kind, type_, scope, inputs, numbers, shape))

    def _numbers(self, tree: Any) -> tuple[int, ...]:
        return tuple(self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module of torch.nn merely calls one function: no children, no parameters, nn.ReLU or nn.MaxPool2d."""
    return (
        type(module).__module__.startswith("torch.nn.modules")
        and next(module.children(), None) is None
        and next(module.parameters(), None) is None
    )


def is_opaque(module: nn.Module) -> bool:
    """Whether a module of torch.nn is looked at as one call: it has parameters of its own, such as nn.LayerNorm."""
    return (
        type(module).__module__.startswith("torch.nn.modules")
        and next(module.parameters(recurse=False), None) is not None
    )


def _both_tensors(args: Sequence[Any]) -> bool:
    return len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own flag again afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without PyTorch's fused transformer kernels, which in evaluation bypass the layers they are made of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
