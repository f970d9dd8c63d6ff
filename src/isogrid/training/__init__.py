"""Training: calibration, the schedule, parameter groups and checkpoints."""

from isogrid.training.batch_norm import reestimate_batch_norm
from isogrid.training.bitnet import to_bitnet
from isogrid.training.calibration import calibrate
from isogrid.training.checkpoint import load_training, save, save_training
from isogrid.training.codes import freeze_codes
from isogrid.training.parameters import parameter_groups
from isogrid.training.pretrained import prepare, restore
from isogrid.training.schedule import Phase, Schedule, TwoStages

__all__ = [
    "Phase",
    "Schedule",
    "TwoStages",
    "calibrate",
    "freeze_codes",
    "load_training",
    "parameter_groups",
    "prepare",
    "reestimate_batch_norm",
    "restore",
    "save",
    "save_training",
    "to_bitnet",
]
