"""A compressed-tensors checkpoint at work: in transformers, which decompresses it by the package compressed-tensors."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Format, Quantized, named_format
from isogrid.planning.plan import LayerPlan, Plan, StatePlan
from isogrid.targets.checkpoints.loading import CheckpointModel, inside, is_stack, loading_quietly
from isogrid.targets.compressed_tensors.config import weight_arguments
from isogrid.targets.compressed_tensors.packing import layout_of
from isogrid.targets.compressed_tensors.states import NAMES


class CompressedModel(CheckpointModel):
    """A checkpoint for vLLM in transformers."""

    package = "compressed_tensors"

    @cached_property
    def model(self) -> Any:
        """The model of transformers.

        Where transformers does not read how weights are stored, the package decompresses each of them first.

        Raises:
            TargetError: transformers computes experts otherwise than vLLM does, or does not load the files.
        """
        if _leaves_cache_out(self.artifact.plan):
            raise TargetError(
                f"transformers cannot show what {self.artifact.path} computes: it makes no room for packed zero points "
                "or for the scales of experts beside a quantised key-value cache."
            )
        if not _is_decompressed_first(self.artifact.plan):
            return _keeping_dtype(super().model, self._config.dtype)
        options = {"config": self.float_config(), "state_dict": self._decompressed(), "dtype": self._config.dtype}
        with loading_quietly(self._library):
            model, report = self._kind.from_pretrained(None, **options, output_loading_info=True)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise ArtifactError(f"{self.artifact.path} has other tensors than the model: {report}. Export again.")
        return model.eval()

    def loading_options(self) -> dict[str, Any]:
        if any(layer.activation_rule is not None or layer.input is not None for layer in stacks(self.artifact.plan)):
            raise TargetError(
                f"transformers cannot show what {self.artifact.path} computes: it multiplies experts by float "
                "inputs, and vLLM by quantised ones."
            )
        if any(layer.activation_rule == "int8-token-cuda" for layer in self.artifact.plan.layers):
            raise TargetError(
                f"transformers cannot show what {self.artifact.path} computes: it rounds inputs on amax / 127.5, and "
                "vLLM's CUDA kernels, for which this was trained, on amax / 127. Scheme w8a8-dynamic trains the former."
            )
        inputs = {site.format for site in self.artifact.plan.sites if site.kind != "weight"}
        if "nvfp4-local" in inputs and self._config.dtype != torch.bfloat16:
            raise TargetError(
                f"transformers cannot show what {self.artifact.path} computes: it chooses the scales of NVFP4 inputs "
                f"in the model's dtype, {self._config.dtype}, and vLLM in bfloat16, for which this was trained. Call "
                "model.to(torch.bfloat16) before planning, or use scheme nvfp4a16, whose inputs are float."
            )
        if not _decompresses_at_once(self.artifact.plan):
            return {}
        return {"quantization_config": self._library.CompressedTensorsConfig(dequantize=True)}

    def _decompressed(self) -> dict[str, Tensor]:
        """The tensors of a float checkpoint: each weight as the package's own compressor for its layout has it."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        state = self.tensors()
        for prefix, layer in self.on_disk().items():
            fmt = named_format(self.artifact.plan.site(layer.weight).format)
            scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weight_arguments(fmt)))
            compressor = BaseCompressor.get_value_from_registry(layout_of(fmt, quantizes_input=False).name)
            own = {leaf: state.pop(f"{prefix}.{leaf}") for leaf in inside(state, prefix) if leaf != "bias"}
            state[f"{prefix}.weight"] = compressor.decompress(own, scheme)["weight"]
        return state

    def state_name(self, state: StatePlan) -> str:
        return f"{state.path}.{NAMES[state.kind]}"

    def unpack(self, layer: LayerPlan, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
        layout = layout_of(fmt, layer.activation_rule is not None or layer.input is not None)
        return layout.unpack(tensors, fmt, shape)


def _keeping_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model, which multiplies weights of 4 float bits in its own dtype.

    They are decompressed to bfloat16 on the first call. With 6 significant bits and a power of two, they are what they
    were.
    """

    def hook(module: nn.Module, _: Any) -> None:
        weight: Any = module.weight
        weight.data = weight.data.to(dtype)

    for module in model.modules():
        if "weight_packed" in module._parameters:
            module.register_forward_pre_hook(hook)
    return model


def _decompresses_at_once(plan: Plan) -> bool:
    """Whether weights are decompressed as they are read, which transformers can where all are stored in one way.

    On the first call, which is the default, compressed-tensors 0.20 makes no room for packed zero points, and models
    that look at their weights while these are loaded find none.
    """
    formats = {plan.site(layer.weight).format for layer in plan.layers}
    # Decompressed so, a model has no key-value cache to quantise: compressed-tensors prepares none.
    return not plan.states and len(formats) == 1 and all(layer.arithmetic == "weight_only" for layer in plan.layers)


def _is_decompressed_first(plan: Plan) -> bool:
    """Whether transformers 5.23 leaves out what weights need that are multiplied by float inputs.

    It does not read the zero points and global scales of experts, nor zero points where there are several formats.
    """
    formats = {layer.path: named_format(plan.site(layer.weight).format) for layer in plan.layers}
    zero_points = any(fmt.zero_point is not None for fmt in formats.values())
    experts = [formats[layer.path] for layer in stacks(plan)]
    nested = any(fmt.scale is not None and fmt.scale.scale is not None for fmt in experts)
    unread = nested or any(fmt.zero_point is not None for fmt in experts)
    several = len(set(map(str, formats.values()))) > 1
    floats = all(layer.arithmetic == "weight_only" for layer in plan.layers)
    return floats and (unread or (several and zero_points))


def _leaves_cache_out(plan: Plan) -> bool:
    """Whether weights have to be decompressed before or while they are read, so that no cache would be quantised."""
    formats = (named_format(plan.site(layer.weight).format) for layer in plan.layers)
    has_zero_points = any(fmt.zero_point is not None for fmt in formats)
    return bool(plan.states) and (has_zero_points or _is_decompressed_first(plan))


def stacks(plan: Plan) -> list[LayerPlan]:
    """The layers that are products of experts in stacks."""
    return [layer for layer in plan.layers if is_stack(layer)]
