"""What a model's arithmetic promises, read off one run of the reference.

Two things decide which bound can be demanded of a value: whether it depends on the inputs through integers and exact
operations alone, so that every machine computes the same bits; and how many float operations lie between it and the
last point where verification looks, for each may round in its own order.

And an artefact need not have everything: exporters leave out what no output depends on, compute what no input changes
beforehand, and what is computed twice once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from isogrid.planning.values import tensors_in
from isogrid.verification.flow import Flow
from isogrid.verification.reference import Packed, Quantization, View, viewed

EXACT_OPERATIONS = frozenset(
    """
    _adaptive_max_pool _to_copy _unsafe_view abs adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add add_
    alias amax amin argmax as_strided bitwise_and bitwise_not cat ceil chunk clamp clamp_ clamp_max clamp_min
    clamp_min_ clone constant_pad_nd copy_ detach diagonal div div_ embedding empty empty_like eq expand eye fill_ flip
    floor full full_like gather ge gt hardtanh hardtanh_ index index_select le leaky_relu lift_fresh logical_and
    logical_not lt masked_fill max_pool2d_with_indices max_pool3d_with_indices maximum minimum mul mul_ ne neg new_ones
    new_zeros ones permute pixel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d relu relu_ repeat
    replication_pad1d replication_pad2d replication_pad3d roll round scalar_tensor select slice split split_with_sizes
    squeeze stack sub sub_ t transpose tril triu unbind unfold unsqueeze upsample_nearest2d view where zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Operations of torch that move values or round once: the same bits wherever they run."""

FLOAT_ISOGRID_OPERATIONS = frozenset({"matmul_nbits"})


ANGLES = frozenset({"cos", "sin"})
"""Operations whose value is only as exact as their argument is absolutely, as rotary embeddings' by the position."""

SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
ATTENTION = frozenset({"_scaled_dot_product_flash_attention_for_cpu"})
"""Operations that make an absolute error of their scores a relative one: what scores are off grows with their size."""

ROUNDINGS = 1e-6 * 2**24
"""Of float32, in what counts for one operation."""

MASKED = -1e4
"""Scores below it are masked: no exponential of a difference like that is left."""

Run = Callable[[tuple[Any, ...]], Any]


class Origin(NamedTuple):
    """How a value depends on what was computed before.

    Attributes:
        exact: through integers and exact operations alone, all the way from the inputs.
        depth: how many other float operations lie on the longest way from the last quantised tensor, packed layer or
            input; a sum of n products counts for sqrt(n) / 16 of them, as rounding errors wander, and the sine or
            cosine of an angle for as many as make up the angle's own rounding; a softmax multiplies those before it by
            its largest score.
    """

    exact: bool
    depth: float


class Work(NamedTuple):
    """One call that multiplies and accumulates.

    Attributes:
        layer: name of the layer, with a number behind it for further calls; None for a function such as matmul.
        path: of the layer, or of the module that calls the function.
        macs: multiplications with accumulation, for the whole batch.
        read: whether an output depends on the result.
        repeated: whether an earlier call computes the same.
    """

    layer: str | None
    path: str
    macs: int
    read: bool = True
    repeated: bool = False


@dataclass
class Survey(View):
    """What one run showed; see `survey`.

    Attributes:
        reproduced: whether the runtime's rounding is reproduced to the last bit.
        codes_from: the origin of the values that each quantised tensor was made of.
        constants: names of quantised tensors that no input of the model changes.
        unread: names of quantised tensors that no output depends on.
        unread_modules: paths of the modules whose results no output depends on.
        computed: for each quantised tensor, a number that it shares with those that are the same computation.
        layers_from: the origin of the input of each packed layer.
        outputs: the origin of each output.
        work: the calls that multiply, in order.
    """

    reproduced: bool = True
    codes_from: dict[str, Origin] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    unread_modules: set[str] = field(default_factory=set)
    computed: dict[str, int] = field(default_factory=dict)
    layers_from: dict[str, Origin] = field(default_factory=dict)
    outputs: list[Origin] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tracker = _Tracker(self._multiplied, self.reproduced)
        self._calls: list[Work] = []
        self._marks: dict[str, int] = {}
        self._module_marks: dict[str, int] = {}
        self._work_marks: list[int] = []

    def started(self, path: str, layer: str | None) -> None:
        self._calls.append(Work(layer, path, 0))

    def finished(self, result: Any) -> None:
        path = self._calls.pop().path
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._module_marks[path] = self._module_marks.get(path, 0) | self._tracker.flow.mark(tensors)

    def codes(self, name: str, codes: Tensor, source: Quantization | None) -> Tensor:
        values = codes if source is None else source.x
        self.codes_from.setdefault(name, self._tracker.origin(values))
        if not self._tracker.varies(values):
            self.constants.add(name)
        self.computed[name] = self._tracker.flow.number(codes)
        self._marks[name] = self._tracker.flow.mark([codes])
        return codes

    def entering(self, name: str, x: Tensor) -> Tensor:
        self.layers_from[name] = self._tracker.origin(x)
        return x

    def leaving(self, name: str, layer: Packed, x: Tensor, y: Tensor) -> Tensor:
        self._tracker.restart(y)
        return y

    def fill(self, reference: nn.Module, run: Run, inputs: tuple[Any, ...]) -> None:
        """Fill it in."""
        for x in inputs:
            self._tracker.watch(x)
        with torch.no_grad(), viewed(reference, self), self._tracker:
            result = run(inputs)
        self.outputs = [self._tracker.origin(x) for x in tensors_in(result)]
        reaching = self._tracker.flow.reaching(x for x in tree_leaves(result) if isinstance(x, Tensor))
        self.unread = {name for name, bits in self._marks.items() if not bits & reaching}
        self.unread_modules = {path for path, bits in self._module_marks.items() if not bits & reaching}
        read = (bool(bits & reaching) for bits in self._work_marks)
        self.work = [work._replace(read=is_read) for work, is_read in zip(self.work, read, strict=True)]

    def _multiplied(self, macs: int, results: list[Tensor], repeated: bool) -> None:
        call, last = self._calls[-1], self.work[-1] if self.work else None
        mark = self._tracker.flow.mark(results)
        if last is not None and call.layer is not None and call.layer == last.layer:
            self.work[-1] = last._replace(macs=last.macs + macs)  # a product of each expert
            self._work_marks[-1] |= mark
        else:
            self.work.append(call._replace(macs=macs, repeated=repeated))
            self._work_marks.append(mark)


def survey(reference: nn.Module, run: Run, inputs: tuple[Any, ...], reproduced: bool = True) -> Survey:
    """Run the reference once and note where every value comes from, and all that multiplies.

    Args:
        reference: of `isogrid.convert`.
        run: runs it on inputs and returns what it returns.
        inputs: of the model.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> found = survey(model, lambda inputs: model(*inputs), (torch.zeros(2, 4),))
    >>> found.outputs, found.work
    ([Origin(exact=False, depth=1.0)], [Work(layer='0', path='0', macs=24, read=True, repeated=False)])
    """
    found = Survey(reproduced)
    found.fill(reference, run, inputs)
    return found


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows values through operations."""

    def __init__(self, multiplied: Callable[[int, list[Tensor], bool], None], reproduced: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplied, self.reproduced, self.flow = multiplied, reproduced, Flow()
        self._seen: set[int] = set()
        self._origins: dict[int, Origin] = {}
        self._varying: set[int] = set()
        self._alive: list[Any] = []  # keeps Python from giving an id to another tensor

    def origin(self, x: Tensor) -> Origin:
        """Where a value comes from; what was never seen is an input or a parameter."""
        return self._origins.get(id(x), Origin(True, 0.0))

    def restart(self, x: Tensor) -> None:
        """Verification looks at this value: what is computed of it is held against what the runtime made of its own."""
        self._alive.append(x)
        self._origins[id(x)] = Origin(False, 0.0)

    def watch(self, x: Any) -> None:
        """An input, whose changes are to be followed."""
        self._alive.append(x)
        self._varying.add(id(x))

    def varies(self, x: Tensor) -> bool:
        """Whether an input changes a value."""
        return id(x) in self._varying

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before, varies = [self.origin(x) for x in operands], any(self.varies(x) for x in operands)
        computation = self.flow.before(func, args, kwargs)
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.flow.after(computation, func, operands, tensors)
        macs = _macs(func, args, kwargs, result)
        exact = all(origin.exact for origin in before)
        depth = max((origin.depth for origin in before), default=0.0)
        name = func._overloadpacket.__name__
        if func.namespace == "isogrid":
            rounds = name.startswith("static_") and not self.reproduced
            depth, exact = float(rounds), exact and not rounds and name not in FLOAT_ISOGRID_OPERATIONS
        elif name not in EXACT_OPERATIONS:
            products = macs / max(1, tensors[0].numel()) if macs else 0.0
            counted = max(1.0, sqrt(products) / 16)
            if name in ANGLES:
                counted = max(counted, float(operands[0].abs().max()) / ROUNDINGS)
            depth, exact = depth * _growth(name, args, kwargs) + counted, False
        for tensor in tensors:
            self._alive.append(tensor)
            self._origins[id(tensor)] = Origin(exact, depth)
            if varies:
                self._varying.add(id(tensor))
        if macs:
            number = self.flow.number(tensors[0])
            self.multiplied(macs, tensors, number in self._seen)
            self._seen.add(number)
        return result


def _growth(name: str, args: Any, kwargs: Any) -> float:
    """By how much an operation makes relative errors of its operands larger: a softmax by its largest score, from 1."""
    if name in SOFTMAX:
        scores = args[0]
    elif name in ATTENTION:
        query, key = args[:2]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-2, -1) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
    else:
        return 1.0
    # Scores that a mask takes out are infinite, or as low as the dtype goes.
    return max(1.0, float(scores.masked_fill(scores < MASKED, 0).abs().max()))


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiplications with accumulation in a call."""
    name = func._overloadpacket.__name__
    if func.namespace == "isogrid":
        if name == "matmul_nbits":
            return int(result.numel() * args[1].shape[1] * args[6])
        if name.startswith("static_matmul"):
            return int(result.numel() * args[0].shape[-1])
        if name.startswith(("static_linear", "static_convolution")):
            return int(result.numel() * prod(args[3].shape[1:]))
    elif name == "mkldnn_rnn_layer":  # an LSTM on the CPU: its input, and the weights of input and state
        return int(args[0][..., 0].numel() * (args[1].numel() + args[2].numel()))
    elif name == "_scaled_dot_product_flash_attention_for_cpu":  # queries with keys, and what comes out with values
        query, key, value = args[:3]
        return int(query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    elif func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)) // 2
    return 0
