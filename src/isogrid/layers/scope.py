"""Operation scopes: how calls like `a + b` in a module's `forward` reach their quantisers.

While a prepared module's own forward runs, a function mode sees the torch functions that it calls. The k-th call of
a kind is the site of that name: `add`, `add_1`, ... Layers and scopes further in switch the mode off for their own
insides, so that a call belongs to exactly one module. Nothing is traced: data-dependent Python stays as it is.
"""

import copyreg
import logging
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isogrid.errors import CaptureError
from isogrid.layers import activations, elementwise, matmul, where
from isogrid.layers.clamp import CLAMPS, CLAMPS_IN_PLACE
from isogrid.layers.decompositions import DECOMPOSITIONS
from isogrid.layers.lent import FUNCTIONS, Product, product_of

logger = logging.getLogger(__name__)

OPERATION_KINDS: dict[Callable[..., Any], str] = {
    **elementwise.NAMES,
    **matmul.NAMES,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "concat"),
    torch.where: "where",
    **CLAMPS,
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), "average_pool"),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), "average_pool"),
    **dict.fromkeys((torch.mean, Tensor.mean), "mean"),
    **activations.NAMES,
}
"""The torch functions that can be sites, by the names of their sites."""

KINDS = {
    **dict.fromkeys(("add", "sub", "rsub"), "add"),
    **dict.fromkeys(("mul", "div"), "multiply"),
    **dict.fromkeys(("matmul", "bmm", "mm"), "matmul"),
    **dict.fromkeys(CLAMPS.values(), "clamp"),
    **dict.fromkeys(activations.NAMES.values(), "activation"),
    "mean": "average_pool",
}
"""The kinds of sites that are not called after their kind."""

WRITING = elementwise.WRITING | CLAMPS_IN_PLACE | activations.WRITING
"""Those that write their result into their first argument."""

OPERANDS = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "matmul"), ("input", "other")),
    **dict.fromkeys(("bmm", "mm"), ("input", "mat2")),
    "concat": ("tensors",),
    "where": ("condition", "input", "other"),
}
"""The arguments that hold a site's operands, by its name, where they are more than `input`."""

CONSTRUCTORS = frozenset(
    {
        torch.arange,
        torch.as_tensor,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.tensor,
        torch.zeros,
    }
)
"""Functions that make tensors from nothing; modes further out, such as a default device, must see them."""

SCOPE_NAME = "operations"
"""The attribute of a prepared module that holds the sites of its forward."""


class OperationScope(nn.Module):
    """The sites of one module's forward.

    Args:
        sites: the modules to call, by site name.
        skipped: sites whose work another layer has taken over; they return their input.
        products: the names of the children that compute products by the module's own parameters.
        floats: sites that stay float by the plan.
        told: what the scopes of the model have told already; they share it.

    Attributes:
        unplanned: sites that were called and that the plan does not know; they run in float.
    """

    def __init__(
        self,
        sites: dict[str, nn.Module],
        skipped: Iterable[str] = (),
        products: Mapping[Product, str] | None = None,
        floats: Iterable[str] = (),
        told: set[tuple[str, ...]] | None = None,
    ):
        super().__init__()
        self.told = set() if told is None else told
        self.products = dict(products or {})
        self.floats = frozenset(floats)
        self.unplanned: set[str] = set()
        self.sites = nn.ModuleDict(sites)
        self.skipped = frozenset(skipped)

    def note(self, module: nn.Module, names: Sequence[str]) -> None:
        """Calls of one run that the plan does not know: a line for all modules of a class that make the same ones."""
        self.unplanned.update(names)
        line = (type(module).__name__, *names)
        if line not in self.told:
            self.told.add(line)
            calls = ", ".join(names)
            unknown = "%s calls %s, which the plan does not know: it runs in float. isogrid.unplanned(model) lists all."
            logger.warning(unknown, line[0], calls)

    def extra_repr(self) -> str:
        return f"done by the layer before: {', '.join(sorted(self.skipped))}" if self.skipped else ""


class _Calls(TorchFunctionMode):
    """Counts the calls of one run of a forward and hands them to their sites."""

    def __init__(self, module: nn.Module, prefix: str = "", unknown: list[str] | None = None):
        super().__init__()
        self.module, self.prefix = module, prefix
        self.unknown: list[str] = [] if unknown is None else unknown
        self.scope: OperationScope = getattr(module, _SCOPE)
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONSTRUCTORS:
            return func(*args, **kwargs)
        if func in FUNCTIONS and self.scope.products:
            found = product_of(self.module, func, args, kwargs)
            if found is not None and found[1] in self.scope.products:
                child = getattr(self.module, self.scope.products[found[1]])
                with torch._C.DisableTorchFunction():
                    return child(found[0])
        floats = takes_floats(args, kwargs)
        if floats and func in DECOMPOSITIONS and len(self.scope.sites):
            with _Calls(self.module, part_prefix(func, self.prefix, self.counts), self.unknown):
                result = DECOMPOSITIONS[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        kind = OPERATION_KINDS.get(func) if floats else None
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs) if kind is None else self._call(kind, func, args, kwargs)

    def _call(self, kind: str, func: Any, args: Any, kwargs: Any) -> Any:
        name = self.prefix + site_name(kind, self.counts)
        args, kwargs = tensors_first(kind, args, kwargs)
        if name in self.scope.skipped:
            return args[0]
        if name not in self.scope.sites:
            if name not in self.scope.floats and name not in self.scope.unplanned:
                self.unknown.append(name)
            return func(*args, **kwargs)
        site: Any = self.scope.sites[name]
        if not writes_input(func, kwargs):
            return site(func, *args, **kwargs)
        # Whoever holds the tensor must find the result in it. A site may save its input for backward, hence the clone.
        return args[0].copy_(site(func, args[0].clone(), *args[1:], **kwargs))


def takes_floats(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has a floating-point tensor among its arguments, so that it can be a site and is counted.

    >>> takes_floats((torch.zeros(1, dtype=torch.int64), 1), {}), takes_floats(([torch.zeros(1)],), {"dim": 0})
    (False, True)
    """
    for value in (*args, *kwargs.values()):
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and x.is_floating_point():
                return True
    return False


def site_name(kind: str, counts: dict[str, int]) -> str:
    """The name of the next call of a kind, which is counted: add, add_1, add_2, ...

    >>> counts = {}
    >>> site_name("add", counts), site_name("add", counts), site_name("relu", counts)
    ('add', 'add_1', 'relu')
    """
    count = counts.get(kind, 0)
    counts[kind] = count + 1
    return f"{kind}_{count}" if count else kind


def part_prefix(function: Callable[..., Any], prefix: str, counts: dict[str, int]) -> str:
    """What the names of sites begin with that are parts of the next call of a function in `DECOMPOSITIONS`.

    >>> part_prefix(F.scaled_dot_product_attention, "", {})
    'scaled_dot_product_attention_'
    """
    return f"{prefix}{site_name(function.__name__, counts)}_"


def tensors_first(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the operation's tensors in front, also where the caller gave them by name.

    >>> tensors_first("add", (1,), {"other": 2, "alpha": 3})
    ((1, 2), {'alpha': 3})
    """
    names = OPERANDS.get(kind, ("input",))[len(args) :]
    rest = dict(kwargs)
    return (*args, *(rest.pop(name) for name in names if name in rest)), rest


def unplanned(module: nn.Module) -> frozenset[str]:
    """The sites that a module's forward has called and that its plan does not know."""
    scope = getattr(module, _SCOPE, None)
    return frozenset() if scope is None else frozenset(scope.unplanned)


def operands_of(name: str, args: Sequence[Any]) -> list[Any]:
    """What a site of this name computes with: tensors, and numbers in sums and products.

    Args:
        name: of the site, without its number.
        args: of the call, with the tensors in front.
    """
    if name == "where":
        return where.operands(args)
    return list(args[0]) if name == "concat" else list(args[: len(OPERANDS.get(name, ("input",)))])


def writes_input(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes its result into its first argument."""
    return func in WRITING or bool(kwargs.get("inplace", False))


def is_container(module: nn.Module) -> bool:
    """Whether the children of a module are its layers, so that a child more would be a layer more."""
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def check_scope(module: nn.Module, has_sites: bool) -> None:
    """Raise CaptureError where `open_scope` could not do its work."""
    if has_sites and hasattr(module, SCOPE_NAME):
        raise CaptureError(
            f"{type(module).__name__} already has an attribute {SCOPE_NAME!r}, the name under which Isogrid keeps the "
            "quantisers of a forward. Rename the attribute."
        )
    if "forward" in vars(module):
        raise CaptureError(
            f"The forward of a {type(module).__name__} was replaced on the instance, and Isogrid has to wrap the one "
            "of the class. Take the patch off, or put it into a subclass."
        )


def open_scope(module: nn.Module, scope: OperationScope) -> None:
    """Let a module's forward run inside a scope, which becomes its child `operations` if it has sites.

    The sites of a container need a place elsewhere; see `house_sites`.

    Raises:
        CaptureError: the module has an attribute of this name, or a forward that is not its class's.
    """
    has_child = len(scope.sites) > 0 and not is_container(module)
    check_scope(module, has_child)
    if has_child:
        module.add_module(SCOPE_NAME, scope.train(module.training))
    object.__setattr__(module, _SCOPE, scope)
    module.forward = _bound(module)


def host_of(model: nn.Module, path: str) -> str | None:
    """The path of the module that has room for the sites of a container: the next one around it that is none.

    >>> model = nn.Module()
    >>> model.features = nn.Sequential(nn.ModuleDict())
    >>> host_of(model, "features.0"), host_of(model.features, "0")
    ('', None)
    """
    while path:
        path = path.rpartition(".")[0]
        if not is_container(model.get_submodule(path)):
            return path
    return None


def check_house(host: nn.Module, path: str, sites: Iterable[str]) -> None:
    """Raise CaptureError where `house_sites` could not do its work.

    Args:
        host, path: as there.
        sites: names of those of the host's own forward.
    """
    check_scope(host, has_sites=True)
    taken = [name for name in path.split(".") if hasattr(nn.ModuleDict, name)]
    taken += [path.partition(".")[0]] if path.partition(".")[0] in sites else []
    if taken:
        raise CaptureError(
            f"The child {path!r} of a {type(host).__name__} is called like something that Isogrid keeps there: "
            f"{', '.join(taken)}. Rename it, or keep the operations of its forward in float by a rule."
        )


def house_sites(host: nn.Module, path: str, scope: OperationScope) -> None:
    """Give the sites of a container's forward a place in a module around it, for its own children are its layers.

    Args:
        host: the module.
        path: of the container, from there.
        scope: of the container, opened; after that of the host, if it has one.
    """
    if SCOPE_NAME not in host._modules:
        host.add_module(SCOPE_NAME, getattr(host, _SCOPE, OperationScope({})).train(host.training))
    sites: Any = host.get_submodule(SCOPE_NAME).sites
    for name in path.split("."):
        if name not in sites:
            sites[name] = nn.ModuleDict()
        sites = sites[name]
    sites.update(scope.sites.train(host.training))
    scope.sites = sites


_SCOPE = "_isogrid_scope"


@cache
def _scoped_forward(kind: Any) -> Callable[..., Any]:
    """The forward of a class, run inside the scope of the module it belongs to."""
    plain: Callable[..., Any] = kind.forward

    # Trainers look at the signature to know which columns of the data a model takes.
    @wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls = _Calls(self)
        with calls:
            result = plain(self, *args, **kwargs)
        if calls.unknown:
            calls.scope.note(self, calls.unknown)
        return result

    return forward


def _bound(module: nn.Module) -> types.MethodType:
    """A bound method, which torch.export takes for the module's own forward."""
    kind: Any = type(module)
    return types.MethodType(_scoped_forward(kind), module)


def _reduce_method(method: types.MethodType) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How a bound method is pickled: by its object and its name, as ever, but a scoped forward as such."""
    owner = method.__self__
    kind: Any = type(owner)
    if isinstance(owner, nn.Module) and method.__func__ is _scoped_forward(kind):
        return _bound, (owner,)
    return getattr, (owner, method.__func__.__name__)


copyreg.pickle(types.MethodType, _reduce_method)
