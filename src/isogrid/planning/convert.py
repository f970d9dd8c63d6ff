"""Convert: the model that computes as the runtime does, in plain PyTorch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from isogrid.errors import NonFiniteError, NotCalibratedError
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.layers.borrowed import TakenApart
from isogrid.layers.integer import IntegerModule
from isogrid.layers.weights import computed_by, refresh_weights
from isogrid.planning.state import prepared_state, quantizers


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared model with integer layers: codes, scales and the runtime's arithmetic.

    It is the reference that a runtime is held against, and what is exported. The prepared model stays as it is.

    Args:
        model: prepared and calibrated.

    Raises:
        PlanError: the model is not prepared.
        NotCalibratedError: a quantizer has no range; it is named.
        NonFiniteError: a weight or scale holds NaN or infinity; it is named.
    """
    kernels: Any = prepared_state(model).plan.kernels
    for name, quantizer in quantizers(model).items():
        if not quantizer.is_calibrated:
            raise NotCalibratedError(f"{name} has no range. Run isogrid.calibrate(model, batches) before converting.")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(
                f"{name} holds NaN or infinity, so there is nothing to convert. Go back to a checkpoint."
            )
    refresh_weights(model)
    integer = copy.deepcopy(model).eval()
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(integer.modules()):
        borrowed = parent.borrowed if isinstance(parent, TakenApart) else set()
        for name, child in list(parent._modules.items()):
            if child is not None and (hasattr(child, "to_integer") or isinstance(child, AbsorbedBatchNorm)):
                if child not in made:
                    made[child] = _twin(child)
                    if isinstance(made[child], IntegerModule):
                        made[child].kernels = kernels
                parent._modules[name] = made[child]
        if isinstance(parent, TakenApart):
            parent.forget(borrowed)
    return integer.requires_grad_(False).eval()


def _twin(module: nn.Module) -> nn.Module:
    if not hasattr(module, "to_integer"):
        return nn.Identity()
    prepared: Any = module
    twin: nn.Module = prepared.to_integer()
    for name, value in vars(module).items():
        is_hook = name.startswith(("_forward_hooks", "_forward_pre_hooks"))
        is_plain = not name.startswith("_") and not hasattr(twin, name) and not isinstance(value, nn.Module)
        # A user's hooks go along, and attributes such as out_features, which a forward may read.
        if is_hook or is_plain:
            setattr(twin, name, value)
    for number, hook in list(twin._forward_pre_hooks.items()):
        if computed_by(hook):  # the weight of the twin is computed for good
            del twin._forward_pre_hooks[number]
    return twin


@contextmanager
def watched(integer_model: nn.Module, watch: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While open, a converted model shows the codes of every quantised tensor to `watch`, which may replace them.

    Args:
        integer_model: of `convert`.
        watch: called with the site's name, as exported graphs have it, and the codes; returns the codes to go on with.
    """
    modules = {module: name for name, module in integer_model.named_modules() if isinstance(module, IntegerModule)}
    for module, path in modules.items():
        module.watch = partial(_prefixed, watch, path)
    try:
        yield
    finally:
        for module in modules:
            module.watch = None


def _prefixed(watch: Callable[[str, Tensor], Tensor], path: str, name: str, codes: Tensor) -> Tensor:
    return watch(f"{path}.{name}", codes)
