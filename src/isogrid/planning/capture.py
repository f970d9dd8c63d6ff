"""Capture: run a model on example inputs and write down what it does.

Nothing is traced or compiled: the model runs as it is, once, while a function mode and module hooks look on. What
the run did is a plan's raw material; training never depends on it, except that a site is found again by its name.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from isogrid.errors import CaptureError
from isogrid.layers.clamp import CLAMPS, Clamp, clamp_of
from isogrid.layers.decompositions import DECOMPOSITIONS
from isogrid.layers.intercept import probe
from isogrid.layers.lent import FUNCTIONS, Lent, borrower, product_of
from isogrid.layers.own_table import is_own_table, why_no_table
from isogrid.layers.pooling import Pooling, pooling_of
from isogrid.layers.scope import (
    KINDS,
    OPERATION_KINDS,
    host_of,
    is_container,
    operands_of,
    part_prefix,
    site_name,
    takes_floats,
    tensors_first,
)
from isogrid.planning.classify import (
    calls_site,
    has_fast_path,
    has_own_forward,
    is_one_call,
    is_sequential,
    is_subclass_of_layer,
    is_wrapper,
    kind_of,
    kind_of_extended,
    why_float,
    why_module_is_float,
)
from isogrid.planning.evaluating import evaluating
from isogrid.planning.graph import Call, Graph
from isogrid.planning.lending import take_back
from isogrid.planning.moving import moves
from isogrid.planning.states import states_of
from isogrid.planning.stubs import stub_of
from isogrid.planning.values import tensors_in


def capture(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Graph:
    """The calls that a model makes on example inputs, in evaluation mode and without gradients.

    Raises:
        CaptureError: the model does not run on them, or no tensor comes out.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> [(call.name, call.kind) for call in capture(model, (torch.zeros(1, 4),)).calls]
    [('0', 'linear'), ('1.relu', 'clamp')]
    """
    recorder = _Recorder(model)
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    positional = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    tensors = tensors_in((positional, named))
    if any(tensor.numel() == 0 for tensor in tensors):
        raise CaptureError("The example inputs are empty. Give the model at least one example.")
    if any(parameter.is_meta for parameter in model.parameters()) and not all(x.is_meta for x in tensors):
        raise CaptureError(
            "The model is on the meta device, where nothing has values, and the example inputs are not. Give inputs "
            "on the meta device too, or materialise the model: model.to_empty(device='cpu'), then load a checkpoint."
        )
    inputs = tuple(recorder.new_value(tensor) for tensor in tensors)
    with evaluating(model), _no_fast_path(), torch.no_grad(), states_of(model) as states, recorder.looking_on():
        try:
            result = model(*positional, **named)
        except Exception as error:
            raise CaptureError(
                f"The model does not run on the example inputs: {type(error).__name__}: {error}. "
                "Pass the arguments of its forward as a tuple, example_inputs=(x,), or as a dictionary of keywords."
            ) from error
    outputs = tuple(recorder.value(tensor) for tensor in tensors_in(result))
    if not outputs:
        raise CaptureError(
            f"The model returns a {type(result).__name__} with no tensor in it that can be found. "
            "Return a tensor, or a tuple or dictionary of tensors."
        )
    data = tuple(recorder.value(x) for x in tensors if x.is_floating_point() or x.dtype == torch.uint8)
    parameters = tuple(recorder.value(parameter) for parameter in model.parameters())
    return replace(recorder.graph(inputs, outputs), data=data + parameters, states=tuple(states))


class _What(NamedTuple):
    """What a call is.

    Kind, name within its scope (None for a module), why it stays float, what it clamps to, which windows it averages.
    """

    kind: str
    name: str | None
    reason: str = ""
    clamp: Clamp | None = None
    pooling: Pooling | None = None


class _Entry(NamedTuple):
    """A module that is running, and how often each kind of function was called in its scope.

    While a function runs as the parts it is made of, they have an entry of their own with a prefix to their names.
    """

    module: nn.Module
    counts: dict[str, int]
    prefix: str = ""


class _Recorder(TorchFunctionMode):
    """Writes down calls while a model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.paths = {module: path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        # nn.Sequential has no forward of its own to watch, so that its nn.ReLU and its like are scopes themselves.
        self._alone = {
            child for m in model.modules() if is_sequential(m) for child in m.children() if is_wrapper(child)
        }
        self._calls: list[Call] = []
        self._lents: list[Lent] = []
        self._hooks: list[RemovableHandle] = []
        self._values: dict[int, tuple[int, int]] = {}
        self._alive: list[Tensor] = []
        self._stack: list[_Entry] = []
        self._unit: nn.Module | None = None
        self._reached: set[nn.Module] = set()
        self._units: set[nn.Module] = set()

    def graph(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Graph:
        """All that was written down."""
        modules = self.paths.items()
        inside = tuple(f"{self.paths[unit]}." for unit in self._units)
        return Graph(
            calls=tuple(self._calls),
            model_inputs=inputs,
            model_outputs=outputs,
            uncalled=tuple(
                path
                for path, module in self.model.named_modules()
                if module not in self._reached
                and not path.startswith(inside)
                and next(module.parameters(recurse=False), None) is not None
            ),
            scopes=tuple(
                path
                for module, path in modules
                if not path.startswith(inside) and (has_own_forward(module) or self._is_alone(module))
            ),
            lent=tuple(self._lents),
            fast_paths=tuple(path for module, path in modules if has_fast_path(module)),
        )

    def new_value(self, tensor: Tensor) -> int:
        """Number a tensor anew: it was just made or written."""
        self._alive.append(tensor)  # keeps Python from giving its id to another tensor
        self._values[id(tensor)] = (len(self._alive) - 1, _version(tensor))
        return len(self._alive) - 1

    def value(self, tensor: Tensor) -> int:
        """The number of a tensor; it gets one when it is first seen, and after something unseen has written to it."""
        number, version = self._values.get(id(tensor), (-1, -1))
        return number if version == _version(tensor) else self.new_value(tensor)

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        """Record while open."""
        # Before a user's own hooks: what those do to inputs and outputs is not the module's work.
        self._hooks = [hook for module in self.paths for hook in self._watch(module)]
        try:
            with self:
                yield
        finally:
            for hook in self._hooks:
                hook.remove()
            take_back(self.model, self._lents)

    def _watch(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, prepend=True, with_kwargs=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._unit is not None:
            return func(*args, **kwargs)
        if func in FUNCTIONS and (product := self._lent(func, args, kwargs)) is not None:
            x, child = product
            with self:
                return child(x)
        if func in DECOMPOSITIONS and takes_floats(args, kwargs):
            result = self._in_parts(func, args, kwargs)
            if result is not NotImplemented:
                return result
        before = tensors_in((args, kwargs))
        inputs = tuple(self.value(tensor) for tensor in before)
        if (site := OPERATION_KINDS.get(func)) is not None:
            operands = operands_of(site, tensors_first(site, args, kwargs)[0])
            inputs = tuple(self.value(x) for x in operands if isinstance(x, Tensor))
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        what = self._classify(func, args, kwargs, outputs)
        # A function may return its argument as it is: Tensor.to, Tensor.contiguous.
        unchanged = all(any(o is x for x in before) and self._is_current(o) for o in outputs)
        computes_floats = any(x.is_floating_point() for x in (*before, *outputs))
        if computes_floats and outputs and inputs and not (unchanged and what.kind in ("float", "pass")):
            self._record(what, _name(func), inputs, outputs, self._scope().module)
        return result

    def _lent(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, nn.Module] | None:
        """The input and the child that computes a product by parameters of the module that asks for it."""
        module = self._scope().module
        found = None if is_container(module) else product_of(module, func, args, kwargs)
        if found is None:
            return None
        x, product = found
        path = self.paths[module]
        lent = next((each for each in self._lents if (each.scope, each.product) == (path, product)), None)
        if lent is None:
            counts = {name: 1 for name in dir(module)}
            lent = Lent(path, site_name(f"{product.weight}_{product.function}", counts), product)
            child = borrower(module, product)
            module.add_module(lent.name, child)
            self._lents.append(lent)
            self.paths[child] = lent.path
            self._hooks += self._watch(child)
        return x, getattr(module, lent.name)

    def _in_parts(self, func: Any, args: Any, kwargs: Any) -> Any:
        scope = self._scope()
        self._stack.append(_Entry(scope.module, {}, part_prefix(func, scope.prefix, scope.counts)))
        with self:
            result = DECOMPOSITIONS[func](*args, **kwargs)
        self._stack.pop()
        return result

    def _is_current(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values and self._values[id(tensor)][1] == _version(tensor)

    def _classify(self, func: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> "_What":
        """What a function call is; its name counts the calls of its kind within its scope."""
        function = _name(func)
        kind = OPERATION_KINDS.get(func) if takes_floats(args, kwargs) else None
        if kind is None:
            if "dropout" in function:
                return _What("dropout", function)
            return _What("pass" if moves(func, args, kwargs) else "float", function)
        scope = self._scope()
        name = scope.prefix + site_name(kind, scope.counts)
        reason = why_float(func, kind, *tensors_first(kind, args, kwargs), outputs[0]) if outputs else ""
        if func in CLAMPS:
            clamp = None if reason else clamp_of(kind, *tensors_first(kind, args, kwargs))
            return _What("clamp", name, clamp=clamp) if clamp else _What("float", name, reason or "bounds are tensors")
        if not reason and is_container(scope.module) and host_of(self.model, self.paths[scope.module]) is None:
            reason = f"in the forward of a {type(scope.module).__name__}, whose children are its layers, and the model"
        kind = "float" if reason else KINDS.get(kind, kind)
        if kind != "average_pool":
            return _What(kind, name, reason)
        positional, named = tensors_first(kind, args, kwargs)
        return _What(kind, name, reason, pooling=pooling_of(func, *positional, **named))

    def _scope(self) -> _Entry:
        """The innermost module that is more than a wrapper around one function, such as nn.ReLU."""
        for entry in reversed(self._stack):
            if entry.module in self._alone or not is_wrapper(entry.module):
                return entry
        return self._stack[0]

    def _is_alone(self, module: nn.Module) -> bool:
        return module in self._alone and calls_site(module)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._unit is not None:
            return
        self._reached.add(module)
        self._stack.append(_Entry(module, {}))
        if is_one_call(module):
            self._unit = module
            self._units.add(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        if not self._stack or self._stack[-1].module is not module:
            return None
        self._stack.pop()
        if self._unit is None and (stub := stub_of(module)) is not None:
            with torch._C.DisableTorchFunction():
                # A stub returns its argument; what comes after it must not be taken for what came before.
                aliased = tree_map_only(Tensor, torch.ops.aten.alias.default, result)
                inputs = tuple(self.value(tensor) for tensor in tensors_in(result))
                outputs = tensors_in(aliased)
                self._record(_What("pass", None), stub, inputs, outputs, module)
            return aliased
        if self._unit is module:
            found = self._probe(module, args, kwargs) if is_subclass_of_layer(module) else None
            self._unit = None
            with torch._C.DisableTorchFunction():
                self._record_module(module, (args, kwargs), result, found)
        return None

    @staticmethod
    def _probe(module: nn.Module, args: Any, kwargs: Any) -> tuple[str, Tensor | None]:
        if is_own_table(module):
            why = why_no_table(module, args, kwargs)
            return why, None if why else next(iter(tensors_in((args, kwargs))))
        return probe(module, args, kwargs)

    def _record_module(
        self, module: nn.Module, arguments: Any, result: Any, found: tuple[str, Tensor | None] | None
    ) -> None:
        inputs = tuple(self.value(tensor) for tensor in tensors_in(arguments))
        outputs = tensors_in(result)
        reason = why_module_is_float(module, outputs[0]) if outputs else ""
        kind = "float" if reason else kind_of(module)
        if found is not None:
            reason, x = found
            kind, inputs = ("float", inputs) if x is None else (kind_of_extended(module), (self.value(x),))
            reason = reason and f"{type(module).__name__} extends a layer, and {reason}"
        type_ = type(module).__name__.removeprefix("Borrowed")
        if getattr(module, "turned", False):  # its weight is stored [in, out]
            type_ = {"linear": "Conv1D", "experts": "TurnedExperts"}.get(kind, type_)
        self._record(_What(kind, None, reason), type_, inputs, outputs, module)

    def _record(
        self, what: "_What", type_: str, inputs: tuple[int, ...], outputs: Sequence[Tensor], module: nn.Module
    ) -> None:
        """Write down a call: of a function, named within the module that made it, or of a module, without a name."""
        path = self.paths[module]
        name = path if what.name is None else f"{path}.{what.name}".lstrip(".")
        numbers = tuple(self.new_value(tensor) for tensor in outputs)
        shape = tuple(outputs[0].shape) if outputs else ()
        call = Call(name, what.kind, type_, path, inputs, numbers, shape, what.reason, what.clamp, what.pooling)
        self._calls.append(call)


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _version(tensor: Tensor) -> int:
    """Counts writes to a tensor, through views too."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without PyTorch's fused transformer kernels, which in evaluation bypass the layers they are made of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
