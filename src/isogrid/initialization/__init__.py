"""Where training starts: changes of a float model's weights that make it easier to quantise."""

from isogrid.initialization.learning import learn_rotations
from isogrid.initialization.rewriting import Rewriting
from isogrid.initialization.rotation import rotate
from isogrid.initialization.smoothing import smooth

__all__ = ["Rewriting", "learn_rotations", "rotate", "smooth"]
