"""Adapters become part of the weights."""

import torch
from torch import nn

from isogrid.errors import PlanError
from isogrid.layers.adapters import ATTRIBUTE, adapters_of
from isogrid.layers.coded import CodedLinear, decoded
from isogrid.layers.weights import base_of, computes_weight, weight_of
from isogrid.planning.exchange import exchange
from isogrid.planning.state import prepared_state
from isogrid.training.adapters import adaptable, set_specs


def merge_adapters(model: nn.Module) -> nn.Module:
    """Write the active adapters into the weights and remove all of them; in place, and returned.

    By the methods `l4q` and `qa-lora` codes and scales are those that were trained; `convert` and `export` need no such
    call, for they see the merged weight anyway. By `qlora` the sum is quantised anew, with the range that fits it, and
    the model is another one than was trained: `isogrid.merge_difference` says by how much. `isogrid.verify` notes it.

    Args:
        model: prepared, with adapters.

    Raises:
        PlanError: the model has no adapters, or a weight is computed, so that nothing can be written.

    >>> import isogrid as ig
    >>> model = nn.Sequential(nn.Linear(32, 32))
    >>> plan = ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 32),))
    >>> _ = ig.add_adapters(ig.prepare(model, plan), rank=2)
    >>> hasattr(merge_adapters(model)[0], "adapters")
    False
    """
    if not prepared_state(model).adapters:
        raise PlanError("There are no adapters to merge. Add some with isogrid.add_adapters(model, rank=16).")
    layers = {path: layer for path, layer in adaptable(model).items() if adapters_of(layer) is not None}
    _check_writable(model, layers)
    with torch.no_grad():
        merged = {id(adapters_of(layer)): layer for layer in layers.values()}
        made = {layer: new for layer in merged.values() if (new := _merged(layer)) is not layer}
    for layer in (*layers.values(), *made.values()):
        layer.__dict__.pop(ATTRIBUTE, None)
        layer._modules.pop(ATTRIBUTE, None)
    exchange(model, made)
    anew = tuple(spec.name for spec in prepared_state(model).adapters if spec.active and spec.method == "qlora")
    set_specs(model, (), anew)
    return model


def _check_writable(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    stored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for path, layer in layers.items():
        if isinstance(layer, CodedLinear):
            continue
        if computes_weight(layer) or base_of(layer).untyped_storage().data_ptr() not in stored:
            raise PlanError(f"The weight of {path!r} is computed, so nothing can be written into it. Use convert.")


def _merged(layer: nn.Module) -> nn.Module:
    """The layer without adapters that computes what it does with them, in its place or as a new one."""
    if not isinstance(layer, CodedLinear):
        base_of(layer).copy_(weight_of(layer))
        return layer
    adapters = adapters_of(layer)
    assert adapters is not None
    if adapters.stands_beside:
        return decoded(layer, weight_of(layer))
    quantizer, affine = layer.weight_quantizer, layer.affine()
    for target, part in ((quantizer.zero_point, affine.zero_point), (quantizer.offset, affine.offset)):
        if target is not None and part is not None:
            target.copy_(part)
    return layer
