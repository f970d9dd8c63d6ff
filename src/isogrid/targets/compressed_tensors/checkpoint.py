"""A compressed-tensors checkpoint at work: in transformers, which decompresses it by the package compressed-tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isogrid.errors import TargetError
from isogrid.formats import Format, Quantized, named_format
from isogrid.planning.plan import LayerPlan, Plan
from isogrid.targets.checkpoints.loading import CheckpointModel, is_stack
from isogrid.targets.compressed_tensors.packing import layout_of


class CompressedModel(CheckpointModel):
    """A checkpoint for vLLM in transformers."""

    package = "compressed_tensors"

    def loading_options(self) -> dict[str, Any]:
        if why := why_not_run(self.artifact.plan):
            raise TargetError(f"transformers cannot show what {self.artifact.path} computes: {why}.")
        if not _decompresses_at_once(self.artifact.plan):
            return {}
        return {"quantization_config": self._library.CompressedTensorsConfig(dequantize=True)}

    def unpack(self, layer: LayerPlan, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
        layout = layout_of(fmt, layer.activation_rule is not None or layer.input is not None)
        return layout.unpack(tensors, fmt, shape)


def _decompresses_at_once(plan: Plan) -> bool:
    """Whether weights are decompressed as they are read, which transformers can where all are stored in one way.

    On the first call, which is the default, compressed-tensors 0.20 makes no room for packed zero points, and models
    that look at their weights while these are loaded find none.
    """
    formats = {plan.site(layer.weight).format for layer in plan.layers}
    return len(formats) == 1 and all(layer.arithmetic == "weight_only" for layer in plan.layers)


def why_not_run(plan: Plan) -> str:
    """Why transformers 5.23 does not compute what a checkpoint says; empty where it does."""
    for layer in filter(is_stack, plan.layers):
        fmt = named_format(plan.site(layer.weight).format)
        if layer.activation_rule is not None or layer.input is not None:
            return "it multiplies experts by float inputs, and vLLM by quantised ones"
        if fmt.zero_point is not None or (fmt.scale is not None and fmt.scale.scale is not None):
            return f"it does not read the zero points and global scales of experts in {fmt}"
    return ""
