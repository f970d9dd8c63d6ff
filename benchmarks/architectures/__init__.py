"""The architectures of the zoo: name → a function that builds a small model with random weights, and its inputs.

The models are those of `transformers`, made from their configurations, and a few in plain PyTorch of kinds that it
lacks. None is changed for Isogrid.
"""

from architectures.building import Architecture
from architectures.classifiers import CLASSIFIERS
from architectures.dense import DENSE
from architectures.plain import PLAIN
from architectures.sequences import SEQUENCES
from architectures.vision import VISION

ZOO: dict[str, Architecture] = {**CLASSIFIERS, **VISION, **DENSE, **SEQUENCES, **PLAIN}

__all__ = ["ZOO", "Architecture"]
