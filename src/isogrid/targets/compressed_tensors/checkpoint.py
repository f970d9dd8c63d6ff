"""A compressed-tensors checkpoint at work: in transformers, which decompresses it by the package compressed-tensors."""

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import ArtifactError, MissingExtraError, TargetError
from isogrid.formats import Quantized, named_format
from isogrid.layers.stored import parts_of
from isogrid.planning.plan import LayerPlan, Plan
from isogrid.planning.values import tensors_in
from isogrid.targets.artifact import Artifact
from isogrid.targets.compressed_tensors.packing import layout_of
from isogrid.targets.compressed_tensors.rows import assembled, converted
from isogrid.targets.runtime import Observed, RuntimeOperator

Part = tuple[Tensor, Mapping[str, Tensor]]
"""Numbers of rows of a weight, and the tensors that these are stored in."""

STACKS = {
    "gate_up_projection": "gate_up_proj",
    "up_projection": "up_proj",
    "down_projection": "down_proj",
}
"""The parameters that experts are stacked in, by the layers that read them."""


class CompressedModel:
    """A checkpoint loaded by `AutoModel.from_pretrained`.

    Args:
        artifact: a folder.

    Raises:
        MissingExtraError: transformers or compressed-tensors is not installed.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self._library = _transformers()
        self._config = self._library.AutoConfig.from_pretrained(artifact.path)
        self._kind = getattr(self._library, self._config.architectures[0])

    @cached_property
    def model(self) -> Any:
        """The model of transformers.

        Raises:
            TargetError: transformers computes experts otherwise than vLLM does, or does not load the files.
        """
        if why := why_not_run(self.artifact.plan):
            raise TargetError(f"transformers cannot show what {self.artifact.path} computes: {why}.")
        options: dict[str, Any] = {"dtype": self._config.dtype}
        if _decompresses_at_once(self.artifact.plan):
            options["quantization_config"] = self._library.CompressedTensorsConfig(dequantize=True)
        try:
            return self._kind.from_pretrained(self.artifact.path, **options).eval()
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise TargetError(f"transformers does not load {self.artifact.path}: {error}") from error

    @cached_property
    def _empty(self) -> Any:
        """The float model without values, whose tensors transformers names as in any checkpoint."""
        config = copy.deepcopy(self._config)
        del config.quantization_config
        with torch.device("meta"):
            return self._kind(config)

    @property
    def input_names(self) -> list[str]:
        """The arguments that it takes, in order."""
        return [spec.name for spec in self.artifact.plan.inputs]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The model's outputs."""
        positional, named = self.artifact.plan.arguments.filled(inputs)
        with torch.no_grad():
            return tensors_in(self.model(*positional, **named))

    def observe(self, *inputs: Tensor) -> Observed:
        """Run with the input and the output of every quantised Linear in view; those of experts are none."""
        layers: dict[str, tuple[Tensor, Tensor]] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                layers[path] = (args[0], output)

            return hook

        hooks = [
            self.model.get_submodule(layer.path).register_forward_hook(note(layer.path))
            for layer in self.artifact.plan.layers
            if not is_stack(layer)
        ]
        try:
            outputs = self(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return Observed(outputs, {}, layers)

    def stored(self) -> Mapping[str, Tensor]:
        """Codes and scales in the files, unpacked, as `isogrid.convert` names them.

        Raises:
            ArtifactError: a file is truncated, or lacks a tensor of the plan.
        """
        found: dict[str, Tensor] = {}
        for layer, tensors in self._layers():
            quantized = self._unpacked(layer, tensors)
            found[f"{layer.path}.weight"] = quantized.codes
            for part, codes in parts_of(quantized):
                found[f"{layer.path}.{'_'.join(('weight', *part))}"] = codes
            if layer.input is not None:
                found[f"{layer.path}.input.scale"] = tensors[0][1]["input_scale"].float()
        return found

    def quantized(self) -> dict[str, Quantized]:
        """The weight of each quantised layer by its path, as it is stored; see `stored` for errors."""
        return {layer.path: self._unpacked(layer, tensors) for layer, tensors in self._layers()}

    def _layers(self) -> Iterator[tuple[LayerPlan, list[Part]]]:
        """Each quantised layer with the parts that it is stored in."""
        tensors = _tensors(self.artifact)
        layers = {_weight_name(layer): layer for layer in self.artifact.plan.layers}
        shapes = {name: self._shape(layer)[:-1] for name, layer in layers.items()}
        by_prefix: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            prefix, _, leaf = name.rpartition(".")
            by_prefix.setdefault(prefix, {})[leaf] = tensor
        parts: dict[str, list[Part]] = {}
        for prefix, (source, rows) in converted(self._empty, {}, shapes).rows.items():
            parts.setdefault(source, []).append((rows, by_prefix.get(prefix, {})))
        for name, layer in layers.items():
            yield layer, parts[name]

    def _unpacked(self, layer: LayerPlan, parts: list[Part]) -> Quantized:
        fmt = named_format(self.artifact.plan.site(layer.weight).format)
        layout = layout_of(fmt, layer.activation_rule is not None or layer.input is not None)
        *rows, columns = self._shape(layer)
        try:
            found = [(numbers, layout.unpack(own, fmt, (len(numbers), columns))) for numbers, own in parts]
        except KeyError as error:
            raise ArtifactError(
                f"{self.artifact.path} has no {error.args[0]} for {layer.path}. Copy it anew, or export again."
            ) from error
        return assembled(found, (prod(rows), columns))

    def multiplications(self) -> tuple[RuntimeOperator, ...]:
        """Every quantised layer: its weight is decompressed and multiplied in float."""
        return tuple(
            RuntimeOperator(layer.path, "experts" if is_stack(layer) else "Linear", "float")
            for layer in self.artifact.plan.layers
        )

    def producers(self) -> Mapping[str, RuntimeOperator]:
        """None: no activation is stored as codes."""
        return {}

    def _shape(self, layer: LayerPlan) -> tuple[int, ...]:
        """[out, in], or [experts, out, in]."""
        return tuple(self._empty.get_parameter(_weight_name(layer)).shape)


def is_stack(layer: LayerPlan) -> bool:
    """Whether a layer of a plan is one product of all experts."""
    return layer.path.rpartition(".")[2] in STACKS


def _weight_name(layer: LayerPlan) -> str:
    parent, _, leaf = layer.path.rpartition(".")
    return f"{parent}.{STACKS[leaf]}" if leaf in STACKS else f"{layer.path}.weight"


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


def _transformers() -> Any:
    try:
        import compressed_tensors  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Running a checkpoint for vLLM needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'isogrid[vllm]'"
        ) from error
    return transformers


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    try:
        for file in sorted(artifact.path.glob("*.safetensors")):
            found |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{artifact.path} is incomplete: {error}. Copy it anew, or export again.") from error
    return found
