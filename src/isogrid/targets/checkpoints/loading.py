"""A checkpoint at work in transformers, which decompresses it by the package of its layout."""

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.errors import ArtifactError, MissingExtraError, TargetError
from isogrid.formats import Format, Quantized, named_format
from isogrid.layers.attention_states import ATTRIBUTE
from isogrid.layers.stored import parts_of
from isogrid.planning.plan import LayerPlan, StatePlan
from isogrid.planning.values import tensors_in
from isogrid.targets.artifact import Artifact
from isogrid.targets.checkpoints.rows import STACKS, Rows, assembled, converted, weight_name
from isogrid.targets.runtime import Observed, RuntimeOperator

POOLING = "add_pooling_layer"
"""The argument of transformers' encoders that their configs do not keep."""

Part = tuple[Tensor, Mapping[str, Tensor]]
"""Numbers of rows of a weight, and the tensors that these are stored in."""


@contextmanager
def loading_quietly(library: Any) -> Iterator[None]:
    """While open, transformers shows no progress, and does not say that a checkpoint brings its own layout."""
    logging: Any = import_module(f"{library.__name__}.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


class CheckpointModel(ABC):
    """A checkpoint loaded by `from_pretrained`, in the dtype of its config.

    Args:
        artifact: a folder.

    Raises:
        MissingExtraError: transformers, or the package that decompresses, is not installed.
    """

    package: ClassVar[str]
    """What decompresses, as it is imported."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self._library = _transformers(self.package, artifact.target)
        self._config = self._library.AutoConfig.from_pretrained(artifact.path)
        self._kind = getattr(self._library, self._config.architectures[0])

    @cached_property
    def model(self) -> Any:
        """The model of transformers.

        Raises:
            TargetError: transformers computes otherwise than the runtime does, or does not load the files.
        """
        options = {"dtype": self._config.dtype, **self._pooling(), **self.loading_options()}
        try:
            with loading_quietly(self._library):
                return self._kind.from_pretrained(self.artifact.path, **options).eval()
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            raise TargetError(f"transformers does not load {self.artifact.path}: {error}") from error

    def _pooling(self) -> dict[str, Any]:
        """An encoder whose files have no pooling layer gets none: transformers would add one of random weights."""
        takes_it = POOLING in inspect.signature(self._kind.__init__).parameters
        return {POOLING: False} if takes_it and not any("pooler." in name for name in _names(self.artifact)) else {}

    def loading_options(self) -> dict[str, Any]:
        """What `from_pretrained` is told beside the dtype.

        Raises:
            TargetError: transformers computes otherwise than the runtime does.
        """
        return {}

    @abstractmethod
    def unpack(self, layer: LayerPlan, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
        """Rows [out, in] of a layer from the tensors that they are stored in; KeyError where one is missing."""

    @cached_property
    def _empty(self) -> Any:
        """The float model without values, whose tensors transformers names as in any checkpoint."""
        with torch.device("meta"):
            return self._kind(self.float_config())

    def float_config(self) -> Any:
        """The model's config, as one of floats."""
        config = copy.deepcopy(self._config)
        del config.quantization_config
        return config

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
        """Codes, scales and biases in the files, unpacked, as `isogrid.convert` names them.

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
                first = tensors[0][1]
                divisor = first.get("input_global_scale")
                found[f"{layer.path}.input.scale"] = (first["input_scale"] if divisor is None else 1 / divisor).float()
            if all("bias" in own for _, own in tensors):
                order = torch.cat([rows for rows, _ in tensors]).argsort()
                found[f"{layer.path}.bias"] = torch.cat([own["bias"] for _, own in tensors])[order]
        files = self.tensors() if self.artifact.plan.states else {}
        for state in self.artifact.plan.states:
            name = self.state_name(state)
            if name not in files:
                raise ArtifactError(f"{self.artifact.path} has no {name}. Copy it anew, or export again.")
            found[f"{state.path}.{ATTRIBUTE}.{state.kind}.scale"] = files[name].float()
        return found

    def state_name(self, state: StatePlan) -> str:
        """What the scale of queries, keys or values is called in files."""
        raise NotImplementedError(f"{type(self).__name__} has no cache.")

    def quantized(self) -> dict[str, Quantized]:
        """The weight of each quantised layer by its path, as it is stored; see `stored` for errors."""
        return {layer.path: self._unpacked(layer, tensors) for layer, tensors in self._layers()}

    def _layers(self) -> Iterator[tuple[LayerPlan, list[Part]]]:
        """Each quantised layer with the parts that it is stored in."""
        tensors = self.tensors()
        parts: dict[str, list[Part]] = {}
        for prefix, (source, rows) in self._rows.items():
            parts.setdefault(source, []).append((rows, inside(tensors, prefix)))
        for layer in self.artifact.plan.layers:
            yield layer, parts[weight_name(layer.path)]

    @cached_property
    def _rows(self) -> Rows:
        """Which rows of which weight lie under which name in the files."""
        shapes = {weight_name(layer.path): self._shape(layer)[:-1] for layer in self.artifact.plan.layers}
        return converted(self._empty, {}, shapes).rows

    def on_disk(self) -> dict[str, LayerPlan]:
        """The quantised layers by their names in the files; an expert of a stack has one of its own."""
        layers = {weight_name(layer.path): layer for layer in self.artifact.plan.layers}
        return {prefix: layers[source] for prefix, (source, _) in self._rows.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the files; raises ArtifactError where one is truncated."""
        return _tensors(self.artifact)

    def _unpacked(self, layer: LayerPlan, parts: list[Part]) -> Quantized:
        fmt = named_format(self.artifact.plan.site(layer.weight).format)
        *rows, columns = self._shape(layer)
        try:
            found = [(numbers, self.unpack(layer, fmt, own, (len(numbers), columns))) for numbers, own in parts]
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
        return tuple(self._empty.get_parameter(weight_name(layer.path)).shape)


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a layer by their names within it.

    >>> list(inside({"a.weight": torch.ones(1), "a.weight.absmax": torch.ones(1), "ab.weight": torch.ones(1)}, "a"))
    ['weight', 'weight.absmax']
    """
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def is_stack(layer: LayerPlan) -> bool:
    """Whether a layer of a plan is one product of all experts."""
    return layer.path.rpartition(".")[2] in STACKS


def _transformers(package: str, target: str) -> Any:
    try:
        import_module(package)
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Running a checkpoint for {target} needs the package {error.name}, which is not installed. "
            f"Install it with: pip install 'isogrid[{target}]'"
        ) from error
    return transformers


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    with _reading(artifact):
        for file in _files(artifact):
            found |= load_file(file)
    return found


def _names(artifact: Artifact) -> list[str]:
    """The names of all tensors, which are read without their values."""
    from safetensors import safe_open

    found: list[str] = []
    with _reading(artifact):
        for file in _files(artifact):
            with safe_open(file, framework="pt") as opened:
                found += opened.keys()
    return found


def _files(artifact: Artifact) -> list[Path]:
    return sorted(artifact.path.glob("*.safetensors"))


@contextmanager
def _reading(artifact: Artifact) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{artifact.path} is incomplete: {error}. Copy it anew, or export again.") from error
