"""Teachers: the float model that a quantised student learns from, at the price of what differs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isogrid.errors import DistillationError
from isogrid.formats import Quantized, named_format
from isogrid.layers.adapters import Adapters
from isogrid.layers.coded import CodedLinear
from isogrid.planning.evaluating import evaluating
from isogrid.planning.state import STEP_NAME, is_prepared, quantizers
from isogrid.quantizers import Quantizer

Teacher = Callable[..., Any]
"""Called with a model's inputs; gives outputs as the model does, without a gradient."""

TEACHES = "isogrid_teaches"
"""The attribute of a prepared model that is true while it runs as its own teacher."""


def teacher(
    model: nn.Module,
    *,
    weights: Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    format: str | None = None,
) -> Teacher:
    """A model's teacher: of a prepared model itself, as it is now and in float; any other model as it is.

    The teacher of a prepared model runs the student's own modules, with the quantisers off, in evaluation mode and
    without gradients. Only tensors that training changes are kept a second time: parameters that require a gradient
    now, and buffers such as batch norm's. Frozen ones are the student's, so freeze first. Where scales alone train,
    nothing is kept, and with adapters the adapters.

    Args:
        model: the prepared student, before its first step; or another model, with the same classes.
        weights: the float weights by their names, where the student has been trained already, as in a resumed run.
            Adapters that they do not hold are off while the teacher runs.
        device: where the kept tensors rest between calls; on the student's own device where not given. They come to
            the student's for a call, so call the teacher before the student: there is no graph then that needs memory.
        format: in which kept weights rest, such as `int8/channel`; exact where not given. The teacher then is the float
            model rounded to it.

    Returns:
        A function of the model's inputs.

    Raises:
        DistillationError: a weight is kept as codes (`freeze_codes`); weights lack a tensor that the student trains, or
            have it in another shape; or another model was given weights, a device or a format, which it brings itself.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> x = torch.ones(1, 4)
    >>> expected = model(x)
    >>> plan = ig.plan(model, scheme="w4a8", example_inputs=(x,))
    >>> guide = teacher(ig.calibrate(ig.prepare(model, plan), [x]))
    >>> bool((guide(x) == expected).all()), bool((model(x) == expected).all())
    (True, False)
    """
    if not is_prepared(model):
        if weights is not None or device is not None or format is not None:
            raise DistillationError(
                "weights, device and format say how the teacher of a prepared model is kept. Another model brings its "
                "own weights: move or load it before."
            )
        return OtherTeacher(model)
    return SelfTeacher(model, weights, None if device is None else torch.device(device), format)


class OtherTeacher:
    """Another model as a teacher; see `teacher`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by their names."""
        return dict(self.model.state_dict())

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        with torch.no_grad(), evaluating(self.model):
            return self.model(*inputs, **named)


class SelfTeacher:
    """A prepared model as its own teacher; see `teacher`.

    Attributes:
        running: whether the model's modules run for the teacher right now.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor] | None, device: torch.device | None, format: str | None
    ):
        self.model, self.running = model, False
        self._check_floats()
        self._off = {} if weights is None else _adapters_without(model, weights)
        self._kept = {
            name: _resting(_original(name, tensor, weights), device, format)
            for name, tensor in moving(model).items()
            if not name.startswith(tuple(self._off))
        }

    @property
    def kept_bytes(self) -> int:
        """Of the tensors that the teacher does not share with the student."""
        return sum(part.numel() * part.element_size() for kept in self._kept.values() for part in _parts(kept))

    def weights(self) -> dict[str, Tensor]:
        """The teacher's tensors by their names, those that it shares among them."""
        own = (*(f"{path}." for path in quantizers(self.model)), *self._off)
        state = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(own)}
        state.pop(STEP_NAME)
        kept = {name: kept if isinstance(kept, Tensor) else kept.dequantize() for name, kept in self._kept.items()}
        return {name: kept.get(name, tensor) for name, tensor in state.items()}

    def _check_floats(self) -> None:
        """Raise DistillationError where a weight is kept as codes alone."""
        for name, module in self.model.named_modules():
            if isinstance(module, CodedLinear):
                raise DistillationError(
                    f"{name} is kept as codes, so that its float weight is gone and the model cannot be its own "
                    "teacher. Store the teacher's top classes before, or let another model teach."
                )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self._check_floats()
        current = moving(self.model, self._kept.keys())
        tensors = {name: _awake(kept, current[name]) for name, kept in self._kept.items()}
        self.running = True
        object.__setattr__(self.model, TEACHES, True)
        try:
            with torch.no_grad(), evaluating(self.model), in_float(self.model), _without(self._off.values()):
                return functional_call(self.model, tensors, inputs, named)
        finally:
            self.running = False
            object.__setattr__(self.model, TEACHES, False)


def moving(model: nn.Module, names: Any = None) -> dict[str, Tensor]:
    """What training changes of a prepared model, but for its quantisers: what trains, float buffers, and counters.

    A batch norm's counter decides nothing in evaluation, but a teacher that moved with the student's would have another
    digest after a resume.

    Args:
        model: prepared.
        names: the tensors of these names instead.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if names is not None:
        return {name: tensors[name] for name in names}
    own = tuple(f"{path}." for path in quantizers(model))
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (tensor.requires_grad or (not isinstance(tensor, nn.Parameter) and _moves(tensor)))
        and not name.startswith(own)
    }


def _moves(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.dim() == 0


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """While open, the quantisers of a prepared model let everything pass."""
    found: list[Quantizer] = list(quantizers(model).values())
    enabled = [quantizer.enabled for quantizer in found]
    for quantizer in found:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, was in zip(found, enabled, strict=True):
            quantizer.enabled = was


def _adapters_without(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Adapters]:
    """Adapters by the beginning of their tensors' names, of which there are none among the weights."""
    found = {f"{path}.": module for path, module in model.named_modules() if isinstance(module, Adapters)}
    return {start: module for start, module in found.items() if not any(name.startswith(start) for name in weights)}


@contextmanager
def _without(off: Iterable[Adapters]) -> Iterator[None]:
    """While open, these adapters add nothing."""
    active = {module: module.active for module in off}
    for module in active:
        module.active = ()
    try:
        yield
    finally:
        for module, names in active.items():
            module.active = names


def _original(name: str, tensor: Tensor, weights: Mapping[str, Tensor] | None) -> Tensor:
    """A tensor of the student as it was in float; buffers that the weights do not hold are not saved in any case."""
    if weights is None or (name not in weights and not isinstance(tensor, nn.Parameter)):
        return tensor
    if name not in weights or weights[name].shape != tensor.shape:
        found = f"has shape {list(weights[name].shape)}" if name in weights else "is not among the weights"
        raise DistillationError(
            f"The student trains {name}, {list(tensor.shape)}, and for its teacher it {found}. Pass the state_dict of "
            "the float model that the student was prepared from."
        )
    return weights[name].to(tensor.dtype)


def _resting(tensor: Tensor, device: torch.device | None, format: str | None) -> Tensor | Quantized:
    own = tensor.detach().to(tensor.device if device is None else device, copy=True)
    return own if format is None or own.dim() < 2 else named_format(format).quantize(own.float())


def _parts(kept: Tensor | Quantized) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    return [kept.codes, *(part for part in kept.affine if part is not None)]


def _awake(kept: Tensor | Quantized, like: Tensor) -> Tensor:
    return (kept if isinstance(kept, Tensor) else kept.dequantize()).to(like.device, like.dtype)
