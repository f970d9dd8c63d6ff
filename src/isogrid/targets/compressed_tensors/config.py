"""`quantization_config` of config.json: which layers are stored how, and what is done to their inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isogrid.errors import TargetError
from isogrid.formats import Format, IntegerGrid, PerChannel, PerGroup, PerTensor, PerTile
from isogrid.formats.floats import ExponentGrid
from isogrid.targets.compressed_tensors.packing import NVFP4, layout_of

VERSION = "0.20.0"
"""Of compressed-tensors, whose layouts these are."""

EXPERTS = r"re:.*\.experts\..*"


@dataclass(frozen=True)
class Storage:
    """How layers are stored: those of one `config_group`.

    Attributes:
        weight: their format.
        activations: the name of the rule or format of their inputs, or `float`.
    """

    weight: Format
    activations: str

    def __post_init__(self) -> None:
        if (self.activations == "nvfp4-local") != (self.layout == NVFP4.name and self.activations != "float"):
            raise TargetError(
                f"Weights in {self.weight} do not go with inputs in {self.activations}: these need NVFP4 weights, "
                "and NVFP4 weights need these or float inputs. Write rules that give layers both, or neither."
            )

    @property
    def layout(self) -> str:
        """Of the tensors, by its name in config.json."""
        return layout_of(self.weight, self.activations != "float").name

    def group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of config.json."""
        return {
            "targets": targets,
            "weights": weight_arguments(self.weight),
            "input_activations": INPUTS[self.activations],
            "output_activations": None,
            "format": self.layout,
        }


def quantization_config(
    layers: Mapping[str, Storage],
    experts: Mapping[str, Storage],
    ignore: list[str],
    cache: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
) -> Any:
    """The dictionary that goes into config.json.

    Args:
        layers, experts: what is quantised, by path.
        ignore: paths of linear layers that are not.
        cache: arguments of the key-value cache, or None.
        attention: the group of attention layers whose queries are quantised, or None.

    Raises:
        TargetError: experts are stored in several ways, which transformers cannot tell apart.
    """
    kinds = list(dict.fromkeys([*layers.values(), *experts.values()]))
    if len(set(experts.values())) > 1:
        raise TargetError(
            "The experts of this model are stored in several formats, and readers of compressed-tensors know one for "
            "all experts. Write one rule for them."
        )
    targets = [[name for name, storage in layers.items() if storage == kind] for kind in kinds]
    for kind, names in zip(kinds, targets, strict=True):
        names += [EXPERTS] if kind in experts.values() else []
    targets = [["Linear"]] if len(kinds) == 1 else targets
    layouts = {kind.layout for kind in kinds}
    groups = [kind.group(own) for kind, own in zip(kinds, targets, strict=True)]
    groups += [] if attention is None else [attention]
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": cache,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def weight_arguments(fmt: Format) -> dict[str, Any]:
    """The `weights` of a group, as compressed-tensors' QuantizationArgs reads them.

    >>> from isogrid.formats import named_format
    >>> weight_arguments(named_format("uint4/group128:scale=bfloat16"))["strategy"]
    'group'
    """
    integer = isinstance(fmt.grid, IntegerGrid)
    found: dict[str, Any] = {
        "num_bits": int(fmt.grid.bits),
        "type": "int" if integer else "float",
        "symmetric": fmt.zero_point is None,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        **_strategy(fmt),
    }
    if not integer and found["num_bits"] == 4:
        assert fmt.scale is not None
        powers = isinstance(fmt.scale.grid, ExponentGrid)
        dtype = "torch.uint8" if powers else "torch.float8_e4m3fn"
        found |= {"strategy": "group" if powers else "tensor_group", "scale_dtype": dtype, "zp_dtype": dtype}
    return found


def _strategy(fmt: Format) -> dict[str, Any]:
    granularity = fmt.granularity
    if isinstance(granularity, PerGroup):
        return {"strategy": "group", "group_size": granularity.size}
    if isinstance(granularity, PerTile):
        return {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
    if granularity == PerChannel(0):
        return {"strategy": "channel"}
    if isinstance(granularity, PerTensor):
        return {"strategy": "tensor"}
    raise TargetError(f"compressed-tensors has no strategy for {fmt}.")


def _inputs(type_: str, strategy: str, dynamic: bool, group: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": type_,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": group,
    }


def _fp4_inputs(strategy: str, dynamic: bool | str, group: int, scale: str) -> dict[str, Any]:
    common = _inputs("float", strategy, True, group)
    return {**common, "num_bits": 4, "dynamic": dynamic, "scale_dtype": scale, "zp_dtype": scale}


INPUTS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int8-token": _inputs("int", "token", dynamic=True),
    "int8-token-cuda": _inputs("int", "token", dynamic=True),
    "fp8-token": _inputs("float", "token", dynamic=True),
    "fp8-group128": _inputs("float", "group", dynamic=True, group=128),
    "int8/tensor": _inputs("int", "tensor", dynamic=False),
    "fp8_e4m3/tensor": _inputs("float", "tensor", dynamic=False),
    "mxfp4-group32": _fp4_inputs("group", True, 32, "torch.uint8"),
    "nvfp4-local": _fp4_inputs("tensor_group", "local", 16, "torch.float8_e4m3fn"),
}
"""`input_activations`, by the name of the rule or format."""
