"""bitsandbytes: language models in NF4 and FP4, as checkpoints that transformers loads without quantising anew."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import TargetError
from isogrid.formats import Format, Quantized
from isogrid.layers.stored import StoredLinear
from isogrid.planning.graph import Call
from isogrid.planning.plan import LayerPlan, Plan
from isogrid.planning.rules import SCHEMES, Scheme
from isogrid.targets.artifact import Artifact, artifact_for
from isogrid.targets.bitsandbytes_packing import pack, type_of, unpack
from isogrid.targets.checkpoints.loading import CheckpointModel
from isogrid.targets.checkpoints.rows import Rows
from isogrid.targets.checkpoints.writing import Layers, float_linears, write_checkpoint
from isogrid.targets.refusing import refuse_hadamard


class Bitsandbytes:
    """The target `bitsandbytes`: linear layers in NF4 or FP4, with scales in float32 or doubly quantised.

    Embeddings, heads and experts stay in the model's dtype, in which everything computes.
    """

    name = "bitsandbytes"
    kernels = "float"
    float_endings: frozenset[str] = frozenset()
    fused_layers: tuple[tuple[str, ...], ...] = ()
    attention = None
    fuses_additions = False

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme itself; raises TargetError for one that bitsandbytes does not store."""
        if scheme.target != self.name:
            own = ", ".join(name for name, known in SCHEMES.items() if known.target == self.name)
            raise TargetError(f"bitsandbytes does not store scheme {scheme.name}. It stores {own}.")
        return scheme

    def supports(self, call: Call, scheme: Scheme) -> str | None:
        """None for linear layers that transformers replaces by bitsandbytes' own."""
        refuse_hadamard(call, "transformers")
        if call.kind == "linear" and call.type != "Conv1D":
            return None
        return f"bitsandbytes stores linear layers in 4 bits, and this is {call.type}"

    def activation_rule(self, weight: Format, scheme: Scheme) -> str | None:
        """Nothing: activations stay float."""
        return None

    def check_format(self, kind: str, fmt: Format, call: Call, scheme: Scheme) -> None:
        """Raise TargetError, with what to use instead, where bitsandbytes has no such format."""
        if kind == "activation" or type_of(fmt) is None:
            raise TargetError(
                f"{call.name!r}: bitsandbytes stores weights as nf4 or bnb-fp4, in blocks of 32 to 4096 values "
                f"(nf4/group128), or as nf4-double or bnb-fp4-double, not {fmt}; and activations stay float."
            )

    def export(self, integer_model: nn.Module, plan: Plan, path: str | Path) -> Artifact:
        """Write a folder: config.json, safetensors, and the plan in isogrid.json.

        Args:
            integer_model: of `isogrid.convert`, a model of transformers.
            plan: of the model.
            path: of the folder; an older export there is replaced, but for a tokenizer and the like.

        Raises:
            TargetError: the model is none of transformers, nothing in it is quantised, or transformers would keep in
                float what is.
        """
        return write_checkpoint(integer_model, plan, path, _packed, _configured)

    def load(self, path: str | Path | Artifact, threads: int = 0) -> "BitsandbytesModel":
        """The checkpoint in transformers, which computes by bitsandbytes.

        Args:
            path: of the folder, or the artefact.
            threads: are those of torch; 0 leaves them.

        Raises:
            ArtifactError: the folder, or a file of it, is missing, corrupt or truncated.
            MissingExtraError: transformers or bitsandbytes is not installed.
        """
        return BitsandbytesModel(artifact_for(self.name, path))


class BitsandbytesModel(CheckpointModel):
    """A checkpoint for bitsandbytes in transformers, on the CPU.

    Its layers decompress weights to the dtype of the model. On CPUs with bfloat16 instructions bitsandbytes would
    round scales and inputs to bfloat16 besides; that is turned off.
    """

    package = "bitsandbytes"

    @cached_property
    def model(self) -> Any:
        """The model of transformers; raises TargetError where transformers does not load the files."""
        model = super().model
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    def loading_options(self) -> dict[str, Any]:
        return {"device_map": "cpu"}

    def unpack(self, layer: LayerPlan, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
        return unpack(tensors, fmt, shape)


def _packed(module: StoredLinear, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    quantized = module.quantized
    if not torch.equal(rows.cpu(), torch.arange(quantized.shape[0])):
        raise TargetError(
            "transformers parts or joins a weight of this model when it writes it, and bitsandbytes' blocks go over "
            "whole weights. Plan it for target='vllm'."
        )
    return pack(quantized, dtype)


def _configured(model: nn.Module, stored: Layers, rows: Rows) -> Any:
    """`quantization_config`: the defaults for new layers, and which layers are none of bitsandbytes'."""
    owner: Any = model
    kept = getattr(owner, "_keep_in_fp32_modules", None) or ()
    if lost := [path for path in stored if path.rpartition(".")[2] in kept]:
        raise TargetError(
            f"transformers keeps {', '.join(sorted(kept))} of {type(model).__name__} in float32 and would not read "
            f"{lost[0]} from 4 bits. Keep it in float by a rule: Rule(match='*.{lost[0].rpartition('.')[2]}', "
            "keep='float')."
        )
    first = next(iter(stored.values())).format
    turned = [path for path, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": type_of(first),
        "bnb_4bit_use_double_quant": first.scale is not None and first.scale.scale is not None,
        "bnb_4bit_compute_dtype": str(owner.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [*float_linears(model), *turned],
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
