"""A quantised checkpoint as the start of training: its codes, scales and zero points in a prepared model."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import CheckpointError, PlanError
from isogrid.formats import Quantized
from isogrid.planning.plan import LayerPlan
from isogrid.planning.state import prepared_state
from isogrid.targets.checkpoints.integers import SUFFIXES, Integers, integers_in
from isogrid.targets.checkpoints.rows import Rows, assembled, converted, weight_name
from isogrid.targets.recovery import checkpoint_tensors


@torch.no_grad()
def adopt_checkpoint(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Give a prepared model the codes, scales and zero points of a checkpoint of AWQ, GPTQ or compressed-tensors.

    Works in place and returns the model. What the checkpoint keeps in float (embeddings, norms, biases, heads) is taken
    over too, so that the model computes what the checkpoint says; layers that the plan keeps in float get the
    decompressed weights. Training goes on from there, and an export at once has the same codes.

    Args:
        model: prepared, float or of transformers; its formats must be those of the checkpoint.
        checkpoint: a folder with config.json, whose `quantization_config` says how it was quantised, and safetensors.

    Raises:
        CheckpointError: a file is missing or corrupt, the layout is not known, groups are of columns that lie apart
            (GPTQ's desc_act), or a tensor of the model is in no file.
        PlanError: the model is not prepared, or plans another format than the checkpoint has; the message has the rule.
    """
    plan = prepared_state(model).plan
    folder = Path(checkpoint)
    config, tensors = _quantization(folder), dict(checkpoint_tensors(folder))
    found = dict(integers_in(tensors, config))
    if not found:
        raise CheckpointError(f"{folder} holds no quantised weight. Load it as any float checkpoint.")
    layers = {weight_name(layer.path): layer for layer in plan.layers}
    weights = {name: _weight(model, layer) for name, layer in layers.items()}
    parts: dict[str, list[tuple[Tensor, Quantized]]] = {name: [] for name in layers}
    for prefix, (source, rows) in _rows(model, {name: tuple(w.shape[:-1]) for name, w in weights.items()}).items():
        parts[source].append((rows, _in_format(model, layers[source], prefix, found.get(prefix))))
    _load_floats(model, _decompressed(tensors, found))
    for name, layer in layers.items():
        whole = weights[name]
        quantized = assembled(parts[name], (whole.numel() // whole.shape[-1], whole.shape[-1]))
        module: Any = model.get_submodule(layer.path)
        module.weight_quantizer.start(module.operands()[0], quantized.affine)
        if not torch.equal(module.quantized_weight().codes.reshape(quantized.shape), quantized.codes):
            raise CheckpointError(
                f"{layer.path} does not keep the codes of the checkpoint: a learned scale or the dtype of the model "
                f"({whole.dtype}) cannot hold them. Prepare the model in float32."
            )
    return model


def _quantization(folder: Path) -> dict[str, Any]:
    """How the checkpoint was quantised: of config.json, or of the file that AutoGPTQ wrote beside it."""
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        try:
            data = json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise CheckpointError(f"{folder / name} is corrupt: {error}. Copy it anew.") from error
        if key is None:
            return {"quant_method": "gptq", **data}
        if isinstance(data.get(key), dict):
            return dict(data[key])
    raise CheckpointError(f"{folder} does not say how it was quantised: config.json has no quantization_config.")


def _weight(model: nn.Module, layer: LayerPlan) -> Tensor:
    """[out, in], or [experts, out, in]."""
    name = weight_name(layer.path)
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise PlanError(f"{layer.path!r} has no weight of its own, which a checkpoint could fill.") from None


def _rows(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Rows:
    """Which rows of which weight lie under which name on disk."""
    if hasattr(model, "config"):
        return converted(model, {}, shapes).rows
    return {name.removesuffix(".weight"): (name, torch.arange(torch.Size(s).numel())) for name, s in shapes.items()}


def _in_format(model: nn.Module, layer: LayerPlan, prefix: str, integers: Integers | None) -> Quantized:
    if integers is None:
        raise PlanError(
            f"The checkpoint keeps {prefix} in float, and the plan quantises it. Plan with "
            f"Rule(match={layer.path!r}, keep='float')."
        )
    module: Any = model.get_submodule(layer.path)
    planned = module.weight_quantizer.format
    quantized = integers.quantized(planned)
    if quantized is None:
        raise PlanError(
            f"The checkpoint has {prefix} in {integers.format_name}, and {layer.path!r} is planned in {planned}. Plan "
            f"with Rule(match={layer.path!r}, weight={integers.format_name!r}), or match='*' for all layers."
        )
    return quantized


def _decompressed(tensors: Mapping[str, Tensor], found: Mapping[str, Integers]) -> dict[str, Tensor]:
    """The checkpoint as one of floats, by its own names."""
    owned = {f"{layer}.{leaf}" for layer in found for leaf in (*SUFFIXES, "weight")}
    plain = {name: tensor for name, tensor in tensors.items() if name not in owned}
    return plain | {f"{layer}.weight": integers.values() for layer, integers in found.items()}


def _load_floats(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the float parameters and buffers; those of quantizers are none of the checkpoint's."""
    library_model: Any = model
    missing: list[str] = []
    if hasattr(model, "config") and hasattr(model, "from_pretrained"):
        config = copy.deepcopy(library_model.config)
        kind: Any = type(model)
        loaded, report = kind.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=library_model.dtype, output_loading_info=True
        )
        missing = [*report["missing_keys"], *report["unexpected_keys"]]
        state = loaded.state_dict()
    own = model.state_dict()
    missing += [name for name in state if name not in own]
    missing += [name for name, _ in _float_parameters(model) if name not in state]
    if missing:
        raise CheckpointError(
            f"The checkpoint and the model do not have the same tensors: {', '.join(sorted(set(missing))[:5])}. Is it "
            "one of this architecture?"
        )
    model.load_state_dict(state, strict=False)


def _float_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if "_quantizer." not in name]
