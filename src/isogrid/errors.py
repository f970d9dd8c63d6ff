"""The exceptions of Isogrid. Each message says what is wrong and what to do about it."""


class IsogridError(Exception):
    """Base of every error that Isogrid raises on purpose.

    >>> issubclass(FormatError, IsogridError)
    True
    """


class FormatError(IsogridError):
    """A format's name is unknown, or the format does not fit a tensor."""


class NonFiniteError(IsogridError):
    """A tensor holds NaN or infinity where a grid needs numbers."""


class NotCalibratedError(IsogridError):
    """A quantizer was asked to quantise before it had a range."""


class PlanError(IsogridError):
    """A rule matches nothing, or asks for what the target cannot run."""


class CaptureError(IsogridError):
    """The model does not run on the example inputs, or behaved differently than it did on them."""


class TargetError(IsogridError):
    """A runtime refused, or an artefact asks for what the runtime does not have."""


class MissingExtraError(IsogridError):
    """An optional dependency is not installed; the message names the extra to install."""


class RecipeError(IsogridError):
    """A recipe is not valid; the message points at the line."""


class ArtifactError(IsogridError):
    """An exported file is corrupt, truncated or not what its sidecar says."""


class CheckpointError(IsogridError):
    """A checkpoint is corrupt, truncated or belongs to another model."""


class DistillationError(IsogridError):
    """A teacher does not fit its student, or a cache of its logits the data."""
class MemoryExhaustedError(IsogridError):
    """A step of training needs more memory than there is; the message names the settings that need less."""
