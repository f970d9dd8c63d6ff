"""Run the artefact, compare, say what differs."""

from isogrid.verification.report import VerificationReport
from isogrid.verification.verify import verify_artifact

__all__ = ["VerificationReport", "verify_artifact"]
