"""The quantizer: format + range + estimator, with the state that training changes."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isogrid.errors import NotCalibratedError, PlanError
from isogrid.formats import Affine, Format, PerHead, Quantized
from isogrid.formats.granularity import Shape, blocks
from isogrid.quantizers.estimators import Estimator
from isogrid.quantizers.functional import Operand, fake_quantize, initial_tensors
from isogrid.quantizers.head_observer import HeadObserver
from isogrid.quantizers.nested import is_nested, refined
from isogrid.quantizers.observer import Observer
from isogrid.quantizers.ranges import Range
from isogrid.quantizers.sources import Made, make

ScaleRule = Literal["learned", "frozen", "moving", "dynamic"]
"""How a scale lives: a parameter; fixed once calibrated; a moving average of what passes; new from each tensor."""

SMALLEST_SHARE = 2.0**-10
"""A learned scale is never taken for less than this share of what it started from."""


class Quantizer(nn.Module):
    """A format with a chosen scale, as a module that trains.

    Args:
        fmt: what can be stored.
        shape: of the tensor it quantises; for activations of any shape `(1,)`, with a per-tensor format. Where heads
            have scales of their own, [..., heads, tokens, size] of one example.
        range: how the scale is chosen from data.
        estimator: what gradient passes the rounding.
        scale_rule: `learned`, `frozen`, `moving` or `dynamic`.
        observes: whether the range is taken from what flows through (activations) or fitted to one tensor (weights).

    Attributes:
        raw_scale: float32 in the format's scale shape; a parameter when learned. Read `scale` instead.
        zero_point, offset: float32 in the same shape, where the format has them; parameters when learned and the
            estimator gives them a gradient, else buffers.
        tensors: module with the estimator's own tensors, parameters where it learns them, else buffers.
        calibrated: bool buffer [1].
        strength: float32 buffer [1]: how much of the quantisation error is applied, 1 outside a ramp.
        enabled, observing, ramping, range_is_frozen: what the next forward does; the schedule sets them.

    Everything is created here, at least one-dimensional, and found by optimizers, checkpoints and FSDP2. It stays
    float32 where the model is cast to half precision.

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers import LSQ, AbsMax
    >>> weight = torch.tensor([[0.4, -1.0], [7.0, 3.0]])
    >>> quantizer = Quantizer(named_format("int4/channel"), (2, 2), AbsMax(), LSQ(), "learned")
    >>> quantizer.fit(weight)
    >>> quantizer(weight)
    tensor([[ 0.4286, -1.0000],
            [ 7.0000,  3.0000]], grad_fn=<_FakeQuantizeBackward>)
    """

    raw_scale: Tensor
    starting_scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None
    calibrated: Tensor
    strength: Tensor

    def __init__(
        self,
        fmt: Format,
        shape: Shape,
        range: Range,
        estimator: Estimator,
        scale_rule: ScaleRule = "frozen",
        observes: bool = False,
    ):
        super().__init__()
        if scale_rule == "learned" and "scale" not in estimator.learns:
            raise PlanError(f"{type(estimator).__name__} gives the scale no gradient. Use the estimator 'lsq'.")
        if scale_rule in ("learned", "moving") and fmt.scale is None:
            raise PlanError(f"{fmt} has no scale that could be {scale_rule}.")
        self.format, self.range, self.estimator, self.scale_rule = fmt, range, estimator, scale_rule
        scale_shape = fmt.scale_shape(shape)
        learned = estimator.learns if scale_rule == "learned" else frozenset()
        _register(self, "raw_scale", torch.ones(scale_shape), "scale" in learned)
        _register(self, "zero_point", torch.zeros(scale_shape) if fmt.zero_point else None, "zero_point" in learned)
        _register(self, "offset", torch.zeros(scale_shape) if fmt.offset else None, "offset" in learned)
        self.register_buffer("starting_scale", torch.ones(scale_shape))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("strength", torch.ones(1))
        self.tensors = nn.Module()
        for name, tensor in estimator.tensors(fmt, shape).items():
            _register(self.tensors, name, tensor, name in estimator.learns)
        self.observer = _observer(fmt, scale_shape, range) if observes and scale_rule != "dynamic" else None
        self.enabled, self.observing, self.ramping, self.range_is_frozen = True, False, False, False
        self._is_calibrated = scale_rule == "dynamic" or fmt.scale is None

    @property
    def scale(self) -> Tensor:
        """The scale in use, float32: a learned one keeps its sign, and more than a small share of its start.

        It is positive, but for block formats whose scales have a sign.
        """
        if self.scale_rule != "learned":
            return self.raw_scale
        return _floor(_whole(self.raw_scale).to(torch.float32), self.starting_scale * SMALLEST_SHARE)

    @property
    def is_calibrated(self) -> bool:
        """Whether a range has been set; dynamic quantizers need none."""
        return self._is_calibrated

    def forward(self, x: Tensor, made: Made | None = None) -> Tensor:
        """x [...], or what is made of it, as the runtime reads it after storage, in x's dtype.

        While not enabled, as it is.
        """
        self.observe(x)
        operand = self.operand(x, made=made)
        if operand is None:
            return x if made is None else make(x, made)
        return fake_quantize(x, operand)

    def observed_operand(self, x: Tensor) -> Operand | None:
        """How x is quantised, after the range has followed it."""
        self.observe(x)
        return self.operand(x)

    def operand(self, x: Tensor, on_grid: bool = False, made: Made | None = None) -> Operand | None:
        """How x is quantised now; None while not enabled.

        Args:
            x: the tensor to be quantised; dynamic quantizers read it.
            on_grid: x already lies on this quantizer's grid.
            made: what is quantised in the place of x is computed from it.

        Raises:
            NotCalibratedError: enabled, but without a range.
        """
        if not self.enabled:
            return None
        if not self._is_calibrated:
            raise NotCalibratedError(
                "A quantizer has seen no data. Run isogrid.calibrate(model, batches) before training or evaluation, "
                "or let a Schedule with an observe phase do it."
            )
        affine = self.affine(made.of(x) if made is not None and self.scale_rule == "dynamic" else x)
        return Operand(self.format, self.estimator, affine, self._tensors(x), self.strength_now, on_grid, made=made)

    @property
    def strength_now(self) -> Tensor | None:
        """`strength` in a ramp; None, which stands for 1, outside."""
        return self.strength if self.ramping else None

    @property
    def follows(self) -> bool:
        """Whether the range moves with what flows through at this moment."""
        return self.scale_rule == "moving" and self.training and self.enabled and not self.range_is_frozen

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """In training, let the observer see a tensor while observing, and a moving range follow it."""
        if self.observer is None:
            return
        if (self.observing and self.training) or self.follows:
            self.observer.observe(x)
        if self.follows:
            self.set_affine(self.observer.affine(self.format, self.range))

    def affine(self, x: Tensor | None = None) -> Affine:
        """Scale, zero point and offset in use; a dynamic quantizer derives them from x."""
        if self.scale_rule == "dynamic":
            if x is None:
                raise NotCalibratedError("A dynamic quantizer derives its scale from the tensor it quantises.")
            with torch.no_grad():
                return self._fitted(x)
        if self.format.scale is None:
            return Affine(None)
        affine = Affine(self.scale, self.zero_point, self.offset)
        if self.scale_rule == "moving":
            # Another tensor on the same grid may move it before backward needs what this one was quantised by.
            return Affine(*[None if part is None else part.clone() for part in affine])
        if not self.range_is_frozen:
            return affine
        return Affine(*[None if part is None else part.detach() for part in affine])

    def stored(self) -> Affine:
        """Scale, zero point and offset as the artefact stores them, float32, detached."""
        with torch.no_grad():
            return self.format.stored(self.affine())

    def quantize(self, x: Tensor) -> Quantized:
        """The codes of x, exactly those that forward used."""
        if not self._is_calibrated:
            raise NotCalibratedError("A quantizer without a range has no codes. Run isogrid.calibrate(model, batches).")
        with torch.no_grad():
            affine = self.affine(x)
            if not self.estimator.rounds_to_nearest:
                # Rounded already, by a rule of the estimator's own: the nearest value of the grid is the value itself.
                x = fake_quantize(x, Operand(self.format, self.estimator, affine, self._tensors(x)))
            return self.format.quantize(x, *affine)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Choose the range from one tensor, a weight."""
        derived = self.scale_rule == "dynamic" or self.format.scale is None
        self.start(x, Affine(None) if derived else self._fitted(x))

    @torch.no_grad()
    def start(self, x: Tensor, affine: Affine) -> None:
        """Begin to train on one tensor, a weight, with a given scale, zero point and offset."""
        if affine.scale is not None:
            self.set_affine(affine)
        operand = Operand(self.format, self.estimator, self.affine(x), self._tensors(x))
        for name, value in initial_tensors(x, operand).items():
            _assign(operand.tensors[name], value)

    @torch.no_grad()
    def fit_observed(self) -> None:
        """Choose the range from what the observers of all ranks have seen; raises NotCalibratedError if nothing."""
        if self.observer is not None and self.format.scale is not None:
            self.observer.synchronize()
            self.set_affine(self.observer.affine(self.format, self.range))

    @torch.no_grad()
    def set_affine(self, affine: Affine) -> None:
        """Take over scale, zero point and offset; they count as calibrated from here on."""
        targets = (self.raw_scale, self.zero_point, self.offset)
        for target, part in zip(targets, affine, strict=True):
            if target is not None and part is not None:
                _assign(target, part)
        if affine.scale is not None:
            _assign(self.starting_scale, affine.scale)
        self.calibrated.fill_(True)
        self._is_calibrated = True

    def extra_repr(self) -> str:
        return f"{self.format}, {self.scale_rule}"

    def _fitted(self, x: Tensor) -> Affine:
        scale_shape = self.format.scale_shape(tuple(x.shape))
        arranged = self.format.granularity.arrange(x.detach()).to(torch.float32)
        affine = self.range.fit(blocks(arranged, scale_shape), self.format).reshape(scale_shape)
        return refined(arranged, self.format, affine) if self.range.refines and is_nested(self.format) else affine

    def _tensors(self, x: Tensor) -> dict[str, Tensor]:
        own = dict(self.tensors.named_parameters()) | dict(self.tensors.named_buffers())
        return own | self.estimator.draw(x) if self.training else own

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}calibrated" in state_dict:
            self.take_over()

    def take_over(self) -> None:
        """Count as calibrated where the tensors that were put in place of the own ones say so."""
        self._is_calibrated = self._is_calibrated or bool(self.calibrated.all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        """Follow the model to another device, but keep float32 where it is cast to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class _Floor(torch.autograd.Function):
    """Values kept above a floor, or below a negative one, with the gradient passing, so that a scale can climb back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: Tensor) -> Tensor:
        return torch.where(floor < 0, torch.minimum(x, floor), torch.maximum(x, floor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


_floor: Callable[..., Tensor] = _Floor.apply


def _observer(fmt: Format, scale_shape: Shape, range: Range) -> Observer | HeadObserver:
    """Of one scale for all that flows through, or of one for each head."""
    of_heads = isinstance(fmt.granularity, PerHead)
    return HeadObserver(scale_shape[-3], range) if of_heads else Observer.for_range(range)


def _register(module: nn.Module, name: str, tensor: Tensor | None, learned: bool) -> None:
    if learned and tensor is not None:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have sharded: a grid may be read by layers of another unit than its owner's."""
    sharded: Any = tensor
    return sharded.full_tensor() if _is_sharded(tensor) else tensor


def _assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    value = value.reshape(target.shape).to(target.dtype)
    if _is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    target.copy_(value)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without the import of torch.distributed.tensor, which takes as long as torch's."""
    return hasattr(tensor, "full_tensor")
