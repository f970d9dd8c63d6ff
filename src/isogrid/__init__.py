"""Quantization-aware training where what you train is, bit for bit, what you deploy.

Plan, prepare, train, convert, export, verify: see the README, or `isogrid --help`.
"""

from importlib import metadata

from isogrid.api import (
    Artifact,
    Phase,
    Plan,
    Rule,
    Schedule,
    VerificationReport,
    calibrate,
    convert,
    export,
    format,
    load,
    parameter_groups,
    plan,
    prepare,
    restore,
    save,
    verify,
)
from isogrid.errors import IsogridError

try:
    __version__ = metadata.version("isogrid")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0.0.0"

__all__ = [
    "Artifact",
    "IsogridError",
    "Phase",
    "Plan",
    "Rule",
    "Schedule",
    "VerificationReport",
    "__version__",
    "calibrate",
    "convert",
    "export",
    "format",
    "load",
    "parameter_groups",
    "plan",
    "prepare",
    "restore",
    "save",
    "verify",
]
