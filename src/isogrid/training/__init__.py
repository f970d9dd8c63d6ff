"""Training: calibration, distillation, adapters, the schedule, parameter groups and checkpoints."""

from isogrid.training.adapters import AdapterReport, adapter_report, add_adapters, use_adapters
from isogrid.training.batch_norm import reestimate_batch_norm
from isogrid.training.bitnet import to_bitnet
from isogrid.training.blockwise import BlockResult, Blockwise, train_blockwise, train_blockwise_on_disk
from isogrid.training.calibration import calibrate
from isogrid.training.checkpoint import load_training, save, save_training
from isogrid.training.codes import freeze_codes
from isogrid.training.distillation import Distillation, ThreePhases
from isogrid.training.divergences import TopK, confidence, kl_divergence
from isogrid.training.estimating import estimate
from isogrid.training.features import LayerLosses, feature_loss, relation_loss
from isogrid.training.generation import generate_text
from isogrid.training.merging import merge_adapters
from isogrid.training.parameters import parameter_groups
from isogrid.training.peft import load_peft, save_peft
from isogrid.training.pretrained import prepare, restore
from isogrid.training.recomputing import checkpoint_activations
from isogrid.training.schedule import Phase, Schedule, TwoStages
from isogrid.training.teacher_cache import TeacherCache, store_teacher
from isogrid.training.teachers import Teacher, teacher

__all__ = [
    "AdapterReport",
    "BlockResult",
    "Blockwise",
    "Distillation",
    "LayerLosses",
    "Phase",
    "Schedule",
    "Teacher",
    "TeacherCache",
    "ThreePhases",
    "TopK",
    "TwoStages",
    "adapter_report",
    "add_adapters",
    "calibrate",
    "checkpoint_activations",
    "confidence",
    "estimate",
    "feature_loss",
    "freeze_codes",
    "generate_text",
    "kl_divergence",
    "load_peft",
    "load_training",
    "merge_adapters",
    "parameter_groups",
    "prepare",
    "reestimate_batch_norm",
    "relation_loss",
    "restore",
    "save",
    "save_peft",
    "save_training",
    "store_teacher",
    "teacher",
    "to_bitnet",
    "train_blockwise",
    "train_blockwise_on_disk",
    "use_adapters",
]
