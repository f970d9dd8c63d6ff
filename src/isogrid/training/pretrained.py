"""`save_pretrained` of a prepared model of transformers, which writes Isogrid's checkpoint along.

transformers knows nothing of plans: it writes the quantisers' tensors, and `from_pretrained` drops them again. So the
folder gets another one, `isogrid`, which `isogrid.restore` reads, and config.json a mark about which `from_pretrained`
warns: `isogrid.restore(AutoModelForCausalLM.from_pretrained(folder), folder)` is the way back.
"""

import types
from pathlib import Path
from typing import Any

from torch import nn

from isogrid.planning.plan import Plan
from isogrid.planning.prepare import prepare as prepare_only
from isogrid.training.checkpoint import MANIFEST, save
from isogrid.training.checkpoint import restore as restore_only

FOLDER = "isogrid"
"""Where in the folder Isogrid's checkpoint lies."""

MARK = {"quant_method": "isogrid", "read_with": "isogrid.restore(model, folder)"}
"""What config.json says under `quantization_config`."""


def prepare(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a model train on a plan's grids; works in place and returns the model.

    Layers become Isogrid layers under their own names, so that float parameters keep their places in the
    state_dict. Weights get their ranges here; activations get theirs from `isogrid.calibrate`. The `save_pretrained` of
    a model of transformers keeps everything from then on, for `isogrid.restore` to read.

    Args:
        model: the model that the plan was made for.
        plan: of `isogrid.plan`.

    Raises:
        PlanError: the model is prepared already, or is not the one that was planned.
        NonFiniteError: a weight holds NaN or infinity.
        CaptureError: a module has something where the quantisers of its forward would go.

    In each case the model is as it was.

    >>> import isogrid as ig, torch
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> print(type(ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(torch.zeros(1, 4),)))[0]).__name__)
    QuantizedLinear
    """
    return _keeping(prepare_only(model, plan))


def restore(float_model: nn.Module, folder: str | Path) -> nn.Module:
    """Prepare a float model by a checkpoint's plan and load everything into it; in place, and returned.

    Args:
        float_model: as it was before `prepare`.
        folder: of `isogrid.save`, or of a prepared model's `save_pretrained`.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt, or of another model, which is then as it was.
    """
    inner = Path(folder) / FOLDER
    return _keeping(restore_only(float_model, inner if (inner / MANIFEST).is_file() else folder))


def _keeping(model: nn.Module) -> nn.Module:
    """The model; where it has a `save_pretrained`, that writes what `restore` reads too."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        instance: Any = model
        instance.save_pretrained = types.MethodType(save_pretrained, model)
    return model


def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of transformers, with the mark in config.json and the checkpoint in the folder `isogrid`."""
    before = vars(self.config).get("quantization_config")
    self.config.quantization_config = MARK
    try:
        result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    finally:
        if before is None:
            del self.config.quantization_config
        else:
            self.config.quantization_config = before
    if kwargs.get("is_main_process", True):
        save(self, Path(save_directory) / FOLDER)
    return result
