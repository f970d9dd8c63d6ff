"""Quantization-aware training where what you train is, bit for bit, what you deploy.

Plan, prepare, train, convert, export, verify: see the README, or `isogrid --help`.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from isogrid.errors import IsogridError

if TYPE_CHECKING:
    from isogrid.api import (
        AdapterReport,
        Artifact,
        BitLinear,
        Blockwise,
        Distillation,
        LayerLosses,
        MergeDifference,
        Phase,
        Plan,
        Rule,
        Schedule,
        TeacherCache,
        ThreePhases,
        TwoStages,
        VerificationReport,
        adapter_report,
        add_adapters,
        adopt,
        calibrate,
        checkpoint_activations,
        convert,
        estimate,
        export,
        fit_lq_lora,
        fit_types,
        format,
        freeze_codes,
        generate_text,
        learn_rotations,
        load,
        load_peft,
        merge_adapters,
        merge_difference,
        parameter_groups,
        plan,
        prepare,
        reestimate_batch_norm,
        restore,
        rotate,
        save,
        save_peft,
        smooth,
        store_teacher,
        teacher,
        to_bitnet,
        to_torchao,
        train_blockwise,
        train_blockwise_on_disk,
        unplanned,
        use_adapters,
        verify,
    )

try:
    __version__ = metadata.version("isogrid")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0.0.0"

__all__ = [
    "AdapterReport",
    "Artifact",
    "BitLinear",
    "Blockwise",
    "Distillation",
    "IsogridError",
    "LayerLosses",
    "MergeDifference",
    "Phase",
    "Plan",
    "Rule",
    "Schedule",
    "TeacherCache",
    "ThreePhases",
    "TwoStages",
    "VerificationReport",
    "__version__",
    "adapter_report",
    "add_adapters",
    "adopt",
    "adopt_checkpoint",
    "calibrate",
    "checkpoint_activations",
    "convert",
    "estimate",
    "export",
    "fit_lq_lora",
    "fit_types",
    "format",
    "freeze_codes",
    "generate_text",
    "learn_rotations",
    "load",
    "load_peft",
    "merge_adapters",
    "merge_difference",
    "parameter_groups",
    "plan",
    "prepare",
    "reestimate_batch_norm",
    "restore",
    "rotate",
    "save",
    "save_peft",
    "smooth",
    "store_teacher",
    "teacher",
    "to_bitnet",
    "to_torchao",
    "train_blockwise",
    "train_blockwise_on_disk",
    "unplanned",
    "use_adapters",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported when one is first used: `isogrid --help` need not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'isogrid' has no attribute {name!r}")
    return getattr(import_module("isogrid.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
